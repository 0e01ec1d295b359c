"""Windows of tokens to calibrate a compression on: all full, none overlapping, in the order of the text."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mopcompress.data.encoding import Document
from mopcompress.data.sources import hub_splits, local_path, read_rows, read_utf8
from mopcompress.errors import DataError

CHARACTERS_A_TOKEN = 32  # far more than any tokenizer of text needs
CALIBRATION, FLAGS = "calibration text", "--num-calibration-samples or --max-seq-length"  # as messages call them
MARGIN_TOKENS = 64  # where a text is cut, the tokens near the cut are not those of the whole text


def text_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    what: str = CALIBRATION,
    flags: str = FLAGS,
) -> Int[Tensor, "samples length"]:
    """The first `samples` windows of `length` tokens of `text`, tokenised in one piece, without special tokens.

    Raises `DataError`, in which the text is `what` and the flags to lower are `flags`, when the text has fewer.
    """
    wanted = samples * length
    # A long text is not tokenised to its end: a beginning that surely suffices is tried first.
    beginning = text[: CHARACTERS_A_TOKEN * wanted]
    tokens = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < wanted + MARGIN_TOKENS and len(beginning) < len(text):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _windows(tokens, samples, length, what, flags)


def document_windows(documents: Sequence[Document], *, samples: int, length: int) -> Int[Tensor, "samples length"]:
    """Windows of the documents' tokens, prompts and responses, one after another with nothing between.

    Raises `DataError` when there are too few.
    """
    tokens = [token for document in documents for token in document.tokens]
    return _windows(tokens, samples, length, CALIBRATION, FLAGS)


def _windows(tokens: Sequence[int], samples: int, length: int, what: str, flags: str) -> Int[Tensor, "samples length"]:
    there = len(tokens) // length
    if there < samples:
        raise DataError(
            f"the {what} has {there} window(s) of {length} tokens ({len(tokens)} tokens), "
            f"{samples} are wanted; give more text, or lower {flags}"
        )
    return torch.tensor(tokens[: samples * length], dtype=torch.long).view(samples, length)


def read_text(source: str) -> str:
    """The text of a UTF-8 .txt file, or the `text` column of a table or a hub data set, joined by blank lines.

    Of a hub data set it is the train split, or the only one; `id:configuration` chooses a configuration. Raises
    `InputNotFoundError`, `DataError`, or `UnavailableError` when the hub cannot be asked.
    """
    path = local_path(source)
    if path is not None and path.suffix == ".txt":
        text = read_utf8(path)
    elif path is not None:
        text = "\n\n".join(_text(row.where, row.fields) for row in read_rows(path))
    else:
        splits = hub_splits(source)
        if "train" not in splits and len(splits) != 1:
            raise DataError(
                f"{source}: no split is called train; the splits are {', '.join(splits)}; download the one to use"
            )
        rows = splits.get("train", next(iter(splits.values())))
        text = "\n\n".join(_text(f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))
    if not text.strip():
        raise DataError(f"{source}: there is no text in it; give a file with some")
    return text


def _text(where: str, fields: Mapping[str, object]) -> str:
    value = fields.get("text")
    if not isinstance(value, str):
        raise DataError(
            f"{where}: no string in a column 'text'; the columns are {', '.join(fields) or 'none'}; rename one"
        )
    return value
