"""The data of a run: from what the user named to `Splits`."""

from collections.abc import Mapping
from pathlib import Path

from mopcompress.data.columns import check_rename, to_example
from mopcompress.data.sources import read_splits, short_name
from mopcompress.data.splits import Example, Splits, complete, subset
from mopcompress.errors import DataError

__all__ = ["Example", "Splits", "load_examples", "subset"]


def load_examples(data: str, *, rename: Mapping[str, str], seed: int) -> Splits:
    """Load `data`: the built-in `skills`, a file, a folder of train/validation/test files, or a hub id.

    `rename` maps the user's columns to ours (`{"question": "instruction"}`); `seed` decides what is held out when
    the data come in one piece. Raises `DataError` for bad rows (with file and line), `InputNotFoundError` for a path
    that is not there, `UnavailableError` when the hub cannot be asked.
    """
    check_rename(rename)
    if data == "skills":
        if rename:
            raise DataError(
                f"the built-in data 'skills' have no columns to rename; leave out --map {next(iter(rename))}=..."
            )
        from mopcompress.data.skills import generate

        return generate(seed)
    splits = {split: tuple(to_example(row, rename) for row in rows) for split, rows in read_splits(data).items()}
    path = Path(data).expanduser()
    return complete(path.resolve().name if path.exists() else short_name(data), splits, seed=seed)
