"""Checkpoints of a compression, so that it can be interrupted anywhere and resumed.

The folder `.NAME.unfinished` beside the output holds a copy of the source's weight files, in which compressed blocks
replace the dense ones, and the hidden states that enter the next block. A block counts as finished when its
`block-*.json` exists, which is written last and atomically. Only a job with the same source, tokens, settings and
versions resumes it, and it gives the very same numbers.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.compress.sequential import BlockInputs, CompressedBlock, LayerRow
from mopcompress.errors import StorageError
from mopcompress.models.repair import RepairsByName, repairs_from_tensors, repairs_to_tensors
from mopcompress.models.safetensors_io import TensorLocation, overwrite, stored_hash, tensor_crc32
from mopcompress.models.weight_files import INDEX, weight_files
from mopcompress.storage import artifacts
from mopcompress.storage.resume import clear_job, has_job, resumable_job, write_job

_SCALES = ".scales"  # after a linear's name
SUFFIX = ".unfinished"  # of the weight files, so that nothing reads them as a finished model


@contextmanager
def resumable_compression(
    target: Path,
    source: Path,
    job: Mapping[str, Any],
    locations: Mapping[str, TensorLocation],
    log: Callable[[str], None],
    *,
    restart_on_mismatch: bool = False,
) -> Iterator["CompressionCheckpoint"]:
    """Yield the checkpoint of the compression that is to become `target`: resumed, or started.

    `job` holds all that the result depends on, and the `device`; `locations` are the places of the source's tensors.
    The folder is removed when the block ends without an error. Raises `OutputError` as `resumable_job` does, which
    explains `restart_on_mismatch`.
    """
    with resumable_job(target, job, log, restart_on_mismatch=restart_on_mismatch) as folder:
        yield CompressionCheckpoint(folder, source, job, locations, log)


class CompressionCheckpoint:
    """The finished blocks of a compression: their number is `blocks_done`, and `hidden` enters the next block."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        job: Mapping[str, Any],
        locations: Mapping[str, TensorLocation],
        log: Callable[[str], None],
    ) -> None:
        """Resume the job in `folder`, or start it when there is none or when its files are damaged."""
        self._folder = folder
        self._locations = {name: replace(location, file=location.file + SUFFIX) for name, location in locations.items()}
        self.rows: list[LayerRow] = []
        self.scales: dict[str, Tensor] = {}
        self.repairs: dict[str, LowRankFactors] = {}
        self.seconds = 0.0
        self.blocks_done, self.hidden = 0, BlockInputs()
        self._source, self._changed = source, set[str]()
        if not has_job(folder):
            self._start(job)
        elif not self._resume(job["device"]):
            log(f"{folder} is damaged: beginning again")
            self._start(job)
        elif self.blocks_done:
            log(f"going on after {self.blocks_done} finished blocks, from {folder}")

    def save_block(self, index: int, block: CompressedBlock, stored: Mapping[str, Tensor], seconds: float) -> None:
        """Write the results of a block, whole or not at all; `stored` are its weights, as in the weight files.

        Raises `StorageError` when writing fails.
        """
        try:
            hashes = {name: overwrite(self._folder, self._locations[name], tensor) for name, tensor in stored.items()}
            states, extras = _state_tensors(block.outputs), _extra_tensors(block)
            _save_atomically(states, self._folder / _states_file(index))
            _save_atomically(extras, self._folder / _extras_file(index))
            record = {
                "rows": [asdict(row) for row in block.rows],
                "seconds": seconds,
                "tensors": hashes,
                "states": _checksums(states),
                "beside": _checksums(extras),
            }
            artifacts.write_atomically(self._folder / _block_file(index), json.dumps(record))
        except OSError as error:
            raise StorageError(f"writing {self._folder} failed: {error}; free some space and run again") from error
        (self._folder / _states_file(index - 1)).unlink(missing_ok=True)
        self._add(block.rows, block.scales, block.repairs, seconds)
        self._changed |= stored.keys()
        self.blocks_done, self.hidden = index + 1, block.outputs

    def publish_weights(self, folder: Path) -> None:
        """Put the weight files into the output folder, as hard links to the same bytes, or else as copies.

        Raises `StorageError` when a tensor that was not compressed differs from the source's.
        """
        for name, location in self._locations.items():
            in_source = replace(location, file=location.file.removesuffix(SUFFIX))
            if name in self._changed:
                continue
            if stored_hash(self._folder, location) != stored_hash(self._source, in_source):
                raise StorageError(f"{self._folder}: {name} was not copied whole; remove this folder and run again")
        for path in self._folder.glob(f"*{SUFFIX}"):
            target = folder / path.name.removesuffix(SUFFIX)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)

    def _start(self, job: Mapping[str, Any]) -> None:
        clear_job(self._folder)
        self.rows, self.scales, self.repairs, self._changed = [], {}, {}, set()
        self.seconds, self.blocks_done, self.hidden = 0.0, 0, BlockInputs()
        try:
            for path in [*weight_files(self._source), *self._source.glob(INDEX)]:
                shutil.copyfile(path, self._folder / f"{path.name}{SUFFIX}")
            write_job(job, self._folder)
        except OSError as error:
            raise StorageError(f"writing {self._folder} failed: {error}; free some space and run again") from error

    def _resume(self, device: str) -> bool:
        """Load the finished blocks; return False when a file differs from what was written."""
        try:
            while record := _read_json(self._folder / _block_file(self.blocks_done)):
                for name, expected in record["tensors"].items():
                    if stored_hash(self._folder, self._locations[name]) != expected:
                        return False
                extras = load_file(self._folder / _extras_file(self.blocks_done))
                if _checksums(extras) != record["beside"]:
                    return False
                scales, repairs = _split_extras(extras)
                self._add([LayerRow(**row) for row in record["rows"]], scales, repairs, record["seconds"])
                self._changed |= record["tensors"].keys()
                self.blocks_done += 1
                checksums = record["states"]
            if self.blocks_done:
                states = load_file(self._folder / _states_file(self.blocks_done - 1), device=device)
                if _checksums(states) != checksums:
                    return False
                self.hidden = BlockInputs(**states)
        except (OSError, StorageError, SafetensorError, KeyError, TypeError, ValueError):
            return False
        return True

    def _add(self, rows: list[LayerRow], scales: Mapping[str, Tensor], repairs: RepairsByName, seconds: float) -> None:
        self.rows += rows
        self.scales |= scales
        self.repairs |= repairs
        self.seconds += seconds


def _state_tensors(hidden: BlockInputs) -> dict[str, Tensor]:
    tensors = {"compressed": hidden.compressed, "dense": hidden.dense}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _extra_tensors(block: CompressedBlock) -> dict[str, Tensor]:
    """Return the tensors of a block that its weight files have no room for: scales and repairs."""
    return {f"{name}{_SCALES}": scales for name, scales in block.scales.items()} | repairs_to_tensors(block.repairs)


def _split_extras(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], RepairsByName]:
    scales = {name.removesuffix(_SCALES): tensor for name, tensor in tensors.items() if name.endswith(_SCALES)}
    return scales, repairs_from_tensors(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    )


def _block_file(index: int) -> str:
    return f"block-{index:05}.json"


def _states_file(index: int) -> str:
    return f"states-{index:05}.safetensors"


def _extras_file(index: int) -> str:
    return f"beside-{index:05}.safetensors"


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    with artifacts.replaced_atomically(path) as scratch:  # not flushed to the disk: checksums find what is lost
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor_crc32(tensor) for name, tensor in tensors.items()}
