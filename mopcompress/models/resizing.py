"""MLP channels and attention heads of decoder blocks as removable groups, and their numbers in a configuration.

Blocks are recognised by the names of their matrices, whatever the model is called. Whether a family's own code can
build a model with other numbers is tried, not looked up: a resized network without memory is built from the changed
configuration.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mopcompress.errors import DataError
from mopcompress.models.families import ATTENTIONS, CHANNEL_KEYS, MLPS
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, set_weight, weight_of


@dataclass(frozen=True)
class PrunableGroups:
    """The matrices of a block that write and read its MLP channels or its heads, in equal groups to keep or remove.

    `segments` are, per writer, the row counts of the matrices that it stacks, such as gate and up, or q, k and v. Each
    segment is `groups` groups of consecutive rows.
    """

    name: str  # of the reader
    writers: tuple[Linear, ...]
    reader: Linear
    groups: int
    segments: tuple[tuple[int, ...], ...]

    def cut_writers(self, survivors: Int[Tensor, " survivors"]) -> None:
        """Remove the rows of all other groups from the writers, in place."""
        for writer, segments in zip(self.writers, self.segments, strict=True):
            segment_rows = torch.arange(sum(segments), device=survivors.device).split(segments)
            rows = torch.cat([segment.view(self.groups, -1)[survivors].flatten() for segment in segment_rows])
            bias = None if writer.bias is None else writer.bias[rows]
            set_weight(writer, weight_of(writer)[rows], bias)

    @property
    def weights(self) -> int:
        """The number of weights of the matrices."""
        return sum(linear.weight.numel() for linear in (*self.writers, self.reader))

    def shapes(self, groups: int) -> dict[Linear, tuple[int, int]]:
        """Return [out, in] of every matrix when only `groups` groups remain."""
        row_counts = [sum(segments) // self.groups * groups for segments in self.segments]
        shapes = {
            writer: (count, weight_of(writer).shape[1]) for writer, count in zip(self.writers, row_counts, strict=True)
        }
        out, width = weight_of(self.reader).shape
        return {**shapes, self.reader: (out, width // self.groups * groups)}


def find_mlp(model: LanguageModel, index: int) -> PrunableGroups:
    """Return the MLP of block `index`, a prunable group per channel. Raises `DataError` for unknown layouts."""
    name, writers, reader = _find_part(model.blocks_prefix(), index, model.blocks[index], MLPS, "MLP")
    width = weight_of(reader).shape[1]
    rows = [len(weight_of(writer)) for writer in writers]
    if any(count % width for count in rows):
        raise DataError(
            f"{name}: reads {width} channels, but {rows} are written; this MLP cannot be narrowed, leave "
            "mlp_sparsity at 0"
        )
    return PrunableGroups(name, writers, reader, width, tuple((width,) * (count // width) for count in rows))


def find_attention(model: LanguageModel, index: int) -> PrunableGroups:
    """Return the attention of a block, where a group is a key-value head with all its query heads.

    Raises `DataError` when the block has no attention of a known form.
    """
    name, writers, reader = _find_part(model.blocks_prefix(), index, model.blocks[index], ATTENTIONS, "attention")
    heads, groups = _heads(model.config)
    width = weight_of(reader).shape[1]
    values = width // heads * groups
    segments = ((width, values, values),) if len(writers) == 1 else ((width,), (values,), (values,))
    rows = [len(weight_of(writer)) for writer in writers]
    if width % heads or heads % groups or rows != [sum(segment) for segment in segments]:
        raise DataError(
            f"{name}: {width} inputs and {rows} rows do not fit {heads} heads on {groups} key-value heads; "
            "these heads cannot be removed, leave head_sparsity at 0"
        )
    return PrunableGroups(name, writers, reader, groups, segments)


def channel_sizes(model: LanguageModel, channels: int) -> dict[str, int]:
    """Return the setting of the configuration for this number of MLP channels. Raises `DataError` without one."""
    for key in CHANNEL_KEYS:
        if hasattr(model.config, key):
            return {key: channels}
    raise DataError(
        f"the configuration of {type(model.network).__name__} has no number of MLP channels, so stock transformers "
        "could not load fewer; leave mlp_sparsity at 0"
    )


def head_sizes(model: LanguageModel, kv_heads: int) -> dict[str, int]:
    """Return the settings of the configuration for this number of key-value heads; the size of a head is unchanged."""
    heads, groups = _heads(model.config)
    head_dim = weight_of(find_attention(model, 0).reader).shape[1] // heads
    return {"num_attention_heads": heads // groups * kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def build_resized(network: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel:
    """Build the network with other sizes by its family's own code, on the meta device: shapes, but no memory.

    Raises `DataError` when the family's code rejects the sizes.
    """
    network_class: Any = type(network)
    try:
        config = type(network.config).from_dict(network.config.to_dict() | dict(sizes))
        with torch.device("meta"):
            return network_class(config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise DataError(
            f"{network_class.__name__} cannot be built with {_format_sizes(sizes)}: {' '.join(str(error).split())}; "
            "ask for another sparsity"
        ) from error


def check_resized(
    network: nn.Module, resized: nn.Module, shapes: Mapping[Linear, tuple[int, int]], sizes: Mapping[str, int]
) -> None:
    """Raise `DataError` unless `resized` has these linears in these shapes, and all else in the network's shapes."""
    counterparts = dict(resized.named_modules())
    for name, module in network.named_modules():
        other = counterparts.get(name)
        is_resized = module in shapes
        expected = [shapes[module]] if is_resized else _parameter_shapes(module)
        if other is None or expected != ([tuple(weight_of(other).shape)] if is_resized else _parameter_shapes(other)):
            raise DataError(
                f"a {type(network).__name__} with {_format_sizes(sizes)} has no {name} of shape {expected}: its "
                "configuration cannot express that; leave that sparsity at 0"
            )


def adopt_sizes(network: PreTrainedModel, resized: PreTrainedModel, sizes: Mapping[str, int]) -> None:
    """Copy the sizes that modules of the resized network store as attributes, and set those of the configuration."""
    for module, counterpart in zip(network.modules(), resized.modules(), strict=True):
        for name, value in vars(counterpart).items():
            if type(value) is int and getattr(module, name, value) != value:
                setattr(module, name, value)
    for key, size in sizes.items():
        setattr(network.config, key, size)


def write_config_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Write these keys into the folder's `config.json`; all others stay as their author wrote them."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | dict(sizes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _find_part(
    prefix: str, index: int, block: nn.Module, forms: Sequence[tuple[tuple[str, ...], str]], what: str
) -> tuple[str, tuple[Linear, ...], Linear]:
    matches = list(_matches(block, forms))
    if len(matches) != 1:
        names = "; ".join(f"{', '.join(writers)} and {reader}" for writers, reader in forms)
        raise DataError(
            f"{prefix}.{index}: found {len(matches)} {what} parts made of linears with known names ({names}), "
            "one is needed; this family cannot be narrowed there"
        )
    name, writers, reader = matches[0]
    return ".".join(filter(None, (prefix, str(index), name))), writers, reader


def _matches(
    block: nn.Module, forms: Sequence[tuple[tuple[str, ...], str]]
) -> Iterator[tuple[str, tuple[Linear, ...], Linear]]:
    for parent, module in block.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, Linear)}
        for writers, reader in forms:
            if {*writers, reader} <= linears.keys():
                yield f"{parent}.{reader}".strip("."), tuple(linears[name] for name in writers), linears[reader]


def _heads(config: Any) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _parameter_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in module.parameters(recurse=False)]


def _format_sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
