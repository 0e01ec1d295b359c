"""The data of a run, encoded: which rows take part, and what was left out."""

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mopcompress.data.columns import NO_TASK
from mopcompress.data.encoding import Document, encode, template_name
from mopcompress.data.examples import load_examples
from mopcompress.data.splits import Example, Splits, subset
from mopcompress.data.text_windows import read_text, text_windows
from mopcompress.errors import DataError
from mopcompress.recipe import RunSpec

TEXT_TOKENS, TEXT_CONTEXT = 256, 32  # of a window of plain text; the context is what a gate reads
TEXT_TASK = "plain text"


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded splits, and windows of plain text if there are any. `facts` is what a report says of them.

    `train` holds the windows that are trained on, too, as rows of one more task. `tasks` are those of `train`; none
    where no row names one.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    text: tuple[Document, ...]
    tasks: tuple[str, ...]
    facts: dict[str, Any]


def load_dataset(run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> EncodedDataset:
    """Load, encode and thin the splits that `run` names; the rows depend on `run.seed` alone.

    Raises `DataError` when a task of the test split has no training rows.
    """
    splits = load_examples(run.data, rename=run.columns, seed=run.seed)
    return encode_splits(splits, run, tokenizer)


def encode_splits(splits: Splits, run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> EncodedDataset:
    """Encode and thin splits that are loaded already."""
    limits = {"train": run.train_rows, "validation": run.validation_rows, "test": run.test_rows}
    kept: dict[str, tuple[Document, ...]] = {}
    dropped = passed_over = 0
    for name, count in limits.items():
        kept[name], too_long, not_chosen = _thinned(getattr(splits, name), count, run, tokenizer)
        dropped, passed_over = dropped + too_long, passed_over + not_chosen
        if not kept[name] and name != "validation":
            raise DataError(
                f"data {run.data}: no {name} row of at most {run.skip_rows_longer_than} tokens; raise --longest-row, "
                "or leave it out"
            )
    tasks = tuple(sorted({document.task for document in kept["train"]}))
    strangers = {document.task for document in kept["test"]} - set(tasks)
    if strangers:
        raise DataError(
            f"data {run.data}: the test rows have tasks that no training row has ({', '.join(sorted(strangers))}); "
            "raise --train-rows, or leave those rows out"
        )
    scored = [document.tokens[document.context_tokens :] for document in kept["test"]]
    facts = {
        "name": splits.name,
        "sha256": splits.sha256,
        "tasks": list(tasks),
        **{f"{name}_rows": len(documents) for name, documents in kept.items()},
        "dropped_rows": dropped,  # over --max-length, of the rows that were looked at
        "passed_over_rows": passed_over,  # over --longest-row, before the last row that was taken
        "tasks_without_rows": sorted({example.task for example in splits.train} - set(tasks)),
        "scored_tokens": sum(map(len, scored)),
        "scored_sha256": _digest(scored),
        "template": template_name(tokenizer),
    }
    longest = min(TEXT_TOKENS, run.skip_rows_longer_than or run.max_length)
    trained = _windows("train_text", run.train_text, run.train_text_samples, longest, tokenizer)
    scored_text = _windows("text", run.eval_text, run.eval_text_samples, TEXT_TOKENS, tokenizer)
    for name, source, windows in (("text", run.eval_text, scored_text), ("train_text", run.train_text, trained)):
        if windows:
            facts[name] = {"name": source, "windows": len(windows), "sha256": _digest([one.tokens for one in windows])}
    if trained and TEXT_TASK in tasks:
        raise DataError(
            f"data {run.data}: rows have the task {TEXT_TASK!r}, that of the windows of --train-text; name it otherwise"
        )
    if trained:
        kept["train"], tasks = (*kept["train"], *trained), tuple(sorted({*tasks, TEXT_TASK}))
    if tasks == (NO_TASK,):
        tasks = ()
    return EncodedDataset(**kept, text=scored_text, tasks=tasks, facts=facts)


def _windows(
    field: str, source: str | None, samples: int, length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Document, ...]:
    """Windows of plain text: the first tokens stand for an instruction, the others for its response."""
    if source is None:
        return ()
    flag = f"--{field.replace('_', '-')}"
    windows = text_windows(
        read_text(source), tokenizer, samples=samples, length=length, what=f"text of {flag}", flags=f"{flag}-samples"
    )
    return tuple(Document(TEXT_TASK, tuple(window), min(TEXT_CONTEXT, length // 2)) for window in windows.tolist())


def _digest(tokens: list[tuple[int, ...]]) -> str:
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]


def _thinned(
    examples: tuple[Example, ...], count: int | None, run: RunSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Document, ...], int, int]:
    """`count` encoded rows in the balanced order of `subset`; how many were dropped as too long; and passed over.

    Rows are passed over as they come: a set of a million rows is not encoded to use a hundred.
    """
    order = subset(examples, len(examples) if count is not None else None, seed=run.seed)
    wanted = len(order) if count is None else count
    kept: list[Document] = []
    dropped = passed_over = start = 0
    while start < len(order) and len(kept) < wanted:
        some = order[start : start + max(256, wanted)]
        start += len(some)
        encoded = encode(some, tokenizer, max_length=run.max_length)
        dropped += encoded.dropped
        for document in encoded.documents:
            if len(kept) == wanted:
                break
            if run.skip_rows_longer_than is not None and len(document.tokens) > run.skip_rows_longer_than:
                passed_over += 1
            else:
                kept.append(document)
    return tuple(kept), dropped, passed_over
