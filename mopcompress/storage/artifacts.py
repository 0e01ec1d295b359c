"""Output folders appear whole or not at all, and know what is in them.

A folder is built beside its target and renamed into place; `manifest.json`, with the SHA-256 of every file, is written
last. A folder without a manifest is not finished.
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
def publish(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a scratch folder that becomes `target` when the block ends without an error; on an error nothing stays.

    `facts` may still be changed inside the block: they are written to the manifest when it ends.
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
        manifest = {**facts, "files": {name: sha256_file(path) for name, path in files.items()}}
        write_atomically(scratch / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        scratch.rename(target)
    except OSError as error:
        raise StorageError(f"writing {target} failed: {error}; free some space and run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def being_built(folder: Path) -> bool:
    """Whether it is the scratch folder of a process that still lives on this machine."""
    _, partial, process = folder.name.rpartition(".partial-")
    if not partial or not process.isdecimal():
        return False
    if os.name == "nt":  # there os.kill(process, 0) sends Ctrl-C, so every such folder counts as in use
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def job_folder(target: Path) -> Path:
    """Where work on `target` lies that can be gone on with."""
    return target.parent / f".{target.name}.unfinished"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and keep every other process out. Raises `OutputError` when one is in it."""
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
    """The manifest of a finished folder; None when there is none. Raises `DataError` when it is damaged."""
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


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A short hash of JSON-able settings, equal for equal settings whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The fields that differ between two trees of settings, by dotted name, each with both values."""
    old, new = _flat(before), _flat(after)
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
