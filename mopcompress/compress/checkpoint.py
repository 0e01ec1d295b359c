"""The work of a compression so far, in a folder beside its output, so that it can be stopped anywhere and go on.

The folder `.NAME.unfinished` holds a copy of the source's weight files, in which finished blocks have taken the place
of the dense ones, and the hidden states that enter the next block. A block counts as finished when its `block-*.json`
is there, which is written last and whole. A job is bound to its source, tokens, settings and versions, and goes on with
the very same numbers.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.compress.sequential import BlockInputs, CompressedBlock, LayerRow
from mopcompress.errors import StorageError
from mopcompress.models.repair import RepairsByName, repairs_from_tensors, repairs_to_tensors
from mopcompress.models.safetensors_io import TensorLocation, overwrite, stored_hash
from mopcompress.models.weight_files import INDEX, weight_files
from mopcompress.storage import artifacts
from mopcompress.storage.resume import clear_job, has_job, resumable_job, write_job

_SCALES = ".scales"  # after a linear's name
SUFFIX = ".unfinished"  # of the weight files, so that nobody takes them for finished ones


@contextmanager
def resumable_compression(
    target: Path,
    source: Path,
    facts: Mapping[str, Any],
    places: Mapping[str, TensorLocation],
    tell: Callable[[str], None],
    *,
    restart_on_mismatch: bool = False,
) -> Iterator["CompressionCheckpoint"]:
    """The job that is to become `target`, begun or gone on with; its folder is removed when the block ends well.

    Raises `OutputError` as `resumable_job` does, which explains `restart_on_mismatch`.
    """
    with resumable_job(target, facts, tell, restart_on_mismatch=restart_on_mismatch) as folder:
        yield CompressionCheckpoint(folder, source, facts, places, tell)


class CompressionCheckpoint:
    """`done` blocks are finished, and `hidden` enters the next one."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        facts: Mapping[str, Any],
        places: Mapping[str, TensorLocation],
        tell: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._places = {name: replace(place, file=place.file + SUFFIX) for name, place in places.items()}
        self.rows: list[LayerRow] = []
        self.scales: dict[str, Tensor] = {}
        self.repairs: dict[str, LowRankFactors] = {}
        self.seconds = 0.0
        self.done, self.hidden = 0, BlockInputs()
        self._source, self._changed = source, set[str]()
        if not has_job(folder):
            self._begin(facts)
        elif not self._go_on(facts["device"]):
            tell(f"{folder} is damaged: beginning again")
            self._begin(facts)
        elif self.done:
            tell(f"going on after {self.done} finished blocks, from {folder}")

    def finish(self, index: int, block: CompressedBlock, stored: Mapping[str, Tensor], seconds: float) -> None:
        """Write what came of a block, whole or not at all. Raises `StorageError` when that fails."""
        try:
            digests = {name: overwrite(self._folder, self._places[name], tensor) for name, tensor in stored.items()}
            states, beside = _streams(block.outputs), _beside(block)
            _save_whole(states, self._folder / _states(index))
            _save_whole(beside, self._folder / _beside_file(index))
            facts = {
                "rows": [asdict(row) for row in block.rows],
                "seconds": seconds,
                "tensors": digests,
                "states": _checksums(states),
                "beside": _checksums(beside),
            }
            artifacts.write_atomically(self._folder / _block(index), json.dumps(facts))
        except OSError as error:
            raise StorageError(f"writing {self._folder} failed: {error}; free some space and run again") from error
        (self._folder / _states(index - 1)).unlink(missing_ok=True)
        self._add(block.rows, block.scales, block.repairs, seconds)
        self._changed |= stored.keys()
        self.done, self.hidden = index + 1, block.outputs

    def give(self, folder: Path) -> None:
        """Put the weight files into the output: as further names of the same bytes, or copied where that cannot be.

        Raises `StorageError` when a tensor that was not compressed differs from the source's.
        """
        for name, place in self._places.items():
            before = replace(place, file=place.file.removesuffix(SUFFIX))
            if name not in self._changed and stored_hash(self._folder, place) != stored_hash(self._source, before):
                raise StorageError(f"{self._folder}: {name} was not copied whole; remove this folder and run again")
        for path in self._folder.glob(f"*{SUFFIX}"):
            there = folder / path.name.removesuffix(SUFFIX)
            try:
                os.link(path, there)
            except OSError:
                shutil.copyfile(path, there)

    def _begin(self, facts: Mapping[str, Any]) -> None:
        clear_job(self._folder)
        self.rows, self.scales, self.repairs, self._changed = [], {}, {}, set()
        self.seconds, self.done, self.hidden = 0.0, 0, BlockInputs()
        try:
            for path in [*weight_files(self._source), *self._source.glob(INDEX)]:
                shutil.copyfile(path, self._folder / f"{path.name}{SUFFIX}")
            write_job(facts, self._folder)
        except OSError as error:
            raise StorageError(f"writing {self._folder} failed: {error}; free some space and run again") from error

    def _go_on(self, device: str) -> bool:
        """Take up what is finished; False when some of it is not as it was written."""
        try:
            while facts := _read_json(self._folder / _block(self.done)):
                for name, expected in facts["tensors"].items():
                    if stored_hash(self._folder, self._places[name]) != expected:
                        return False
                beside = load_file(self._folder / _beside_file(self.done))
                if _checksums(beside) != facts["beside"]:
                    return False
                rows = [LayerRow(**row) for row in facts["rows"]]
                scales = {name.removesuffix(_SCALES): one for name, one in beside.items() if name.endswith(_SCALES)}
                repairs = repairs_from_tensors(
                    {name: one for name, one in beside.items() if not name.endswith(_SCALES)}
                )
                self._add(rows, scales, repairs, facts["seconds"])
                self._changed |= facts["tensors"].keys()
                self.done += 1
                checksums = facts["states"]
            if self.done:
                states = load_file(self._folder / _states(self.done - 1), device=device)
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


def _streams(hidden: BlockInputs) -> dict[str, Tensor]:
    streams = {"compressed": hidden.compressed, "dense": hidden.dense}
    return {name: tensor for name, tensor in streams.items() if tensor is not None}


def _beside(block: CompressedBlock) -> dict[str, Tensor]:
    """What is stored beside a block's weights: scales, and repairs."""
    return {f"{name}{_SCALES}": one for name, one in block.scales.items()} | repairs_to_tensors(block.repairs)


def _block(index: int) -> str:
    return f"block-{index:05}.json"


def _states(index: int) -> str:
    return f"states-{index:05}.safetensors"


def _beside_file(index: int) -> str:
    return f"beside-{index:05}.safetensors"


def _save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    with artifacts.replaced_atomically(path) as scratch:  # never in memory as a whole, and not flushed: checksums tell
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


def _checksum(tensor: Tensor) -> int:
    raw: Any = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(raw)
