"""The user's cache: results of a model on some rows, for other runs, arms, seeds and processes.

Every entry is a folder with hashes, whole or absent, named by a hash of all that its content depends on. The cache only
saves time: what cannot be written, for want of room or rights, is computed again.
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

LIMIT = 16 * 2**30  # bytes of all entries; the least recently used are removed first

T = TypeVar("T")


def cached(
    key: Mapping[str, Any],
    *,
    folder: str = "states",
    size: int,
    write: Callable[[Path, dict[str, Any]], None],
    read: Callable[[Path], T],
    compute: Callable[[], T],
) -> T:
    """Return the entry of `key`: read from a folder of its own in `folder`, which is written first when there is none.

    `write(path, manifest)` fills that with about `size` bytes, and may add to the manifest. `compute()` gives
    the same result without a folder; it runs when the folder cannot be written, or is removed before it is read.
    """
    entry = cache_folder() / folder / artifacts.fingerprint(key)
    if not is_intact(entry):
        try:
            _evict(entry.parent, size)
            manifest = dict(key)
            with artifacts.publish(entry, manifest) as scratch:
                write(scratch, manifest)
        except (OSError, OutputError, StorageError, SafetensorError):
            if not is_intact(entry):  # another process may have been faster
                return compute()
    try:
        os.utime(entry, ns=(time.time_ns(),) * 2)  # the file system's own clock is too coarse to order two uses
        return read(entry)
    except OSError:  # another process removed it to make room
        return compute()


def is_intact(folder: Path) -> bool:
    """Return True for an entry whose files have their hashes. A damaged entry is removed."""
    if not folder.exists():
        return False
    try:
        artifacts.verify(folder)
    except (DataError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _evict(parent: Path, size: int) -> None:
    """Remove the least recently used entries until `size` more bytes fit. Raises `StorageError` if they never will."""
    if size > LIMIT:
        raise StorageError(f"{size} bytes are more than all that may be kept in {parent} ({LIMIT})")
    entries = [path for path in parent.glob("*") if path.is_dir() and not artifacts.being_built(path)]
    folders = sorted(entries, key=lambda path: path.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    for folder, freed in zip(folders, list(sizes), strict=True):
        if sum(sizes) + size <= LIMIT:
            break
        shutil.rmtree(folder, ignore_errors=True)
        sizes.remove(freed)


def cache_folder() -> Path:
    """Return `$MOPCOMPRESS_CACHE`, or else `mopcompress` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopcompress"
    return Path(os.environ.get("MOPCOMPRESS_CACHE") or default)
