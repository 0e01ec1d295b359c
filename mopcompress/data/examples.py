"""Examples of a data set that the user names, divided into splits."""

from collections.abc import Mapping
from pathlib import Path

from mopcompress.data.columns import check_rename, to_example
from mopcompress.data.sources import read_splits, short_name
from mopcompress.data.splits import Example, Splits, complete_splits, subset
from mopcompress.errors import DataError

__all__ = ["Example", "Splits", "load_examples", "subset"]


def load_examples(data: str, *, rename: Mapping[str, str], seed: int) -> Splits:
    """Load the examples of a data set, divided into train, validation and test splits.

    Args:
        data: `skills` (the built-in data set), a file (.jsonl, .json, .csv or .parquet), a folder with train,
            validation and test files, or a hub id; `id:configuration` chooses a configuration.
        rename: Columns of the data -> fields of an example, such as `{"question": "instruction"}`. Known layouts need
            none: `{}`.
        seed: Decides the rows that are held out when the data come in one piece, and generates `skills`.

    Returns:
        The splits with their name and the SHA-256 of their content. The same data and seed give the same splits.

    Raises:
        DataError: A row is damaged or lacks a column; the message names the file and the line.
        InputNotFoundError: A path does not exist.
        UnavailableError: The hub does not give the data set.

    Example:
        >>> import mopcompress
        >>> splits = mopcompress.load_examples("skills", rename={}, seed=0)
        >>> splits.train[0].task, len(splits.test) > 0
        ('...', True)
    """
    check_rename(rename)
    if data == "skills":
        if rename:
            raise DataError(
                f"the built-in data 'skills' have no columns to rename; leave out --columns {next(iter(rename))}=..."
            )
        from mopcompress.data.skills import generate

        return generate(seed)
    splits = {split: tuple(to_example(row, rename) for row in rows) for split, rows in read_splits(data).items()}
    path = Path(data).expanduser()
    return complete_splits(path.resolve().name if path.exists() else short_name(data), splits, seed=seed)
