"""Checkpoints of a training, so that it can be interrupted anywhere and resumed.

The folder `.NAME.unfinished` beside the output holds the latest state of the training, in one file that is replaced
whole, and the job that it belongs to. Only the same model, data, settings, versions and number of processes resume it,
and they give the very same numbers. A sweep has a file per learning rate there, and its finished trials.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mopcompress.errors import StorageError
from mopcompress.models.safetensors_io import tensor_crc32
from mopcompress.recover.adapter import Adapter, TrainRow
from mopcompress.storage.artifacts import replaced_atomically
from mopcompress.storage.resume import resumable_job, write_job

INTERVAL_SECONDS = 20.0  # between two checkpoints: what a kill can cost

# Checkpoint files keep the names that they were first written with.
ROW_FIELDS_ON_DISK = {"nll": "nats"}  # name in the code -> name on disk
OPTIMIZER_ON_DISK = "optimiser"


@dataclass
class TrainingState:
    """A training so far: the adapter, AdamW's moments, and a row per finished step."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    rows: list[TrainRow] = field(default_factory=list)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor, on the CPU: `adapter.NAME`, and `optimiser.PARAMETER.NAME` after the first step.

        `PARAMETER` is the index that the optimizer gives a parameter.
        """
        weights = {f"adapter.{name}": tensor.cpu() for name, tensor in self.adapter.state_dict().items()}
        moments = {
            f"{OPTIMIZER_ON_DISK}.{index}.{name}": tensor.cpu()
            for index, tensors in self.optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
        }
        return weights | moments

    def load_state_dict(self, tensors: Mapping[str, Tensor], rows: list[TrainRow]) -> None:
        """Take over, in place, the tensors of another state's `state_dict()`, and its rows."""
        with torch.no_grad():
            for name, weight in self.adapter.state_dict().items():
                weight.copy_(tensors[f"adapter.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == OPTIMIZER_ON_DISK:
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.rows[:] = rows


@contextmanager
def resumable_training(
    target: Path, job: Mapping[str, Any], log: Callable[[str], None], *, restart_on_mismatch: bool = False
) -> Iterator["CheckpointFolder"]:
    """Yield the checkpoints of the training that is to become `target`, as `resumable_job` yields their folder.

    `job` holds all that the training's numbers depend on. Raises `OutputError` as `resumable_job` does.
    """
    with resumable_job(target, job, log, restart_on_mismatch=restart_on_mismatch) as folder:
        write_job(job, folder)
        yield CheckpointFolder(folder, log)


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a training, or of all trainings of a sweep."""

    folder: Path
    log: Callable[[str], None]

    def for_run(self, learning_rate: float, steps: int) -> "TrainingCheckpoint":
        """Return the checkpoint of the training with this learning rate and length."""
        return TrainingCheckpoint(self.folder / f"{steps}-steps-at-{learning_rate:.9g}.safetensors", self.log)


class TrainingCheckpoint:
    """The file of one training's state, written at most every `INTERVAL_SECONDS`."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._path, self._log = path, log
        self._saved_at = time.monotonic()

    def load_into(self, state: TrainingState) -> None:
        """Bring `state`, in place, to the one in the file, if there is one. A damaged file is logged and not used."""
        if not self._path.exists():
            return
        try:
            tensors, rows = _read(self._path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            self._log(f"{self._path} is damaged ({error}): beginning again")
            return
        state.load_state_dict(tensors, rows)
        self._log(f"going on after {len(rows)} finished steps, from {self._path.parent}")

    def save_if_due(self, state: TrainingState) -> None:
        """Write `state` if the file is old enough. Raises `StorageError` when writing fails."""
        if time.monotonic() - self._saved_at < INTERVAL_SECONDS:
            return
        try:
            _write(self._path, state)
        except OSError as error:
            raise StorageError(f"writing {self._path} failed: {error}; free some space and run again") from error
        self._saved_at = time.monotonic()


def _write(path: Path, state: TrainingState) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.state_dict().items()}
    rows = json.dumps([_row_to_disk(row) for row in state.rows])
    # through memory: only the bytes that were meant can show later whether the file still has them
    content = save(tensors, {"rows": rows, "crc32": str(_checksum(tensors, rows))})
    with replaced_atomically(path) as scratch:  # not flushed to the disk: the checksum finds what a crash lost
        scratch.write_bytes(content)


def _read(path: Path) -> tuple[dict[str, Tensor], list[TrainRow]]:
    """Return a file's tensors and rows. Raises `ValueError`, or safetensors' own errors, for a damaged file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata()
    if int(metadata["crc32"]) != _checksum(tensors, metadata["rows"]):
        raise ValueError("its checksum is wrong")
    return tensors, [_row_from_disk(fields) for fields in json.loads(metadata["rows"])]


def _row_to_disk(row: TrainRow) -> dict[str, Any]:
    return {ROW_FIELDS_ON_DISK.get(name, name): value for name, value in asdict(row).items()}


def _row_from_disk(fields: Mapping[str, Any]) -> TrainRow:
    in_code = {stored: name for name, stored in ROW_FIELDS_ON_DISK.items()}
    return TrainRow(**{in_code.get(name, name): value for name, value in fields.items()})


def _checksum(tensors: Mapping[str, Tensor], rows: str) -> int:
    checksum = zlib.crc32(rows.encode())
    for name in sorted(tensors):
        checksum = tensor_crc32(tensors[name], checksum)
    return checksum
