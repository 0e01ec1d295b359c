"""What a reader needs to trust the numbers or repeat them, as plain sentences. What was not recorded is said so."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mopcompress.report.bootstrap import CONFIDENCE, MIN_DOCUMENTS, RESAMPLES, SEED
from mopcompress.report.number_format import UNKNOWN, duration
from mopcompress.report.run_folder import Run, section

Facts = tuple[tuple[str, str], ...]

DEFINITIONS: Facts = (
    (
        "perplexity",
        "exp of the mean negative log-likelihood in nats over all scored tokens of all test documents (micro). Scored "
        "are the response tokens, each given the instruction and the response before it.",
    ),
    ("macro", "exp of the mean over tasks of each task's mean nats a token: every task counts the same, however long."),
    ("exact match", "share of test documents whose greedy decoding reproduces exactly the reference response tokens."),
    (
        "recovery",
        "(log ppl of none - log ppl of the arm) / (log ppl of none - log ppl of dense). 0: as the compressed model "
        "without a prompt; 1: as the dense model without one. It can exceed 1, because the arms also adapt to the "
        "task; n/a without a dense line.",
    ),
    (
        "mean over seeds",
        "geometric for perplexities, so that it agrees with the differences in log space; arithmetic otherwise.",
    ),
    (
        "interval",
        f"{100 * CONFIDENCE:g} % percentile interval of a paired bootstrap: {RESAMPLES:,} resamples of the test "
        f"documents (macro: within each task, if every task has at least {MIN_DOCUMENTS}), generator seed {SEED}. The "
        "arms are scored on the same tokens; this is checked. There is no correction for looking at many settings.",
    ),
    (
        "arms",
        "none: the compressed model. single: one soft prompt. mop: the mixture of prompts. uniform: its prompts "
        "without a gate. oracle: all weight on the expert of the true task. shuffled: mop whose gate reads another "
        "example. idp: of several prompts the one that the instruction attends to most. The model's weights stay as "
        "compressed in each.",
    ),
)

WRITTEN: Facts = (
    (
        "ROUGE-L",
        "100 times the F1 of the longest common subsequence of words of the written answer and the reference (Lin "
        "2004), in lower case, without punctuation and without stemming; mean over test documents, macro: over tasks "
        "of each task's mean. Answers are written greedily from the instruction alone. Every document has one "
        "reference.",
    ),
    ("written exactly", "share of test documents whose written answer has the reference's words, in their order."),
)


def definitions(run: Run) -> Facts:
    """Of the columns that this report has."""
    return (*DEFINITIONS, *(WRITTEN if any(row.rouge_l is not None for row in run.rows) else ()))


def title(run: Run) -> str:
    """The model and the data, in one line."""
    return f"{_said(section(run.manifest, 'model').get('name'))} on {_said(section(run.manifest, 'data').get('name'))}"


def data_facts(run: Run) -> Facts:
    """The first lines of every report: which model, which data, how many rows, which seeds."""
    data, model = section(run.manifest, "data"), section(run.manifest, "model")
    rows = ", ".join(f"{_said(data.get(f'{split}_rows'))} {split}" for split in ("train", "validation", "test"))
    tasks = data.get("tasks") or list(dict.fromkeys(next(iter(run.documents.values())).tasks))
    seeds = ", ".join(map(str, sorted({row.seed for row in run.rows})))
    return (
        ("Model", _joined(_said(model.get("name")), model.get("note"))),
        ("Data", _joined(f"{_said(data.get('name'))}, {len(tasks)} tasks", data.get("note"))),
        ("Rows", f"{rows}; dropped: {_said(data.get('dropped_rows'))}"),
        *_plain_text(data),
        ("Scored", f"{run.rows[0].documents:,} test documents, {run.rows[0].scored_tokens:,} tokens"),
        ("Seeds", f"data {_said(run.spec.get('seed'))}; training {seeds}"),
        ("Tasks", ", ".join(map(str, tasks))),
    )


def _plain_text(data: Mapping[str, Any]) -> Facts:
    texts = {"text": "scored, and no arm was trained on it", "train_text": "among the training rows, a task of its own"}
    given = {name: section(data, name) for name in texts}
    return tuple(
        ("Plain text", f"{one.get('windows')} windows of {one.get('name')}: {texts[name]}")
        for name, one in given.items()
        if one
    )


def protocol_facts(run: Run) -> Facts:
    """Everything else the manifest says, in reading order."""
    manifest = run.manifest
    model, data, calibration = (section(manifest, name) for name in ("model", "data", "calibration"))
    dirty = manifest.get("dirty")
    changed = " with uncommitted changes" if dirty is True else "" if dirty is False else " (changes: not recorded)"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(section(manifest, "versions").items()))
    seconds = manifest.get("seconds")
    return (
        *(
            (f"Protocol {place}", str(sentence))
            for place, sentence in enumerate(_sentences(manifest.get("protocol")), start=1)
        ),
        ("Model weights", f"{_said(model.get('weights'))}; sha256 {_said(model.get('sha256'))}"),
        ("Data", f"sha256 {_said(data.get('sha256'))}; template {_said(data.get('template'))}"),
        (
            "Calibration",
            f"{_said(calibration.get('source'))}; {_said(calibration.get('samples'))} samples of "
            f"{_said(calibration.get('length'))} tokens; sha256 {_said(calibration.get('sha256'))}",
        ),
        ("Commit", _said(manifest.get("commit")) + (changed if manifest.get("commit") else "")),
        ("Versions", versions or UNKNOWN),
        ("Device", f"{_said(manifest.get('device'))}; threads: {_said(manifest.get('threads'))}"),
        ("Started", _said(manifest.get("started"))),
        ("Finished", _said(manifest.get("finished"))),
        ("Took", duration(float(seconds)) if isinstance(seconds, int | float) else UNKNOWN),
    )


def command(manifest: Mapping[str, Any]) -> str | None:
    """The command line that repeats the run, or None when it was not recorded."""
    recorded = manifest.get("command")
    if isinstance(recorded, list):
        return shlex.join(map(str, recorded))
    return str(recorded) if recorded else None


def recipe_text(manifest: Mapping[str, Any]) -> str:
    """The resolved recipe as indented JSON (which is YAML too)."""
    recipe = section(manifest, "recipe")
    return json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else UNKNOWN


def _sentences(recorded: Any) -> Sequence[Any]:
    return recorded if isinstance(recorded, list) and recorded else [recorded or UNKNOWN]


def _said(value: Any) -> str:
    if value is None or value == "":
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _joined(text: str, note: Any) -> str:
    return f"{text} ({note})" if note else text
