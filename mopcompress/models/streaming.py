"""A model whose weights stay in their files: one block at a time is in memory, and leaves changed.

The network is built without weights. What stands around the blocks is read at the start (of the embedding only the rows
of the tokens that will be read; the head never), each block when it is its turn. transformers' own conversion says
which tensors of the files make up a block and, backwards, what its changed weights are called there: experts, for
example, lie in the files one by one and in the network stacked.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel, locate_blocks
from mopcompress.models.model_loading import without_weights
from mopcompress.models.safetensors_io import TensorLocation, read, read_rows, tensor_locations

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
AROUND = -1  # the part of the network that is no block


class StreamedModel:
    """`model`, with the weights of a block only inside `block(index)`."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, "..."], *, device: torch.device
    ) -> None:
        """Raises `DataError` when the files do not hold all of the network, or what they hold is not finite."""
        self._folder, self._device = folder, device
        self._network = without_weights(folder)
        for module in self._network.modules():
            module._buffers = {name: one if one is None else one.to(device) for name, one in module._buffers.items()}
        decoder, blocks = locate_blocks(self._network)
        self._decoder, self._blocks = decoder, f"{decoder}.{blocks}"
        self._conversions: Any = get_model_conversion_mapping(self._network)
        self._embedding = _name_of(self._network, self._network.get_input_embeddings())
        self._rows = sorted({0, *tokens.unique().tolist()})  # token 0 is what a network is tried with
        self.places = tensor_locations(folder)
        self._parts = self._sorted_into_parts()
        self._held: int | None = None
        self._bring(AROUND)
        self.hold(0)
        self.model = LanguageModel(self._network, tokenizer)

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Inside, block `index` has its weights; afterwards they are gone. Raises `DataError` when they are damaged."""
        self.hold(index)
        try:
            yield
        finally:
            self._let_go()

    def hold(self, index: int) -> None:
        """Let block `index` have its weights, until another block is wanted."""
        if self._held != index:
            self._let_go()
            self._bring(index)
            self._held = index

    def dtype_of(self, index: int) -> torch.dtype:
        """In what dtype the files hold (most of) a block."""
        return max((self.places[name] for name in self._parts[index]), key=lambda place: place.bytes).dtype

    def stored(self, index: int) -> dict[str, Tensor]:
        """The weights of a block that has them, by the files' names. Raises `DataError` when those are not known."""
        prefix = f"{self._blocks}.{index}."
        named = {f"{prefix}{name}": weight for name, weight in self.model.blocks[index].state_dict().items()}
        stored = {
            self._name_in_files(name): one for name, one in revert_weight_conversion(self._network, named).items()
        }
        for name, tensor in stored.items():
            if name not in self._parts[index] or self.places[name].shape != tuple(tensor.shape):
                raise DataError(
                    f"model {self._folder}: the compressed {name} has no place in its files; "
                    "save the model anew with transformers and use that folder"
                )
        return stored

    def _name_in_files(self, name: str) -> str:
        base = self._network.base_model_prefix
        candidates = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        return next((candidate for candidate in candidates if candidate in self.places), name)

    def _sorted_into_parts(self) -> dict[int, dict[str, str]]:
        """Which tensors of the files go into which part of the network, and under what name."""
        known = self._network.state_dict()
        wanted = {name for name in known if name.startswith(f"{self._decoder}.")}
        missing = set(wanted)
        tied = dict(self._network.all_tied_weights_keys)  # the head's name: the embedding's
        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        parts: dict[int, dict[str, str]] = {}
        for stored in self.places:
            name, pattern = rename_source_key(stored, renamings, converters, self._network.base_model_prefix, known)
            if tied.get(name) == self._embedding and self._embedding not in self.places:
                name = self._embedding
            if name in wanted:
                parts.setdefault(self._part_of(name), {})[stored] = name
            one_to_many = [one.target_patterns for one in converters if pattern in one.source_patterns]
            for first, *others in one_to_many:
                missing -= {name.replace(first, other) for other in others}
            missing.discard(name)
        if missing:
            raise DataError(f"model {self._folder}: its files hold no {min(missing)}; get the model again")
        return parts

    def _part_of(self, name: str) -> int:
        if not name.startswith(f"{self._blocks}."):
            return AROUND
        return int(name.removeprefix(f"{self._blocks}.").partition(".")[0])

    def _bring(self, part: int) -> None:
        """Read a part of the network, in fp32."""
        state = {
            stored: _LazyTensor(self._read, self.places[stored])
            for stored, name in self._parts[part].items()
            if name != self._embedding
        }
        state |= {
            name: _LazyTensor(self._read_rows, self.places[stored])
            for stored, name in self._parts[part].items()
            if name == self._embedding
        }
        config = LoadStateDictConfig(
            device_map={"": self._device}, dtype=torch.float32, weight_mapping=self._conversions
        )
        with _one_by_one():
            info, _ = convert_and_load_state_dict_in_model(self._network, state, load_config=config)
        for name, _, shape in info.mismatched_keys:
            raise DataError(f"model {self._folder}: {name} is not of shape {tuple(shape)}; get the model again")
        for name, problem in info.conversion_errors.items():
            raise DataError(f"model {self._folder}: {name} cannot be converted: {problem}; get the model again")
        for name, weight in self._weights(part):
            seen = weight[self._rows] if name == self._embedding else weight
            weight.requires_grad_(False)
            if not bool(seen.isfinite().all()):
                raise DataError(f"model {self._folder}: {name} holds NaN or infinite weights; get the model again")

    def _read(self, place: TensorLocation) -> Tensor:
        return read(self._folder, place)

    def _read_rows(self, place: TensorLocation) -> Tensor:
        return read_rows(self._folder, place, [row for row in self._rows if row < place.shape[0]])

    def _let_go(self) -> None:
        if self._held is None:
            return
        for module in self._network.get_submodule(f"{self._blocks}.{self._held}").modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(weight.to("meta"), requires_grad=False))
        self._held = None
        _give_memory_back()

    def _weights(self, part: int) -> list[tuple[str, Tensor]]:
        return [
            (name, weight)
            for name, weight in self._network.named_parameters()
            if name.startswith(f"{self._decoder}.") and self._part_of(name) == part
        ]


class _LazyTensor:
    """Stands for a tensor until transformers asks for its content."""

    def __init__(self, how: Callable[[TensorLocation], Tensor], place: TensorLocation) -> None:
        self._how, self._place = how, place

    def __getitem__(self, _everything: object) -> Tensor:
        return self._how(self._place)


def _name_of(network: PreTrainedModel, embedding: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in network.named_modules() if module is embedding)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """No threads, which would read a whole block before they convert it, and no bar, which would come every block."""
    drawn, threads = logging.is_progress_bar_enabled(), os.environ.get(_NO_THREADS)
    logging.disable_progress_bar()
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = threads
        if drawn:
            logging.enable_progress_bar()


def _give_memory_back() -> None:
    """glibc keeps freed memory that lies below memory in use, and after some blocks that is as much as the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
