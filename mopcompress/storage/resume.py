"""Work that can be interrupted and resumed: a folder beside its output, bound to one job.

`job.json` in that folder holds all that the numbers of the work depend on. Work is only resumed by the very same job.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopcompress.errors import DataError, NumericalError, OutputError, UsageError
from mopcompress.storage import artifacts

FILE = "job.json"
MOST_DIFFERENCES = 6  # differences of two jobs that a message names; it counts the others


@contextmanager
def resumable_job(
    target: Path, job: Mapping[str, Any], log: Callable[[str], None], *, restart_on_mismatch: bool
) -> Iterator[Path]:
    """Yield the folder `.NAME.unfinished` next to `target`: empty, or with earlier work of the same `job`.

    `job` holds the settings that the result depends on. The folder is deleted on success and after a `DataError`,
    `NumericalError` or `UsageError`; any other interruption leaves it for the next call. Raises `OutputError` when
    another process holds its lock, or when it belongs to another job and `restart_on_mismatch` is False.
    """
    folder = artifacts.job_folder(target)
    with artifacts.locked(folder):
        if mismatch := _describe_mismatch(folder, job):
            if not restart_on_mismatch:
                raise OutputError(
                    f"{folder} holds the unfinished work of another job ({mismatch}); "
                    "finish it with that command, as it was then, or remove the folder"
                )
            log(f"{folder} holds work that cannot go on here ({mismatch}): beginning again")
            clear_job(folder)
        try:
            yield folder
        except (DataError, NumericalError, UsageError):
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def has_job(folder: Path) -> bool:
    """Return True when the folder holds work of some job."""
    return (folder / FILE).exists()


def write_job(job: Mapping[str, Any], folder: Path) -> None:
    """Bind the folder's work, from now on, to `job`."""
    artifacts.write_atomically(folder / FILE, json.dumps(job, indent=1))


def clear_job(folder: Path) -> None:
    """Remove the work and its job, but not the lock."""
    for path in folder.iterdir():
        if path.name != "LOCK":
            path.unlink()


def _describe_mismatch(folder: Path, job: Mapping[str, Any]) -> str:
    """Name the first few differences between the folder's job and `job`; "" when there are none, or no work."""
    if not has_job(folder):
        return ""
    try:
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        return f"{FILE} is damaged"
    differences = artifacts.differences(stored, json.loads(json.dumps(job)))
    more = [f"and {len(differences) - MOST_DIFFERENCES} more"] if len(differences) > MOST_DIFFERENCES else []
    return "; ".join([*differences[:MOST_DIFFERENCES], *more])
