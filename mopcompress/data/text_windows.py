"""Windows of tokens of plain text, for calibration or scoring: all full, none overlapping, in the order of the text."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mopcompress.data.encoding import Document
from mopcompress.data.sources import hub_splits, local_path, read_rows, read_utf8
from mopcompress.errors import DataError

CHARACTERS_PER_TOKEN = 32  # far more than any tokenizer of text needs
CALIBRATION, FLAGS = "calibration text", "--num-calibration-samples or --max-seq-length"  # their names in messages
MARGIN_TOKENS = 64  # near the end of a cut text, tokens can differ from those of the whole text


def text_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    what: str = CALIBRATION,
    flags: str = FLAGS,
) -> Int[Tensor, "samples length"]:
    """Return the first `samples` windows of `length` tokens of `text`, tokenized in one piece, without special tokens.

    Raises `DataError` when the text has fewer; the message calls the text `what` and names `flags` as those to lower.
    """
    needed = samples * length
    # a long text is not tokenized to its end: a beginning that almost always suffices is tried first
    beginning = text[: CHARACTERS_PER_TOKEN * needed]
    tokens = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < needed + MARGIN_TOKENS and len(beginning) < len(text):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _split_tokens(tokens, samples, length, what, flags)


def document_windows(documents: Sequence[Document], *, samples: int, length: int) -> Int[Tensor, "samples length"]:
    """Return windows of the tokens of documents, prompts and responses, joined with nothing between them.

    Raises `DataError` when there are too few tokens.
    """
    tokens = [token for document in documents for token in document.tokens]
    return _split_tokens(tokens, samples, length, CALIBRATION, FLAGS)


def _split_tokens(
    tokens: Sequence[int], samples: int, length: int, what: str, flags: str
) -> Int[Tensor, "samples length"]:
    available = len(tokens) // length
    if available < samples:
        raise DataError(
            f"the {what} has {available} window(s) of {length} tokens ({len(tokens)} tokens), "
            f"{samples} are needed; give more text, or lower {flags}"
        )
    return torch.tensor(tokens[: samples * length], dtype=torch.long).view(samples, length)


def read_text(source: str) -> str:
    """Read a UTF-8 .txt file, or the `text` column of a table or a hub data set, joined by blank lines.

    A hub data set gives its train split, or the only one; `id:configuration` chooses a configuration. Raises
    `InputNotFoundError`, `DataError`, or `UnavailableError` when the hub does not give the data set.
    """
    path = local_path(source)
    if path is not None and path.suffix == ".txt":
        text = read_utf8(path)
    elif path is not None:
        text = "\n\n".join(_text_column(row.where, row.fields) for row in read_rows(path))
    else:
        splits = hub_splits(source)
        if "train" not in splits and len(splits) != 1:
            raise DataError(
                f"{source}: no split is called train; the splits are {', '.join(splits)}; download the one to use"
            )
        rows = splits.get("train", next(iter(splits.values())))
        text = "\n\n".join(_text_column(f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))
    if not text.strip():
        raise DataError(f"{source}: there is no text in it; give a file with some")
    return text


def _text_column(where: str, fields: Mapping[str, object]) -> str:
    value = fields.get("text")
    if not isinstance(value, str):
        raise DataError(
            f"{where}: no string in a column 'text'; the columns are {', '.join(fields) or 'none'}; rename one"
        )
    return value
