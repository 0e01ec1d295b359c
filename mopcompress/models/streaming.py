"""A model whose weights stay in their files: a single block at a time is in memory.

The network is built without weights. All modules around the blocks are read at the start, except the head. Of the
embedding, only the rows of tokens that will occur are read. Each block is read when it is needed. transformers' own
conversion maps the tensors of the files to those of a block, and the changed weights back to names in the files:
experts, for example, are separate in the files and stacked in the network.
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
from mopcompress.models.model_loading import load_meta_network
from mopcompress.models.safetensors_io import TensorLocation, read_rows, read_tensor, tensor_locations

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
AROUND = -1  # the part of the network outside the blocks


class StreamedModel:
    """`model`, with the weights of a block only inside `block(index)`."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, "..."], *, device: torch.device
    ) -> None:
        """Read block 0 and all around the blocks; of the embedding, only the rows of `tokens`.

        Raises `DataError` when the files do not hold all of the network, or hold NaN or infinite weights.
        """
        self._folder, self._device = folder, device
        self._network = load_meta_network(folder)
        for module in self._network.modules():
            module._buffers = {
                name: buffer if buffer is None else buffer.to(device) for name, buffer in module._buffers.items()
            }
        decoder, blocks = locate_blocks(self._network)
        self._decoder, self._blocks = decoder, f"{decoder}.{blocks}"
        self._conversions: Any = get_model_conversion_mapping(self._network)
        self._embedding = _embedding_name(self._network)
        self._token_rows = sorted({0, *tokens.unique().tolist()})  # `LanguageModel` probes a network with token 0
        self.locations = tensor_locations(folder)
        self._parts = self._assign_parts()
        self._loaded_block: int | None = None
        self._load_part(AROUND)
        self.load_block(0)
        self.model = LanguageModel(self._network, tokenizer)

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Load the weights of block `index` inside the `with` block only. Raises `DataError` when they are damaged."""
        self.load_block(index)
        try:
            yield
        finally:
            self._release_block()

    def load_block(self, index: int) -> None:
        """Load the weights of block `index`, in place of those of the block that was loaded before."""
        if self._loaded_block != index:
            self._release_block()
            self._load_part(index)
            self._loaded_block = index

    def stored_dtype(self, index: int) -> torch.dtype:
        """Return the dtype in which the files hold the largest tensor of a block."""
        return max((self.locations[name] for name in self._parts[index]), key=lambda location: location.bytes).dtype

    def weights_to_store(self, index: int) -> dict[str, Tensor]:
        """Return the weights of a loaded block under their names in the files.

        Raises `DataError` when the files have no tensor of that name and shape.
        """
        prefix = f"{self._blocks}.{index}."
        named = {f"{prefix}{name}": weight for name, weight in self.model.blocks[index].state_dict().items()}
        stored = {
            self._name_in_files(name): weight for name, weight in revert_weight_conversion(self._network, named).items()
        }
        for name, tensor in stored.items():
            if name not in self._parts[index] or self.locations[name].shape != tuple(tensor.shape):
                raise DataError(
                    f"model {self._folder}: the compressed {name} has no place in its files; "
                    "save the model anew with transformers and use that folder"
                )
        return stored

    def _name_in_files(self, name: str) -> str:
        base = self._network.base_model_prefix
        candidates = (name, name.removeprefix(f"{base}."), f"{base}.{name}")
        return next((candidate for candidate in candidates if candidate in self.locations), name)

    def _assign_parts(self) -> dict[int, dict[str, str]]:
        """Map the tensors of the files to the parts of the network: {part: {name in the files: name in the network}}.

        Raises `DataError` when the files lack a tensor of the decoder.
        """
        state = self._network.state_dict()
        decoder_names = {name for name in state if name.startswith(f"{self._decoder}.")}
        missing = set(decoder_names)
        tied = dict(self._network.all_tied_weights_keys)  # the head's name: the embedding's
        renamings = [conversion for conversion in self._conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in self._conversions if isinstance(conversion, WeightConverter)]
        parts: dict[int, dict[str, str]] = {}
        for stored in self.locations:
            name, pattern = rename_source_key(stored, renamings, converters, self._network.base_model_prefix, state)
            if tied.get(name) == self._embedding and self._embedding not in self.locations:
                name = self._embedding
            if name in decoder_names:
                parts.setdefault(self._part_of(name), {})[stored] = name
            one_to_many = [
                converter.target_patterns for converter in converters if pattern in converter.source_patterns
            ]
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

    def _load_part(self, part: int) -> None:
        """Read a part of the network, in fp32. Raises `DataError` when it does not fit or is not finite."""
        state = {
            stored: _LazyTensor(self._read_tensor, self.locations[stored])
            for stored, name in self._parts[part].items()
            if name != self._embedding
        }
        state |= {
            name: _LazyTensor(self._read_token_rows, self.locations[stored])
            for stored, name in self._parts[part].items()
            if name == self._embedding
        }
        config = LoadStateDictConfig(
            device_map={"": self._device}, dtype=torch.float32, weight_mapping=self._conversions
        )
        with _sequential_loading():
            info, _ = convert_and_load_state_dict_in_model(self._network, state, load_config=config)
        for name, _, shape in info.mismatched_keys:
            raise DataError(f"model {self._folder}: {name} is not of shape {tuple(shape)}; get the model again")
        for name, problem in info.conversion_errors.items():
            raise DataError(f"model {self._folder}: {name} cannot be converted: {problem}; get the model again")
        for name, weight in self._weights(part):
            loaded = weight[self._token_rows] if name == self._embedding else weight
            weight.requires_grad_(False)
            if not bool(loaded.isfinite().all()):
                raise DataError(f"model {self._folder}: {name} holds NaN or infinite weights; get the model again")

    def _read_tensor(self, location: TensorLocation) -> Tensor:
        return read_tensor(self._folder, location)

    def _read_token_rows(self, location: TensorLocation) -> Tensor:
        return read_rows(self._folder, location, [row for row in self._token_rows if row < location.shape[0]])

    def _release_block(self) -> None:
        if self._loaded_block is None:
            return
        for module in self._network.get_submodule(f"{self._blocks}.{self._loaded_block}").modules():
            for name, weight in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(weight.to("meta"), requires_grad=False))
        self._loaded_block = None
        _trim_heap()

    def _weights(self, part: int) -> list[tuple[str, Tensor]]:
        return [
            (name, weight)
            for name, weight in self._network.named_parameters()
            if name.startswith(f"{self._decoder}.") and self._part_of(name) == part
        ]


class _LazyTensor:
    """A tensor that is read when transformers asks for its content."""

    def __init__(self, read: Callable[[TensorLocation], Tensor], location: TensorLocation) -> None:
        self._read, self._location = read, location

    def __getitem__(self, _index: object) -> Tensor:
        return self._read(self._location)


def _embedding_name(network: PreTrainedModel) -> str:
    embedding = network.get_input_embeddings()
    return next(f"{name}.weight" for name, module in network.named_modules() if module is embedding)


@contextmanager
def _sequential_loading() -> Iterator[None]:
    """Load without threads, which would read a whole block before converting it, and without a bar for every block."""
    bar_enabled, threads = logging.is_progress_bar_enabled(), os.environ.get(_NO_THREADS)
    logging.disable_progress_bar()
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if threads is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = threads
        if bar_enabled:
            logging.enable_progress_bar()


def _trim_heap() -> None:
    """Return freed memory to the system.

    glibc retains freed memory below memory in use; after some blocks, that would be as much as the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
