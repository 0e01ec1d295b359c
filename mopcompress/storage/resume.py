"""Work that can be stopped and gone on with: a folder beside its output, and the job that it belongs to."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopcompress.errors import DataError, NumericalError, OutputError, UsageError
from mopcompress.storage import artifacts
from mopcompress.storage.artifacts import differences

FILE = "job.json"
MOST_DIFFERENCES = 6  # differences of two jobs; others are counted


@contextmanager
def resumable_job(
    target: Path, facts: Mapping[str, Any], tell: Callable[[str], None], *, begin_again: bool
) -> Iterator[Path]:
    """The folder, `.NAME.unfinished`, of the work that is to become `target`: with work on this very job, or none.

    It is removed when the block ends well, and when it ends with an error that would come again. Raises `OutputError`
    when another process works there, or when the work is another job's, unless the block is to `begin_again` then.
    """
    folder = artifacts.job_folder(target)
    with artifacts.locked(folder):
        if found := _differences(folder, facts):
            if not begin_again:
                raise OutputError(
                    f"{folder} holds the unfinished work of another job ({found}); "
                    "finish it with that command, as it was then, or remove the folder"
                )
            tell(f"{folder} holds work that cannot go on here ({found}): beginning again")
            clear_job(folder)
        try:
            yield folder
        except (DataError, NumericalError, UsageError):
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def has_job(folder: Path) -> bool:
    """Whether work on the job is there."""
    return (folder / FILE).exists()


def write_job(facts: Mapping[str, Any], folder: Path) -> None:
    """From now on what lies in the folder is work on this job."""
    artifacts.write_atomically(folder / FILE, json.dumps(facts, indent=1))


def clear_job(folder: Path) -> None:
    """Remove the work, so that it can begin again."""
    for path in folder.iterdir():
        if path.name != "LOCK":
            path.unlink()


def _differences(folder: Path, facts: Mapping[str, Any]) -> str:
    """What the work that is there has another of than `facts`, the first few in words; nothing without work."""
    if not has_job(folder):
        return ""
    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return f"{FILE} is damaged"
    found = differences(before, json.loads(json.dumps(facts)))
    more = [f"and {len(found) - MOST_DIFFERENCES} more"] if len(found) > MOST_DIFFERENCES else []
    return "; ".join([*found[:MOST_DIFFERENCES], *more])
