"""Rows: the contract between running and reporting. Plain data, JSON lines, no torch.

Units stand in the names. What was requested (`ratio`, `bits`) and what was counted (`sparsity`) are separate fields.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mopcompress.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Scores of one task's test documents."""

    documents: int
    scored_tokens: int
    perplexity: float
    exact_match: float
    rouge_l: float | None = None  # of written answers, as `written_exact_match`: None where none were asked for
    written_exact_match: float | None = None


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswers:
    """What the model answered, token by token on its own; one entry a test document, in the order of the test split."""

    answers: Sequence[str]
    rouge_l: Sequence[float]  # F1, 0 to 1, against the document's only reference
    exact: Sequence[bool]  # the reference's words, whatever their case and the punctuation


@dataclass(frozen=True, kw_only=True)
class AnswerSample:
    """A test document as people read it, with what was answered."""

    task: str
    instruction: str
    reference: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """One entry a test document, in the order of the test split: what paired intervals are made of."""

    tasks: Sequence[str]
    nats: Sequence[float]  # summed over the document's scored tokens
    scored_tokens: Sequence[int]
    exact: Sequence[bool]  # greedy decoding gives exactly the reference response
    written: GeneratedAnswers | None = None  # None where no answers were asked for


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """What the gate did on the test split."""

    tasks: Sequence[str]
    weights: Sequence[Sequence[float]]  # [task][expert], mean over documents; 1 = as in a plain prompt
    accuracy: float | None  # share of documents whose strongest expert is their task's; None without a one-to-one map
    entropy_nats: float  # mean over documents; log(experts) when the gate has no preference
    confusion: Sequence[Sequence[int]] = ()  # [task][expert], documents for which this expert weighs most
    load: Sequence[float] = ()  # [expert], mean weight over all documents
    domains: Sequence[str] = ()  # [expert], its task; empty without a one-to-one map


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One rate of a sweep."""

    learning_rate: float
    validation_nats: float | None  # mean over the scored tokens; None: it broke down
    seconds: float  # of its training; without an end, until it broke down


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was tried for one arm, and what came of it."""

    arm: str
    steps: int  # of each trial, warm-up and decay included
    batch_size: int
    validation_rows: int
    trials: list[Trial]
    learning_rate: float  # the best
    at_edge: bool  # no higher or no lower rate was tried: the best may lie outside
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One cell of the grid ratio x method x arm x seed."""

    ratio: float | None  # share asked to be removed, of weights (structured: of channels); 0 dense; None only rounded
    bits: int | None  # bits asked for; None when pruned alone or dense
    method: str  # dense, magnitude, wanda, sparsegpt, alps, structured, gptq, or two: sparsegpt+gptq
    arm: str  # none, single, mop, ...
    seed: int
    data: str
    perplexity: float  # exp of mean nats over all scored tokens (micro)
    perplexity_macro: float  # exp of the mean over tasks of each task's mean nats a token
    exact_match: float  # share of documents
    documents: int
    scored_tokens: int
    sparsity: float  # zeros, or weights that are gone, of those in the dense linears, counted afterwards
    weights: int  # weights in the compressed linears, gone ones too
    model_bytes: int  # safetensors on disk
    adapter_bytes: int
    trained_parameters: int  # the gate included
    train_steps: int
    train_seconds: float
    compress_seconds: float
    evaluate_seconds: float
    text_perplexity: float | None = None  # on plain text that no arm was trained on; None where none was asked for
    rouge_l: float | None = None  # of written answers, mean over documents (micro); None where none were asked for
    rouge_l_macro: float | None = None  # mean over tasks of each task's mean
    written_exact_match: float | None = None  # share of documents whose written answer has the reference's words
    samples: Sequence[AnswerSample] = ()  # a few of the written answers
    fallbacks: int  # matrices that needed more damping than asked for
    peak_bytes: int  # peak resident memory of the process so far
    per_task: dict[str, TaskScore]
    gate: GateStatistics | None
    documents_file: str  # path of the DocumentScores, relative to the run folder
    model_sha256: str | None = None  # of the weights it was trained and scored on; None in rows from before it was kept
    revision: int = 1  # of the arm: see `recipe.arms`

    @property
    def setting(self) -> str:
        """The compression of this row as a reader names it."""
        return setting_name(self.method, self.ratio, self.bits)

    @property
    def cell(self) -> tuple[str, str, int]:
        """What makes the row unique in its run."""
        return (self.setting, self.arm, self.seed)


def setting_name(method: str, ratio: float | None, bits: int | None) -> str:
    """A compression as a reader names it: `dense`, `sparsegpt 50%`, `gptq 3-bit`, `sparsegpt 50% + gptq 4-bit`."""
    if method == "dense":
        return "dense"
    pruning, _, rounding = method.partition("+")
    if rounding:
        return f"{setting_name(pruning, ratio, None)} + {setting_name(rounding, None, bits)}"
    return f"{method} {bits}-bit" if bits else f"{method} {100 * (ratio or 0):g}%"


def folder_name(setting: str) -> str:
    """The name of a setting as a file name."""
    return setting.replace("%", "").replace(" + ", "-").replace(" ", "-")


def sweep_name(setting: str, arm: str) -> str:
    """Under which name a bench keeps the sweep of an arm."""
    return f"{folder_name(setting)}-{arm}"


def append_row(row: BenchRow, path: Path) -> None:
    """Append one JSON line in place of an unfinished one; it is on disk when this returns."""
    line = json.dumps(asdict(row), allow_nan=True) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[BenchRow]:
    """Read the finished cells of a run; an unfinished last line (a killed run) is dropped.

    Raises `DataError` when another line is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}: line {number} is not a bench row ({error}); remove that line") from error
    return rows


