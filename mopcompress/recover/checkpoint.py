"""A training so far, in a folder beside its output, so that it can be stopped anywhere and go on.

The folder `.NAME.unfinished` holds the last standing that was kept, in one file that is replaced whole, and the job it
belongs to: the same model, data, settings, versions and processes, which go on with the very same numbers. A sweep has
a standing for each of its rates there, and its finished trials.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mopcompress.errors import StorageError
from mopcompress.recover.adapter import Adapter, TrainRow
from mopcompress.storage.resume import resumable_job, write_job

INTERVAL_SECONDS = 20.0  # between two standings on disk: what a kill can cost


@dataclass
class TrainingState:
    """The adapter, AdamW's means, and the steps that are done."""

    adapter: Adapter
    optimiser: torch.optim.Optimizer
    rows: list[TrainRow] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Every number but the rows, by name: `adapter.NAME`, and `optimiser.PARAMETER.NAME` after the first step."""
        weights = {f"adapter.{name}": tensor.cpu() for name, tensor in self.adapter.state_dict().items()}
        means = {
            f"optimiser.{index}.{name}": tensor.cpu()
            for index, named in self.optimiser.state_dict()["state"].items()
            for name, tensor in named.items()
        }
        return weights | means

    def restore(self, tensors: dict[str, Tensor], rows: list[TrainRow]) -> None:
        """Take the place, in place, of a standing whose `tensors()` these were."""
        with torch.no_grad():
            for name, weight in self.adapter.state_dict().items():
                weight.copy_(tensors[f"adapter.{name}"])
        means: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, which = rest.partition(".")
                means.setdefault(int(index), {})[which] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": means})
        self.rows[:] = rows


@contextmanager
def resumable_training(
    target: Path, facts: Mapping[str, Any], tell: Callable[[str], None], *, begin_again: bool = False
) -> Iterator["CheckpointFolder"]:
    """The training that is to become `target`; its folder is removed when the block ends well, or could only end so.

    Raises `OutputError` as `resumable_job` does, which says what `begin_again` means.
    """
    with resumable_job(target, facts, tell, begin_again=begin_again) as folder:
        write_job(facts, folder)
        yield CheckpointFolder(folder, tell)


@dataclass(frozen=True)
class CheckpointFolder:
    """What is kept of a training, or of a sweep of trainings."""

    folder: Path
    tell: Callable[[str], None]

    def at(self, learning_rate: float, steps: int) -> "TrainingCheckpoint":
        """The training with this rate and length."""
        return TrainingCheckpoint(self.folder / f"{steps}-steps-at-{learning_rate:.9g}.safetensors", self.tell)


class TrainingCheckpoint:
    """Keeps a standing in a file, at most every `INTERVAL_SECONDS`."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path, self._tell = path, tell
        self._kept = time.monotonic()

    def restore(self, standing: TrainingState) -> None:
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

    def keep(self, standing: TrainingState) -> None:
        """Write `standing` if the last one is old enough. Raises `StorageError` when that fails."""
        if time.monotonic() - self._kept < INTERVAL_SECONDS:
            return
        try:
            _write(self._path, standing)
        except OSError as error:
            raise StorageError(f"writing {self._path} failed: {error}; free some space and run again") from error
        self._kept = time.monotonic()


def _write(path: Path, standing: TrainingState) -> None:
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


@runtime_checkable  # so that the test run can check it
class Keeping(Protocol):
    """Keeps a training, so that it can be stopped anywhere and go on."""

    def restore(self, standing: TrainingState) -> None:
        """Bring `standing`, in place, to where the training stood; leave it alone when there was none."""
        ...

    def keep(self, standing: TrainingState) -> None:
        """Take note of it, or not yet."""
        ...
