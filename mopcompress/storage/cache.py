"""What is computed once for a model and rows and kept in the user's cache for other runs, arms, seeds and processes.

A folder each: whole or not there, hashed, named by all that its contents depend on. It only saves time: what cannot be
kept, for want of room or rights, is computed again.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from mopcompress.errors import DataError, OutputError, StorageError
from mopcompress.storage import artifacts

LIMIT = 16 * 2**30  # bytes of all folders; what was not used for longest goes first

T = TypeVar("T")


def cached(
    facts: Mapping[str, Any],
    *,
    size: int,
    write: Callable[[Path, dict[str, Any]], None],
    read: Callable[[Path], T],
    otherwise: Callable[[], T],
) -> T:
    """What `facts` describe: read, or first written, in about `size` bytes, into a folder with its manifest.

    `otherwise` makes it without a folder.
    """
    folder = cache_folder() / "states" / artifacts.fingerprint(dict(facts))
    if not is_intact(folder):
        try:
            _evict(folder.parent, size)
            manifest = dict(facts)
            with artifacts.publish(folder, manifest) as scratch:
                write(scratch, manifest)
        except (OSError, OutputError, StorageError, SafetensorError):
            if not is_intact(folder):  # it can be that another process was faster
                return otherwise()
    try:
        os.utime(folder, ns=(time.time_ns(),) * 2)  # the file system's own clock is too coarse to order two uses
        return read(folder)
    except OSError:  # another process made room, and took it away
        return otherwise()


def is_intact(folder: Path) -> bool:
    """Whether a folder is there and as it was written; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        artifacts.verify(folder)
    except (DataError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _evict(parent: Path, size: int) -> None:
    """Remove what was not used for longest until `size` more bytes fit. Raises `StorageError` when they never will."""
    if size > LIMIT:
        raise StorageError(f"{size} bytes are more than all that may be kept in {parent} ({LIMIT})")
    there = [path for path in parent.glob("*") if path.is_dir() and not artifacts.being_built(path)]
    folders = sorted(there, key=lambda path: path.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    for folder, freed in zip(folders, list(sizes), strict=True):
        if sum(sizes) + size <= LIMIT:
            break
        shutil.rmtree(folder, ignore_errors=True)
        sizes.remove(freed)


def cache_folder() -> Path:
    """Where converted models and sampled calibration text are kept: `$MOPCOMPRESS_CACHE`, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopcompress"
    return Path(os.environ.get("MOPCOMPRESS_CACHE") or default)
