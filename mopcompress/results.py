"""Result rows, stored as JSON lines: `bench` writes them and `report` reads them, and nothing else joins the two.

The dataclasses are stored field by field, so their names are the keys of the files. Names end in their unit where it is
seconds, bytes or nats. Requests (`ratio`, `bits`) and counts (`sparsity`) are separate fields.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mopcompress.errors import DataError


class Cell(NamedTuple):
    """The position of one row in the grid of a bench."""

    setting: str  # a compression by its `setting_name`
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Scores of the test documents of one task."""

    documents: int
    scored_tokens: int
    perplexity: float  # exp of the mean nats per scored token
    exact_match: float  # fraction of documents, 0 to 1
    rouge_l: float | None = None  # mean over written answers, 0 to 1; None when no answers were requested
    written_exact_match: float | None = None  # fraction of documents, 0 to 1; None when no answers were requested


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswers:
    """Answers that the model generated token by token; one entry per document, in the order of the test split."""

    answers: Sequence[str]
    rouge_l: Sequence[float]  # F1 against the only reference of the document, 0 to 1
    exact: Sequence[bool]  # True when the words are those of the reference, ignoring case and punctuation


@dataclass(frozen=True, kw_only=True)
class AnswerSample:
    """A test document as readable text, with the answer of the model."""

    task: str
    instruction: str
    reference: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class DocumentScores:
    """Scores of each test document, in the order of the test split: the input of paired intervals."""

    tasks: Sequence[str]
    nats: Sequence[float]  # negative log-likelihood, summed over the scored tokens of the document
    scored_tokens: Sequence[int]
    exact: Sequence[bool]  # True when greedy decoding gives exactly the reference response
    written: GeneratedAnswers | None = None  # None when no answers were requested


@dataclass(frozen=True, kw_only=True)
class GateStatistics:
    """Expert weights on the test split, summarized: accuracy, entropy and load."""

    tasks: Sequence[str]
    weights: Sequence[Sequence[float]]  # [task][expert], mean over documents; 1 = as in a plain prompt
    accuracy: float | None  # fraction of documents whose strongest expert is that of their task; None: no such map
    entropy_nats: float  # mean over documents; log(experts) for equal weights
    confusion: Sequence[Sequence[int]] = ()  # [task][expert], number of documents whose strongest expert this is
    load: Sequence[float] = ()  # [expert], mean weight over all documents
    domains: Sequence[str] = ()  # [expert], the task of each expert; empty when experts have no tasks


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One learning rate of a sweep."""

    learning_rate: float
    validation_nats: float | None  # mean nats per scored token of the validation rows; None: the training diverged
    seconds: float  # time of the training, or until it diverged


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The learning rates that were tried for one arm, and the best of them."""

    arm: str
    steps: int  # per trial, warm-up and decay included
    batch_size: int
    validation_rows: int
    trials: list[Trial]
    learning_rate: float  # the best
    at_edge: bool  # True when the best is the highest or the lowest that was tried: a better one may lie outside
    seconds: float  # time of all trials


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One finished cell of the grid: the scores and costs of one arm in one setting with one seed."""

    ratio: float | None  # requested fraction of weights (structured: of channels) to remove; None: only quantized
    bits: int | None  # requested bits per weight; None when the weights are only pruned, or dense
    method: str  # dense, a pruning method, gptq, or both joined: sparsegpt+gptq
    arm: str  # none, single, mop, ...
    seed: int
    data: str  # the name of the data set
    perplexity: float  # exp of the mean nats per scored token (micro)
    perplexity_macro: float  # exp of the mean over tasks of each task's mean nats per token
    exact_match: float  # fraction of documents, 0 to 1
    documents: int
    scored_tokens: int
    sparsity: float  # fraction of the weights of the dense linears that are zero or removed, counted afterwards
    weights: int  # number of weights in the compressed linears, removed ones included
    model_bytes: int  # size of the safetensors files
    adapter_bytes: int
    trained_parameters: int  # the gate included
    train_steps: int
    train_seconds: float
    compress_seconds: float
    evaluate_seconds: float
    text_perplexity: float | None = None  # of plain text that no arm was trained on; None when no text was requested
    rouge_l: float | None = None  # mean over written answers, 0 to 1 (micro); None when none were requested
    rouge_l_macro: float | None = None  # mean over tasks of each task's mean, 0 to 1
    written_exact_match: float | None = None  # fraction of documents whose answer has the words of the reference
    samples: Sequence[AnswerSample] = ()  # a few of the written answers
    fallbacks: int  # number of matrices that needed more damping than requested
    peak_bytes: int  # peak resident memory of the process so far
    per_task: dict[str, TaskScore]
    gate: GateStatistics | None
    documents_file: str  # path of the `DocumentScores`, relative to the run folder
    model_sha256: str | None = None  # hash of the compressed weights; None in rows that do not record it
    revision: int = 1  # version of the arm's default behaviour, see `recipe.arms`

    @property
    def setting(self) -> str:
        """The compression of this row by its name in reports."""
        return setting_name(self.method, self.ratio, self.bits)

    @property
    def cell(self) -> Cell:
        """The position in the grid, which is unique in a run."""
        return Cell(self.setting, self.arm, self.seed)


def setting_name(method: str, ratio: float | None, bits: int | None) -> str:
    """Return the name of a compression: `dense`, `sparsegpt 50%`, `gptq 3-bit`, `sparsegpt 50% + gptq 4-bit`."""
    if method == "dense":
        return "dense"
    pruning, _, quantization = method.partition("+")
    if quantization:
        return f"{setting_name(pruning, ratio, None)} + {setting_name(quantization, None, bits)}"
    return f"{method} {bits}-bit" if bits else f"{method} {100 * (ratio or 0):g}%"


def folder_name(setting: str) -> str:
    """Return the name of a setting as a file name."""
    return setting.replace("%", "").replace(" + ", "-").replace(" ", "-")


def sweep_name(setting: str, arm: str) -> str:
    """Return the file name, without suffix, of the sweep of an arm in a setting."""
    return f"{folder_name(setting)}-{arm}"


def append_row(row: BenchRow, path: Path) -> None:
    """Append one JSON line, in place of a partial last line; it is on disk when this returns."""
    line = json.dumps(asdict(row), allow_nan=True) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[BenchRow]:
    """Read the finished cells of a run. A partial last line, which a killed run leaves, is dropped.

    Raises `DataError` when another line is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row_from(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}: line {number} is not a bench row ({error}); remove that line") from error
    return rows


