"""Output folders that appear whole or not at all, with a manifest of what is in them.

A folder is built beside its target and renamed into place. `manifest.json`, with the SHA-256 of every file, is written
last: a folder without a manifest is not finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopcompress.errors import DataError, OutputError, StorageError

MANIFEST = "manifest.json"


@contextmanager
def publish(target: Path, metadata: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a scratch folder, which becomes `target` when the block ends; after an error nothing is left.

    The manifest holds `metadata` as it is when the block ends: the block may still add to it.
    Raises `OutputError` when `target` exists or cannot be created, `StorageError` when writing fails.
    """
    if target.exists():
        raise OutputError(f"output {target} exists already; remove it or name another --output-dir")
    scratch = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
    except OSError as error:
        raise OutputError(f"output {target} cannot be created: {error.strerror}; name another --output-dir") from error
    try:
        yield scratch
        files = {path.relative_to(scratch).as_posix(): path for path in sorted(scratch.rglob("*")) if path.is_file()}
        manifest = {**metadata, "files": {name: sha256_file(path) for name, path in files.items()}}
        write_atomically(scratch / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        scratch.rename(target)
    except OSError as error:
        raise StorageError(f"writing {target} failed: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def being_built(folder: Path) -> bool:
    """Return True for a scratch folder whose process still runs here; on Windows for every scratch folder."""
    _, partial, process = folder.name.rpartition(".partial-")
    if not partial or not process.isdecimal():
        return False
    if os.name == "nt":  # os.kill(process, 0) sends Ctrl-C on Windows, so every such folder counts as in use
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        pass
    return True


def job_folder(target: Path) -> Path:
    """Return the folder of the resumable work that is to become `target`."""
    return target.parent / f".{target.name}.unfinished"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of `folder`, which is made if need be. Raises `OutputError` when one is in it."""
    from filelock import FileLock, Timeout  # a tenth of a second to import: only commands that write pay

    lock = FileLock(folder / "LOCK", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"output {folder} is in use by another run; wait for it or name another") from error
    except OSError as error:
        raise OutputError(f"output {folder} cannot be created: {error.strerror}; name another --output-dir") from error
    try:
        yield
    finally:
        lock.release()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished folder, or None when it has none. Raises `DataError` when it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a JSON object ({error}); make the folder again") from error


def verify(folder: Path) -> None:
    """Compare every file of a finished folder with its hash. Raises `DataError` at the first difference."""
    manifest = read_manifest(folder) or {}
    if "files" not in manifest:
        raise DataError(
            f"{folder} has no {MANIFEST} with hashes: it is not a finished mopcompress folder; make it again"
        )
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            raise DataError(f"{path} is missing or differs from its hash in {MANIFEST}; make the folder again")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, and flush them to the disk: a reader sees the old file or the new one.

    Raises `OSError` when that fails; the old file is still there then.
    """
    content = data.encode() if isinstance(data, str) else data
    with replaced_atomically(path) as scratch, scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a scratch file, which replaces `path` when the block ends without an error.

    It serves files that are too large to be in memory at once, or that carry their own checksums: the block itself
    decides whether they are flushed to the disk.
    """
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return a short hash of settings that JSON can hold; their order does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name the fields that differ between two trees of settings, by dotted name and with both values."""
    old_fields, new_fields = _flat(old), _flat(new)
    return [
        f"{name} was {old_fields.get(name)!r}, is {new_fields.get(name)!r}"
        for name in sorted(old_fields.keys() | new_fields.keys())
        if old_fields.get(name) != new_fields.get(name)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
