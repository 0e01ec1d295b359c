"""The encoded data of a run: its rows after filtering, and counts of the rows that were left out."""

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

TEXT_TOKENS, TEXT_CONTEXT = 256, 32  # per window of plain text; a gate reads the context
TEXT_TASK = "plain text"


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded splits, and windows of plain text if there are any.

    `train` includes the windows of training text, as rows of one more task.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    text: tuple[Document, ...]  # windows of plain text that are only scored
    tasks: tuple[str, ...]  # of `train`, sorted; empty when no row names a task
    facts: dict[str, Any]  # names, counts and hashes for the manifest and the report


def load_dataset(run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> EncodedDataset:
    """Load, encode and thin the splits that `run` names; the rows depend on `run.seed` alone.

    Raises `DataError` when a task of the test split has no training rows, or a split has no row that is short enough.
    """
    splits = load_examples(run.data, rename=run.columns, seed=run.seed)
    return encode_splits(splits, run, tokenizer)


def encode_splits(splits: Splits, run: RunSpec, tokenizer: PreTrainedTokenizerBase) -> EncodedDataset:
    """Encode and thin splits that are loaded already. Raises `DataError` as `load_dataset` does."""
    documents, dropped, passed_over = _thin_splits(splits, run, tokenizer)
    tasks = tuple(sorted({document.task for document in documents["train"]}))
    _check_tasks(documents, tasks, run)
    responses = [document.tokens[document.context_tokens :] for document in documents["test"]]
    facts = {
        "name": splits.name,
        "sha256": splits.sha256,
        "tasks": list(tasks),
        **{f"{split}_rows": len(rows) for split, rows in documents.items()},
        "dropped_rows": dropped,  # longer than `max_length`, of the rows that were encoded
        "passed_over_rows": passed_over,  # longer than `skip_rows_longer_than`, before the last row that was taken
        "tasks_without_rows": sorted({example.task for example in splits.train} - set(tasks)),
        "scored_tokens": sum(map(len, responses)),
        "scored_sha256": _hash_tokens(responses),
        "template": template_name(tokenizer),
    }
    max_window = min(TEXT_TOKENS, run.skip_rows_longer_than or run.max_length)
    train_text = _window_documents("train_text", run.train_text, run.train_text_samples, max_window, tokenizer)
    text = _window_documents("eval_text", run.eval_text, run.eval_text_samples, TEXT_TOKENS, tokenizer)
    for name, source, windows in (("text", run.eval_text, text), ("train_text", run.train_text, train_text)):
        if windows:
            sha256 = _hash_tokens([window.tokens for window in windows])
            facts[name] = {"name": source, "windows": len(windows), "sha256": sha256}
    if train_text and TEXT_TASK in tasks:
        raise DataError(
            f"data {run.data}: rows have the task {TEXT_TASK!r}, which is that of the windows of training text "
            "(run.train_text); give the task of those rows another name"
        )
    if train_text:
        documents["train"], tasks = (*documents["train"], *train_text), tuple(sorted({*tasks, TEXT_TASK}))
    if tasks == (NO_TASK,):
        tasks = ()
    return EncodedDataset(**documents, text=text, tasks=tasks, facts=facts)


def _thin_splits(
    splits: Splits, run: RunSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, tuple[Document, ...]], int, int]:
    """Return the documents of each split, and over all splits the number of rows dropped and passed over."""
    counts = {"train": run.train_rows, "validation": run.validation_rows, "test": run.test_rows}
    documents: dict[str, tuple[Document, ...]] = {}
    dropped = passed_over = 0
    for split, count in counts.items():
        documents[split], too_long, skipped = _thin(getattr(splits, split), count, run, tokenizer)
        dropped, passed_over = dropped + too_long, passed_over + skipped
        if not documents[split] and split != "validation":
            raise DataError(
                f"data {run.data}: no {split} row of at most {run.skip_rows_longer_than} tokens; raise "
                "run.skip_rows_longer_than, or leave it out"
            )
    return documents, dropped, passed_over


def _check_tasks(documents: dict[str, tuple[Document, ...]], tasks: tuple[str, ...], run: RunSpec) -> None:
    """Raise `DataError` when a test row has a task that no training row has."""
    unseen = {document.task for document in documents["test"]} - set(tasks)
    if unseen:
        raise DataError(
            f"data {run.data}: the test rows have tasks that no training row has ({', '.join(sorted(unseen))}); "
            "raise --train-rows, or leave those rows out"
        )


def _window_documents(
    field: str, source: str | None, samples: int, length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Document, ...]:
    """Return windows of plain text as documents: the first tokens are the context, the others the response."""
    if source is None:
        return ()
    name = f"run.{field}"
    windows = text_windows(
        read_text(source), tokenizer, samples=samples, length=length, what=f"text of {name}", flags=f"{name}_samples"
    )
    return tuple(Document(TEXT_TASK, tuple(window), min(TEXT_CONTEXT, length // 2)) for window in windows.tolist())


def _hash_tokens(tokens: list[tuple[int, ...]]) -> str:
    return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]


def _thin(
    examples: tuple[Example, ...], count: int | None, run: RunSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Document, ...], int, int]:
    """Return `count` encoded rows in the balanced order of `subset`, and the numbers of rows dropped and passed over.

    A row over `max_length` is dropped, one over `skip_rows_longer_than` is passed over. Rows are encoded in chunks, so
    that a hundred rows of a million do not need a million encodings.
    """
    order = subset(examples, len(examples) if count is not None else None, seed=run.seed)
    target = len(order) if count is None else count
    documents: list[Document] = []
    dropped = passed_over = encoded_rows = 0
    while encoded_rows < len(order) and len(documents) < target:
        chunk = order[encoded_rows : encoded_rows + max(256, target)]
        encoded_rows += len(chunk)
        encoded = encode(chunk, tokenizer, max_length=run.max_length)
        dropped += encoded.dropped
        for document in encoded.documents:
            if len(documents) == target:
                break
            if run.skip_rows_longer_than is not None and len(document.tokens) > run.skip_rows_longer_than:
                passed_over += 1
            else:
                documents.append(document)
    return tuple(documents), dropped, passed_over