def check_comparable(rows: Sequence[BenchRow], path: Path) -> None:
    """Raise `DataError` when one setting has rows of two models, or one arm has rows of two revisions.

    Rows without a hash are accepted.
    """
    for setting in dict.fromkeys(row.setting for row in rows):
        hashes = {row.model_sha256 for row in rows if row.setting == setting} - {None}
        if len(hashes) > 1:
            raise DataError(
                f"{path}: the rows of {setting} are of {len(hashes)} models (model_sha256), for example pruned with "
                "another number of threads, so their arms cannot be compared; keep the rows of one model"
            )
    for arm in dict.fromkeys(row.arm for row in rows):
        if len(revisions := {row.revision for row in rows if row.arm == arm}) > 1:
            numbers = " and ".join(map(str, sorted(revisions)))
            raise DataError(
                f"{path}: the rows of {arm} are of revisions {numbers}, which behave differently; keep the rows of one "
                "revision"
            )


def _row_from(fields: dict[str, Any]) -> BenchRow:
    fields["per_task"] = {task: TaskScore(**score) for task, score in fields["per_task"].items()}
    fields["gate"] = fields["gate"] and GateStatistics(**fields["gate"])
    fields["samples"] = tuple(AnswerSample(**sample) for sample in fields.get("samples", ()))
    return BenchRow(**fields)


def write_documents(scores: DocumentScores, path: Path) -> None:
    """Write the scores of a test split as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(scores)), encoding="utf-8")


def read_documents(path: Path) -> DocumentScores:
    """Read the scores that `write_documents` wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    written = fields.pop("written", None)
    return DocumentScores(**fields, written=written and GeneratedAnswers(**written))


def read_sweeps(folder: Path) -> dict[str, Sweep]:
    """Read the sweeps of a bench, by `sweep_name`. Raises `DataError` when a file is not a sweep."""
    return {path.stem: _read_sweep(path) for path in sorted(folder.glob("*.json"))}


def _read_sweep(path: Path) -> Sweep:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Sweep(**fields | {"trials": [Trial(**trial) for trial in fields["trials"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a sweep ({error}); remove the file, and the arm is swept again") from error
