"""`repair.safetensors`: low-rank matrices beside compressed linears, y = W_c x + B (A x).

For each repaired linear `<dotted name>.B` [out, rank] and `<dotted name>.A` [rank, in], in the weights' dtype. They are
computed beside the linear and never merged into its weight: zeros stay zeros, and integers stay on their grid. Stock
loaders know nothing of the file, and load the compressed model without it.
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
from mopcompress.models.experts import call_one_by_one, named_linears, unstacked
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.models.weight_files import REPAIR

_PLACE = "repair"  # the submodule of a linear


class LowRankRepair(nn.Module):
    """x -> B (A x). Its matrices are no part of the network's own weights: not trained, not in its state."""

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
"""By the dotted name of the linear."""


def add_repair(linear: nn.Module, factors: LowRankFactors) -> RemovableHandle:
    """Add the repair to the linear's outputs from now on, in place; weight, name and state stay as they are."""
    linear.add_module(_PLACE, LowRankRepair(factors.up, factors.down))
    return linear.register_forward_hook(_add)


@contextmanager
def temporary_repair(linear: Linear, factors: LowRankFactors) -> Iterator[None]:
    """Inside the block, the repair is added to the linear's outputs."""
    handle = add_repair(linear, factors)
    try:
        yield
    finally:
        handle.remove()
        delattr(linear, _PLACE)


def repair_of(linear: nn.Module) -> LowRankRepair | None:
    """What stands beside a linear; None when nothing does."""
    return linear._modules.get(_PLACE)  # type: ignore[return-value]


def attach_repairs(model: LanguageModel, repairs: RepairsByName) -> None:
    """Put repairs beside the model's linears, in place; stacked experts are called one by one from then on.

    Raises `DataError` when a name is no linear of the blocks, or a repair does not fit it.
    """
    left = dict(repairs)
    for index, block in enumerate(model.blocks):
        experts = unstacked(block)
        for linear, name in named_linears(block, experts, f"{model.blocks_prefix()}.{index}").items():
            repair = left.pop(name, None)
            if repair is None:
                continue
            shape = (len(repair.up), repair.down.shape[1])
            if shape != tuple(weight_of(linear).shape):
                raise DataError(f"{REPAIR}: {name} is {tuple(weight_of(linear).shape)}, and its repair {shape}")
            add_repair(linear, repair.rounded(linear.weight.dtype))
            linear.to(linear.weight.device)
        call_one_by_one({name: found for name, found in experts.items() if any(map(_is_repaired, found[1]))})
    if left:
        raise DataError(f"{REPAIR}: the model has no linear {min(left)}; make the folder again")


def write_repairs(path: Path, repairs: RepairsByName) -> None:
    """Write the file, each matrix in its own dtype."""
    save_file(repairs_to_tensors(repairs), path, {"format": "pt"})


def read_repairs(folder: Path) -> dict[str, LowRankFactors]:
    """The repairs of a folder; none when it has no file of them. Raises `DataError` when the file is damaged."""
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
    """Both matrices of each, as the file names them."""
    found = {f"{name}.B": one.up for name, one in repairs.items()}
    found |= {f"{name}.A": one.down for name, one in repairs.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def repairs_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LowRankFactors]:
    """Return the repairs of a file. Raises `ValueError` when they are no pairs of matrices that fit."""
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


def _add(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    repair = repair_of(linear)
    assert repair is not None  # for mypy: the hook comes and goes with it
    return output + repair(inputs[0])
