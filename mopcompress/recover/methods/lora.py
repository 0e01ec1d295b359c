"""LoRA (Hu et al., 2021, arXiv 2106.09685), h = W x + B A x, and with it a form that keeps a pruned weight's zeros.

LoRA's scale alpha / r is 1 here: the learning rate says the same. `masklora` trains h = (W + (B A) * mask) x, where the
mask is 1 where W is not zero (MaskLoRA of PERP, Zimmer et al., 2023, arXiv 2312.15230): after training it merges into
W, and what was pruned stays pruned.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods import mixture_of_prompts
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.methods.target_linears import linears_from_layer, writers_from_layer


class LoRAUpdate(nn.Module):
    """The product of two thin matrices, added to the weight of a linear: to all of it, or where it is not zero."""

    def __init__(self, linear: Linear, rank: int, *, masked: bool) -> None:
        super().__init__()
        rows, columns = weight_of(linear).shape
        self.down = nn.Parameter(torch.zeros(rank, columns))  # A
        self.up = nn.Parameter(torch.zeros(rows, rank))  # B
        self.masked = masked

    def forward(self, module: Linear, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        if self.masked:
            return functional_call(module, self.merged(module), (hidden,))
        return module(hidden) + hidden @ self.down.T @ self.up.T

    def merged(self, module: Linear) -> dict[str, Tensor]:
        """Return the sum of weight and update; the zeros of a pruned weight stay only if it is masked."""
        weight, update = weight_of(module), self.up @ self.down
        merged = weight + update * (weight != 0) if self.masked else weight + update
        return {"weight": merged.T.contiguous() if isinstance(module, Conv1D) else merged}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Set LoRA's own first values, in place: `down` uniform as in a new linear, `up` zero, so nothing changes."""
        bound = self.down.shape[1] ** -0.5
        self.down.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=generator))
        self.up.zero_()


def build(model: LanguageModel, config: AdapterConfig) -> PatchedModules:
    """Return `lora`, `masklora`, or the shape of `eora`, for the linears that write to the residual stream.

    Those repaired most for their size of all that were measured: benchmarks/LOG.md. `targets` names others, such as
    queries and values, which the paper uses.

    Raises `DataError` for targets that match no linear, and for a rank that does not fit.
    """
    linears = (
        linears_from_layer(model, config.layer, config.targets)
        if config.targets
        else writers_from_layer(model, config.layer)
    )
    rank = rank_within_budget(model, config, linears) if config.rank is None else config.rank
    for name, linear in linears.items():
        rows, columns = weight_of(linear).shape
        if rank > min(rows, columns):
            raise DataError(f"rank: {rank} is more than {name} can have, whose weight is {rows} x {columns}; lower it")
    masked = config.arm == "masklora"
    patches = {name: LoRAUpdate(linear, rank, masked=masked) for name, linear in linears.items()}
    return PatchedModules(config.layer, patches).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> PatchedModules:
    """Return updates with a random `down` and a zero `up`."""
    adapter = build(inputs.model, config)
    generator = torch.Generator().manual_seed(init.seed)
    for patch in adapter.patches.values():
        assert isinstance(patch, LoRAUpdate)  # for mypy: a ModuleDict forgets the type of its modules
        patch.reset_parameters(generator)
    return adapter


def rank_within_budget(model: LanguageModel, config: AdapterConfig, linears: Mapping[str, Linear]) -> int:
    """Return the largest rank that trains no more than `mop` with the same experts and prompts, its gate included.

    Raises `DataError` when not even rank 1 does, or when the family can have no `mop`.
    """
    try:
        budget = mixture_of_prompts.parameter_budget(model, config)
    except DataError as error:
        raise DataError(
            f"{config.arm} trains as much as mop where no rank is given; but {error}; or give one"
        ) from error
    shapes = [tuple(weight_of(linear).shape) for linear in linears.values()]
    rank_cost = sum(map(sum, shapes))
    if rank_cost > budget:
        raise DataError(
            f"{config.arm} of rank 1 on {len(linears)} linears trains {rank_cost} numbers, and mop with "
            f"{config.experts} experts of {config.prompts_per_expert} prompts {budget}; name fewer adapter_targets or "
            "give a rank"
        )
    return min(budget // rank_cost, min(map(min, shapes)))
