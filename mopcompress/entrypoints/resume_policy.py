"""The `--resume` policy: what every command does when its output, or a part of it, exists already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mopcompress.errors import InputNotFoundError, OutputError
from mopcompress.storage import artifacts


def read_finished(target: Path, resume: str, *, resumable: bool) -> dict[str, Any] | None:
    """Return the manifest of a finished `target`; None when the command has to run, from the start or not.

    `resume` is `auto`, `never` or `required`. `resumable` is true for a command that leaves its work in a job folder
    when it is interrupted. Raises `OutputError` when something is there that must not be used or replaced, and
    `InputNotFoundError` when nothing is there and `resume` is `required`.
    """
    manifest = artifacts.read_manifest(target) if target.is_dir() else None
    job = artifacts.job_folder(target)
    interrupted = resumable and job.exists()
    if resume == "required" and manifest is None and not interrupted:
        raise InputNotFoundError(f"--resume required: nothing finished in {target}; name its folder, or use auto")
    if resume == "never" and interrupted:
        raise OutputError(f"output {target} is begun in {job} and --resume is never; remove that or name another")
    if not target.exists():
        return None
    if resume == "never":
        raise OutputError(f"output {target} exists already and --resume is never; remove it or name another")
    if manifest is None:
        raise OutputError(f"output {target} exists already and holds no result of this; name another --output-dir")
    return manifest


def confirm_finished(target: Path, log: Callable[[str], None], *, same: bool) -> None:
    """Log that `target` is done already, after a comparison of its files with their hashes.

    Raises `OutputError` unless it is the `same` output as the one that is asked for, `DataError` when a file changed.
    """
    if not same:
        raise OutputError(f"output {target} exists already and is another thing; name another --output-dir")
    artifacts.verify(target)
    log(f"done already: {target}")