def check_comparable(rows: Sequence[BenchRow], path: Path) -> None:
    """Raise `DataError` when rows of one setting are of two models, or rows of one arm of two revisions of it.

    Rows from before hashes were kept have none and are believed.
    """
    for setting in dict.fromkeys(row.setting for row in rows):
        hashes = {row.model_sha256 for row in rows if row.setting == setting} - {None}
        if len(hashes) > 1:
            raise DataError(
                f"{path}: {setting} is {len(hashes)} models (model_sha256), as pruning with other threads gives, and "
                "their arms cannot be compared; keep the rows of one of them"
            )
    for arm in dict.fromkeys(row.arm for row in rows):
        if len(revisions := {row.revision for row in rows if row.arm == arm}) > 1:
            told = " and ".join(map(str, sorted(revisions)))
            raise DataError(
                f"{path}: {arm} is there in revisions {told}, which are two arms; keep the rows of one of them"
            )


def _row(fields: dict) -> BenchRow:  # type: ignore[type-arg]
    fields["per_task"] = {task: TaskScore(**score) for task, score in fields["per_task"].items()}
    fields["gate"] = fields["gate"] and GateStatistics(**fields["gate"])
    fields["samples"] = tuple(AnswerSample(**sample) for sample in fields.get("samples", ()))
    return BenchRow(**fields)


def write_documents(scores: DocumentScores, path: Path) -> None:
    """Write one test split's scores as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(scores)), encoding="utf-8")


def read_documents(path: Path) -> DocumentScores:
    """Read what `write_documents` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    written = fields.pop("written", None)
    return DocumentScores(**fields, written=written and GeneratedAnswers(**written))


def read_sweeps(folder: Path) -> dict[str, Sweep]:
    """The sweeps of a bench by `sweep_name`. Raises `DataError` when a file is none."""
    return {path.stem: _sweep(path) for path in sorted(folder.glob("*.json"))}


def _sweep(path: Path) -> Sweep:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Sweep(**fields | {"trials": [Trial(**trial) for trial in fields["trials"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a sweep ({error}); remove it, and the arm is swept again") from error
