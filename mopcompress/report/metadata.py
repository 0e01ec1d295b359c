"""Sentences about a run that a reader needs to trust the numbers or to repeat them. Gaps read "not recorded"."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mopcompress.recipe.arms import ARM_DEFAULTS, NO_ADAPTER
from mopcompress.report.bootstrap import CONFIDENCE, MIN_DOCUMENTS, RESAMPLES, SEED
from mopcompress.report.number_format import UNKNOWN, duration
from mopcompress.report.pivot import ARM_ORDER
from mopcompress.report.run_folder import Run, section

Facts = tuple[tuple[str, str], ...]  # name and sentence

GRID_WORDS: Facts = (
    (
        "setting",
        "one compression of the model, such as a method with a ratio or a number of bits; dense: no compression.",
    ),
)
SCORES: Facts = (
    (
        "perplexity",
        "exp of the mean negative log-likelihood, in nats per scored token, over all test documents (micro: every "
        "token counts the same). Scored tokens are those of the responses, each given the instruction and the response "
        "before "
        "it. Lower is better.",
    ),
    ("macro perplexity", "exp of the mean over tasks of each task's mean nats per token: every task counts the same."),
    ("exact match", "fraction of test documents for which greedy decoding gives exactly the tokens of the reference."),
    (
        "recovery",
        "(log perplexity of none - that of the arm) / (log perplexity of none - that of the dense model). 0: as good "
        "as the compressed model without an adapter; 1: as good as the dense model without one. It can exceed 1, "
        "because "
        "arms also learn the tasks; n/a without rows of the dense model.",
    ),
    (
        "mean over seeds",
        "geometric for perplexities, so that it agrees with the differences of log perplexity; arithmetic otherwise.",
    ),
    (
        "interval",
        f"{100 * CONFIDENCE:g} % percentile interval of a paired bootstrap: {RESAMPLES:,} resamples of the test "
        f"documents (macro: within each task, if every task has at least {MIN_DOCUMENTS}), generator seed {SEED}. All "
        "arms are scored on the same tokens; this is checked. There is no correction for looking at many settings.",
    ),
    (
        "verdict",
        "better or worse: the interval of the first arm against the second does not contain 0; no difference shown: it "
        "does.",
    ),
)
ANSWER_SCORES: Facts = (
    (
        "ROUGE-L",
        "100 times the F1 of the longest common subsequence of words of the generated answer and the reference (Lin "
        "2004), in lower case, without punctuation and without stemming; mean over test documents, macro: mean over "
        "tasks of each task's mean. Answers are generated greedily from the instruction alone. Every document has one "
        "reference.",
    ),
    (
        "written exactly",
        "fraction of test documents whose generated answer has the words of the reference, in their order.",
    ),
)


def definitions(run: Run) -> Facts:
    """Define the arms and the columns that this report has."""
    answers = ANSWER_SCORES if any(row.rouge_l is not None for row in run.rows) else ()
    return (*GRID_WORDS, ("arm", _arms_sentence(run)), *SCORES, *answers)


def _arms_sentence(run: Run) -> str:
    """Describe the arms of the run from the registry of the recipe."""
    summaries = {"none": NO_ADAPTER.summary} | {arm: defaults.summary for arm, defaults in ARM_DEFAULTS.items()}
    measured = {row.arm for row in run.rows}
    described = [f"{arm}: {summaries[arm]}." for arm in ARM_ORDER if arm in measured]
    return " ".join(("one treatment of the same compressed model.", *described))


def title(run: Run) -> str:
    """Return the model and the data in one line."""
    model, data = section(run.manifest, "model"), section(run.manifest, "data")
    return f"{_recorded_text(model.get('name'))} on {_recorded_text(data.get('name'))}"


def data_facts(run: Run) -> Facts:
    """Return the first lines of a report: model, data, numbers of rows, seeds, tasks."""
    data, model = section(run.manifest, "data"), section(run.manifest, "model")
    rows = ", ".join(
        f"{_recorded_text(data.get(f'{split}_rows'))} {split}" for split in ("train", "validation", "test")
    )
    tasks = data.get("tasks") or list(dict.fromkeys(next(iter(run.documents.values())).tasks))
    seeds = ", ".join(map(str, sorted({row.seed for row in run.rows})))
    return (
        ("Model", _with_note(_recorded_text(model.get("name")), model.get("note"))),
        ("Data", _with_note(f"{_recorded_text(data.get('name'))}, {len(tasks)} tasks", data.get("note"))),
        ("Rows", f"{rows}; dropped as too long: {_recorded_text(data.get('dropped_rows'))}"),
        *_plain_text(data),
        ("Scored", f"{run.rows[0].documents:,} test documents, {run.rows[0].scored_tokens:,} tokens"),
        ("Seeds", f"data {_recorded_text(run.spec.get('seed'))}; training {seeds}"),
        ("Tasks", ", ".join(map(str, tasks))),
    )


def _plain_text(data: Mapping[str, Any]) -> Facts:
    uses = {"text": "scored; no arm was trained on it", "train_text": "among the training rows, as a task of its own"}
    texts = {name: section(data, name) for name in uses}
    return tuple(
        ("Plain text", f"{text.get('windows')} windows of {text.get('name')}: {uses[name]}")
        for name, text in texts.items()
        if text
    )


def protocol_facts(run: Run) -> Facts:
    """Return everything else that the manifest records, in reading order."""
    manifest = run.manifest
    model, data, calibration = (section(manifest, name) for name in ("model", "data", "calibration"))
    dirty = manifest.get("dirty")
    changes = " with uncommitted changes" if dirty is True else "" if dirty is False else " (changes: not recorded)"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(section(manifest, "versions").items()))
    seconds = manifest.get("seconds")
    return (
        *(
            (f"Protocol {number}", str(sentence))
            for number, sentence in enumerate(_sentences(manifest.get("protocol")), start=1)
        ),
        ("Model weights", f"{_recorded_text(model.get('weights'))}; sha256 {_recorded_text(model.get('sha256'))}"),
        ("Data", f"sha256 {_recorded_text(data.get('sha256'))}; template {_recorded_text(data.get('template'))}"),
        (
            "Calibration",
            f"{_recorded_text(calibration.get('source'))}; {_recorded_text(calibration.get('samples'))} samples of "
            f"{_recorded_text(calibration.get('length'))} tokens; sha256 {_recorded_text(calibration.get('sha256'))}",
        ),
        ("Commit", _recorded_text(manifest.get("commit")) + (changes if manifest.get("commit") else "")),
        ("Versions", versions or UNKNOWN),
        ("Device", f"{_recorded_text(manifest.get('device'))}; threads: {_recorded_text(manifest.get('threads'))}"),
        ("Started", _recorded_text(manifest.get("started"))),
        ("Finished", _recorded_text(manifest.get("finished"))),
        ("Duration", duration(float(seconds)) if isinstance(seconds, int | float) else UNKNOWN),
    )


def command(manifest: Mapping[str, Any]) -> str | None:
    """Return the command line that repeats the run, or None when it was not recorded."""
    recorded = manifest.get("command")
    if isinstance(recorded, list):
        return shlex.join(map(str, recorded))
    return str(recorded) if recorded else None


def recipe_text(manifest: Mapping[str, Any]) -> str:
    """Return the resolved recipe as indented JSON, which is YAML too."""
    recipe = section(manifest, "recipe")
    return json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else UNKNOWN


def _sentences(recorded: Any) -> Sequence[Any]:
    return recorded if isinstance(recorded, list) and recorded else [recorded or UNKNOWN]


def _recorded_text(value: Any) -> str:
    if value is None or value == "":
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _with_note(text: str, note: Any) -> str:
    return f"{text} ({note})" if note else text
