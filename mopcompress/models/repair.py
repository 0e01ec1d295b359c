"""The file `repair.safetensors`: low-rank repairs of compressed linears, y = W_c x + B (A x).

It holds `<dotted name>.B` [out, rank] and `<dotted name>.A` [rank, in] for each repaired linear, in the weights' dtype.
A repair is added to the linear's outputs and never merged into its weight: zeros stay zeros, and integers stay on
their grid. Stock loaders ignore the file and load the compressed model without it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError
from mopcompress.models.experts import call_experts_separately, named_linears, unstack_experts
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.models.weight_files import REPAIR

_CHILD = "repair"  # the submodule of a linear


class LowRankRepair(nn.Module):
    """The product B (A x). Its matrices are neither trained nor part of the network's state dict."""

    up: Tensor
    down: Tensor

    def __init__(self, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> None:
        super().__init__()
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return functional.linear(functional.linear(inputs, self.down), self.up)

    @property
    def rank(self) -> int:
        return len(self.down)


RepairsByName = Mapping[str, LowRankFactors]
"""The repairs of a model by the dotted name of the linear."""


def add_repair(linear: nn.Module, factors: LowRankFactors) -> RemovableHandle:
    """Add the repair to the linear's outputs from now on, in place; its weight, name and state dict stay the same."""
    linear.add_module(_CHILD, LowRankRepair(factors.up, factors.down))
    return linear.register_forward_hook(_add_output)


@contextmanager
def temporary_repair(linear: Linear, factors: LowRankFactors) -> Iterator[None]:
    """Add the repair to the linear's outputs inside the `with` block only."""
    handle = add_repair(linear, factors)
    try:
        yield
    finally:
        handle.remove()
        delattr(linear, _CHILD)


def repair_of(linear: nn.Module) -> LowRankRepair | None:
    """Return the repair of a linear; None when it has none."""
    return linear._modules.get(_CHILD)  # type: ignore[return-value]


def attach_repairs(model: LanguageModel, repairs: RepairsByName) -> None:
    """Add repairs to the model's linears, in place; stacked experts are called separately from then on.

    Raises `DataError` when a name is no linear of the blocks, or when a repair does not fit its linear.
    """
    remaining = dict(repairs)
    for index, block in enumerate(model.blocks):
        experts = unstack_experts(block)
        for linear, name in named_linears(block, experts, f"{model.blocks_prefix()}.{index}").items():
            repair = remaining.pop(name, None)
            if repair is None:
                continue
            shape = (len(repair.up), repair.down.shape[1])
            if shape != tuple(weight_of(linear).shape):
                raise DataError(f"{REPAIR}: {name} is {tuple(weight_of(linear).shape)}, but its repair {shape}")
            add_repair(linear, repair.rounded(linear.weight.dtype))
            linear.to(linear.weight.device)
        call_experts_separately({name: stack for name, stack in experts.items() if any(map(_is_repaired, stack[1]))})
    if remaining:
        raise DataError(f"{REPAIR}: the model has no linear {min(remaining)}; make the folder again")


def write_repairs(path: Path, repairs: RepairsByName) -> None:
    """Write the file, each matrix in its own dtype."""
    save_file(repairs_to_tensors(repairs), path, {"format": "pt"})


def read_repairs(folder: Path) -> dict[str, LowRankFactors]:
    """Read the repairs of a folder; an empty dict when it has none. Raises `DataError` when the file is damaged."""
    path = folder / REPAIR
    if not path.exists():
        return {}
    try:
        repairs = repairs_from_tensors(load_file(path))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); make the folder again") from error
    for name, repair in repairs.items():
        if not bool(repair.up.isfinite().all() and repair.down.isfinite().all()):
            raise DataError(f"{path}: the repair of {name} holds NaN or infinite numbers; make the folder again")
    return repairs


def repairs_to_tensors(repairs: RepairsByName) -> dict[str, Tensor]:
    """Return both matrices of each repair under their names in the file."""
    tensors = {f"{name}.B": repair.up for name, repair in repairs.items()}
    tensors |= {f"{name}.A": repair.down for name, repair in repairs.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def repairs_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LowRankFactors]:
    """Return the repair of each linear, by dotted name. Raises `ValueError` for matrices without a fitting partner."""
    names = sorted({name[: -len(".B")] for name in tensors})
    if {f"{name}.{part}" for name in names for part in "AB"} != tensors.keys():
        raise ValueError("not a B and an A for each linear")
    for name in names:
        up, down = tensors[f"{name}.B"], tensors[f"{name}.A"]
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down):
            raise ValueError(f"B and A of {name} do not fit: {tuple(up.shape)} and {tuple(down.shape)}")
    return {name: LowRankFactors(tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in names}


def _is_repaired(expert: object) -> bool:
    return any(repair_of(linear) is not None for linear in vars(expert).values())


def _add_output(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    repair = repair_of(linear)
    assert repair is not None  # for mypy: the hook comes and goes with it
    return output + repair(inputs[0])
