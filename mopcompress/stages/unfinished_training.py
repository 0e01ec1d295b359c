"""A training so far, in a folder beside its output, so that it can be stopped anywhere and go on.

The folder `.NAME.unfinished` holds the last standing that was kept, in one file that is replaced whole, and the job it
belongs to: the same model, data, settings, versions and processes, which go on with the very same numbers. A sweep has
a standing for each of its rates there, and its finished trials.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mopcompress import artifact
from mopcompress.errors import DataError, NumericalError, OutputError, StorageError, UsageError
from mopcompress.recover.standing import Standing, TrainRow
from mopcompress.stages.manifest import differences

JOB = "job.json"
SECONDS = 20.0  # between two standings on disk: what a kill can cost


@contextmanager
def unfinished_training(
    target: Path, facts: Mapping[str, Any], tell: Callable[[str], None], *, begin_again: bool = False
) -> Iterator["UnfinishedTraining"]:
    """The training that is to become `target`; its folder is removed when the block ends well, or could only end so.

    Raises `OutputError` when another process works on it, or when the folder holds another job, unless that is to
    `begin_again`.
    """
    folder = artifact.unfinished_folder(target)
    with artifact.locked(folder):
        job = json.loads(json.dumps(facts))
        if found := _differences(folder, job):
            if not begin_again:
                raise OutputError(
                    f"{folder} holds the unfinished work of another job ({found}); "
                    "run that command again to finish it, or remove the folder"
                )
            tell(f"{folder} holds a training that cannot go on here ({found}): beginning again")
            _clear(folder)
        try:
            artifact.write_whole(folder / JOB, json.dumps(job, indent=1))
            yield UnfinishedTraining(folder, tell)
        except (DataError, NumericalError, UsageError):
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


@dataclass(frozen=True)
class UnfinishedTraining:
    """What is kept of a training, or of a sweep of trainings."""

    folder: Path
    tell: Callable[[str], None]

    def at(self, learning_rate: float, steps: int) -> "KeptStanding":
        """The training with this rate and length."""
        return KeptStanding(self.folder / f"{steps}-steps-at-{learning_rate:.9g}.safetensors", self.tell)


class KeptStanding:
    """Keeps a standing in a file, at most every `SECONDS`."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        self._kept = time.monotonic()

    def restore(self, standing: Standing) -> None:
        """Bring `standing`, in place, to what the file holds; a damaged file is told of and not used."""
        if not self._path.exists():
            return
        try:
            tensors, rows = _read(self._path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            self._tell(f"{self._path} is damaged ({error}): beginning again")
            return
        standing.restore(tensors, rows)
        self._tell(f"going on after {len(rows)} finished steps, from {self._path.parent}")

    def keep(self, standing: Standing) -> None:
        """Write `standing` if the last one is old enough. Raises `StorageError` when that fails."""
        if time.monotonic() - self._kept < SECONDS:
            return
        try:
            _write(self._path, standing)
        except OSError as error:
            raise StorageError(f"writing {self._path} failed: {error}; free some space and run again") from error
        self._kept = time.monotonic()


def _differences(folder: Path, job: dict[str, Any]) -> str:
    """What the job in the folder has that this one has not; nothing without one."""
    path = folder / JOB
    return "; ".join(differences(json.loads(path.read_text(encoding="utf-8")), job)) if path.exists() else ""


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "LOCK":
            path.unlink()


def _write(path: Path, standing: Standing) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in standing.tensors().items()}
    rows = json.dumps([asdict(row) for row in standing.rows])
    # through memory: only the bytes that were meant can tell later whether the file still has them
    whole = save(tensors, {"rows": rows, "crc32": str(_checksum(tensors, rows))})
    scratch = path.with_suffix(".partial")
    scratch.write_bytes(whole)
    scratch.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], list[TrainRow]]:
    """Raises `ValueError`, or what safetensors raises, when the file is not as it was written."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    if int(metadata["crc32"]) != _checksum(tensors, metadata["rows"]):
        raise ValueError("its checksum is wrong")
    return tensors, [TrainRow(**row) for row in json.loads(metadata["rows"])]


def _checksum(tensors: Mapping[str, Tensor], rows: str) -> int:
    checksum = zlib.crc32(rows.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().tobytes(), checksum)
    return checksum
