"""Where decoder blocks keep their MLP channels and attention heads, and how a configuration says how many there are.

Blocks are known by the names of their matrices, whatever the model is called. Whether a family's own code can build a
model with other numbers is not looked up but tried: a twin without memory is built from the changed configuration.
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
    """The matrices of a block around its MLP channels or its heads, cut into equal groups that stay or go whole.

    `segments` are the row counts of what each writer stacks, such as gate and up, or q, k and v: each is `groups`
    groups of consecutive rows.
    """

    name: str  # of the reader
    writers: tuple[Linear, ...]
    reader: Linear
    groups: int
    segments: tuple[tuple[int, ...], ...]

    def cut_writers(self, kept: Int[Tensor, " groups_kept"]) -> None:
        """Leave only the rows of these groups, in place."""
        for writer, segments in zip(self.writers, self.segments, strict=True):
            rows = torch.arange(sum(segments), device=kept.device).split(segments)
            left = torch.cat([segment.view(self.groups, -1)[kept].flatten() for segment in rows])
            bias = None if writer.bias is None else writer.bias[left]
            set_weight(writer, weight_of(writer)[left], bias)

    @property
    def weights(self) -> int:
        """How many weights the matrices have."""
        return sum(linear.weight.numel() for linear in (*self.writers, self.reader))

    def shapes(self, kept: int) -> dict[Linear, tuple[int, int]]:
        """[out, in] of every matrix when `kept` groups are left."""
        written = [sum(segments) // self.groups * kept for segments in self.segments]
        rows = {
            writer: (count, weight_of(writer).shape[1]) for writer, count in zip(self.writers, written, strict=True)
        }
        out, width = weight_of(self.reader).shape
        return {**rows, self.reader: (out, width // self.groups * kept)}


def mlp_of(model: LanguageModel, index: int) -> PrunableGroups:
    """The MLP of a block; every channel is a group. Raises `DataError` when there is none of a known form."""
    name, writers, reader = _found(model.blocks_prefix(), index, model.blocks[index], MLPS, "MLP")
    width = weight_of(reader).shape[1]
    rows = [len(weight_of(writer)) for writer in writers]
    if any(count % width for count in rows):
        raise DataError(f"{name}: reads {width} channels, but {rows} are written; this MLP cannot be narrowed")
    return PrunableGroups(name, writers, reader, width, tuple((width,) * (count // width) for count in rows))


def attention_of(model: LanguageModel, index: int) -> PrunableGroups:
    """The attention of a block; a group is a key-value head with all its query heads. Raises `DataError` likewise."""
    name, writers, reader = _found(model.blocks_prefix(), index, model.blocks[index], ATTENTIONS, "attention")
    heads, groups = _heads(model.config)
    width = weight_of(reader).shape[1]
    values = width // heads * groups
    segments = ((width, values, values),) if len(writers) == 1 else ((width,), (values,), (values,))
    rows = [len(weight_of(writer)) for writer in writers]
    if width % heads or heads % groups or rows != [sum(one) for one in segments]:
        raise DataError(
            f"{name}: {width} inputs and {rows} rows do not fit {heads} heads on {groups} key-value heads; "
            "these heads cannot be removed, leave head_sparsity at 0"
        )
    return PrunableGroups(name, writers, reader, groups, segments)


def channel_sizes(model: LanguageModel, kept: int) -> dict[str, int]:
    """The key of the configuration that says how many MLP channels there are. Raises `DataError` when there is none."""
    for key in CHANNEL_KEYS:
        if hasattr(model.config, key):
            return {key: kept}
    raise DataError(
        f"the configuration of {type(model.network).__name__} has no number of MLP channels, so stock transformers "
        "could not load fewer; leave mlp_sparsity at 0"
    )


def head_sizes(model: LanguageModel, kept: int) -> dict[str, int]:
    """The keys of the configuration that change when `kept` key-value groups stay; the size of a head does not."""
    heads, groups = _heads(model.config)
    head_dim = weight_of(attention_of(model, 0).reader).shape[1] // heads
    return {"num_attention_heads": heads // groups * kept, "num_key_value_heads": kept, "head_dim": head_dim}


def build_resized(network: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel:
    """The network as its family builds it with these sizes, on the meta device: shapes and settings, no memory.

    Raises `DataError` when the family refuses them.
    """
    kind: Any = type(network)
    try:
        config = type(network.config).from_dict(network.config.to_dict() | dict(sizes))
        with torch.device("meta"):
            return kind(config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise DataError(
            f"{kind.__name__} cannot be built with {_shown(sizes)}: {' '.join(str(error).split())}; "
            "ask for another share"
        ) from error


def check_resized(
    network: nn.Module, other: nn.Module, shapes: Mapping[Linear, tuple[int, int]], sizes: Mapping[str, int]
) -> None:
    """Raise `DataError` unless the twin has these linears in these shapes, and all else as the network has it."""
    theirs = dict(other.named_modules())
    for name, module in network.named_modules():
        wanted = [shapes[module]] if module in shapes else _own_shapes(module)
        found = theirs.get(name)
        if found is None or wanted != ([tuple(weight_of(found).shape)] if module in shapes else _own_shapes(found)):
            raise DataError(
                f"a {type(network).__name__} with {_shown(sizes)} has no {name} of shape {wanted}: its configuration "
                "cannot say what is asked for; leave that share at 0"
            )


def adopt_sizes(network: PreTrainedModel, other: PreTrainedModel, sizes: Mapping[str, int]) -> None:
    """Take over the sizes that modules of the narrower twin note for themselves, and those of its configuration."""
    for module, its_twin in zip(network.modules(), other.modules(), strict=True):
        for name, value in vars(its_twin).items():
            if type(value) is int and getattr(module, name, value) != value:
                setattr(module, name, value)
    for key, size in sizes.items():
        setattr(network.config, key, size)


def write_config_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Put these keys into the folder's `config.json`; all others stay as their author wrote them."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | dict(sizes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _found(
    prefix: str, index: int, block: nn.Module, forms: Sequence[tuple[tuple[str, ...], str]], what: str
) -> tuple[str, tuple[Linear, ...], Linear]:
    found = list(_matches(block, forms))
    if len(found) != 1:
        known = "; ".join(f"{', '.join(writers)} and {reader}" for writers, reader in forms)
        raise DataError(
            f"{prefix}.{index}: found {len(found)} {what} parts made of linears with known names ({known}), "
            "one is needed; this family cannot be narrowed there"
        )
    name, writers, reader = found[0]
    return ".".join(filter(None, (prefix, str(index), name))), writers, reader


def _matches(
    block: nn.Module, forms: Sequence[tuple[tuple[str, ...], str]]
) -> Iterator[tuple[str, tuple[Linear, ...], Linear]]:
    for place, module in block.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, Linear)}
        for writers, reader in forms:
            if {*writers, reader} <= linears.keys():
                yield f"{place}.{reader}".strip("."), tuple(linears[name] for name in writers), linears[reader]


def _heads(config: Any) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _own_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in module.parameters(recurse=False)]


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
