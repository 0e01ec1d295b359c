"""`mop+`, our own arm beyond the paper: repair first, then gate.

A compressed model first needs the same repair on every task, and prompts are poor at it: they only bias what attention
gives (Petrov et al., arXiv 2310.19698). So from block `layer` up

- the norms' weights are trained (PERP, arXiv 2312.15230),
- every neuron of an MLP is scaled where the budget has room for it ((IA)^3, arXiv 2205.05638), and
- every linear that writes to the residual stream, and where there is room those that make queries, keys and values,
  get a low-rank path with gated experts,

      y = W x + sum_e B ((1 + g_e(instruction) s_e) * A x + g_e(instruction) t_e) / E,

  one `down` A and one `up` B for all, as in HydraLoRA (arXiv 2404.19245) with B_e = B diag(s_e) (ours: an expert costs
  two numbers a rank, where a B of its own for each of ten experts would cost more than all prompts). A is drawn and
  stays as it is (LoRA-FA, arXiv 2308.03303): what it would cost buys more ranks, in more places. An expert's shift t_e
  is a bias, which is what a prompt is (Petrov et al.), in the direction of the path. The gate is that of `mop`, read
  once an example.

It begins at the bare model exactly: B = 0, s = t = 0, neurons times 1, norms as they are. It trains at most as many
numbers as `mop` with the same settings; A, which is stored and not trained, is about as many again.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, replaced_modules, weight_of
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods import gate as gates
from mopcompress.recover.methods import mixture_of_prompts
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.norm_tuning import norms_from_layer
from mopcompress.recover.methods.prompt_initialization import expert_domains
from mopcompress.recover.methods.target_linears import (
    attention_readers_from_layer,
    mlp_readers_from_layer,
    writers_from_layer,
)

# AdamW moves a number by its rate, whatever its size; so numbers that have to move further are stored in larger units
UNIT = 10.0  # of s and t: an expert has to move by about 1
NEURON_UNIT = 3.0  # of a neuron's scale less 1: (IA)^3 likes three times the rate of norms
PATH_UNIT = 3.0  # of B: beside norms that are trained, LoRA too likes three times their rate


class GatedLoRA(nn.Module):
    """What stands beside one linear: B diag(scale) A + B shift, with the experts' scales and shifts. A is not trained.

    With `neurons`, a factor for each input of the linear itself, too.
    """

    def __init__(self, linear: Linear, rank: int, experts: int, *, neurons: bool) -> None:
        super().__init__()
        rows, columns = weight_of(linear).shape
        self.down: Tensor  # for mypy
        self.register_buffer("down", torch.zeros(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.scales = nn.Parameter(torch.zeros(experts, rank))
        self.shifts = nn.Parameter(torch.zeros(experts, rank))
        self.neurons = nn.Parameter(torch.zeros(columns)) if neurons else None

    def beside(self, linear: nn.Module, weights: Float[Tensor, "batch experts"]) -> nn.Module:
        """What stands in the linear's place for these examples; the experts' weights have a mean of 1."""
        unit = UNIT * weights / weights.shape[1]
        scale, shift, up = 1 + unit @ self.scales, unit @ self.shifts, PATH_UNIT * self.up
        factors = None if self.neurons is None else 1 + NEURON_UNIT * self.neurons
        if len(weights) == 1:
            return _GatedLinearSingle(linear, self.down, up * scale, (shift @ up.T)[0], factors)
        return _GatedLinear(linear, self.down, up, scale, shift, factors)


class _GatedLinear(nn.Module):
    def __init__(
        self,
        linear: nn.Module,
        down: Tensor,
        up: Tensor,
        scale: Float[Tensor, "batch rank"],
        shift: Float[Tensor, "batch rank"],
        factors: Float[Tensor, " columns"] | None,
    ) -> None:
        super().__init__()
        self._own = (linear, down, up, scale, shift, factors)  # in a tuple: neither submodule nor parameters

    def forward(self, inputs: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        linear, down, up, scale, shift, factors = self._own
        # an example's tokens stand next to each other, in families that flatten them too, and so do its beams
        low = nn.functional.linear(inputs, down).view(len(scale), -1, len(down))
        low = torch.addcmul(shift[:, None], low, scale[:, None]).view(*inputs.shape[:-1], len(down))
        return linear(inputs if factors is None else inputs * factors) + nn.functional.linear(low, up)


class _GatedLinearSingle(nn.Module):
    """The same for one example, as in a chat, where a step is so short that every operation counts."""

    def __init__(
        self,
        linear: nn.Module,
        down: Tensor,
        up: Float[Tensor, "rows rank"],
        bias: Float[Tensor, " rows"],
        factors: Float[Tensor, " columns"] | None,
    ) -> None:
        super().__init__()
        self._own = (linear, down, up, bias, factors)

    def forward(self, inputs: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        linear, down, up, bias, factors = self._own
        path = nn.functional.linear(nn.functional.linear(inputs, down), up, bias)
        return linear(inputs if factors is None else inputs * factors) + path


class GatedRepair(nn.Module):
    """Norms in place of the network's own, and low-rank paths beside its linears, by dotted names."""

    def __init__(self, layer: int, norms: Mapping[str, nn.Module], paths: Mapping[str, GatedLoRA], gate: Gate) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate
        # torch takes no dots in the names of a ModuleDict
        self.norms = nn.ModuleDict({name.replace(".", "/"): norm for name, norm in norms.items()})
        self.linears = nn.ModuleDict({name.replace(".", "/"): path for name, path in paths.items()})

    @contextmanager
    def active(self, model: LanguageModel, instructions: InstructionStates) -> Iterator[None]:
        """Inside it the repair is in force, its low-rank paths mixed for these examples."""
        weights = self.gate(instructions.mean).exp()
        standing = {name.replace("/", "."): norm for name, norm in self.norms.items()}
        for key, path in self.linears.items():
            name = key.replace("/", ".")
            standing[name] = path.beside(model.network.get_submodule(name), weights)  # type: ignore[operator]
        with replaced_modules(model.network, standing):
            yield

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Nothing but the gate and 2 `rank` numbers a linear is computed an example, so there is nothing to do once."""
        return lambda instructions: self.active(model, instructions)

    def chosen(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        """The experts' weights."""
        return self.gate(instructions.mean).exp()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Norms and paths, and the gate."""
        return {"adapter": [*self.norms.parameters(), *self.linears.parameters()], "gate": [*self.gate.parameters()]}


@dataclass(frozen=True)
class BudgetSplit:
    """What is left to choose within the budget."""

    rank: int  # beside what writes to the residual stream
    gate_width: int
    neurons: bool  # whether they are scaled
    attention: bool  # whether queries, keys and values have a path of rank 1


def build(model: LanguageModel, config: AdapterConfig) -> GatedRepair:
    """The largest repair within the budget of `mop`. Raises `DataError` for families whose linears have other names."""
    norms, writers = norms_from_layer(model, config.layer), writers_from_layer(model, config.layer)
    attention, readers = attention_readers_from_layer(model, config.layer), mlp_readers_from_layer(model, config.layer)
    sizes = split_budget(
        mixture_of_prompts.budget(model, config)
        - sum(one.numel() for norm in norms.values() for one in norm.parameters()),
        of_a_rank=_of_a_rank(writers, config.experts),
        of_attention=_of_a_rank(attention, config.experts),
        of_neurons=sum(weight_of(linear).shape[1] for linear in readers.values()),
        of_a_width=config.hidden_size + 1 + config.experts,
        fixed=config.experts,
        most=min(min(weight_of(linear).shape) for linear in writers.values()),
    )
    ranks = dict.fromkeys(writers, sizes.rank) | (dict.fromkeys(attention, 1) if sizes.attention else {})
    paths = {
        name: GatedLoRA(linear, ranks[name], config.experts, neurons=sizes.neurons and name in readers)
        for name, linear in (writers | attention).items()
        if name in ranks
    }
    adapter = GatedRepair(
        config.layer,
        {name: copy.deepcopy(norm).requires_grad_(True) for name, norm in norms.items()},
        paths,
        Gate(config.hidden_size, config.experts, width=sizes.gate_width),
    )
    return adapter.to(model.device)


def _of_a_rank(linears: Mapping[str, Linear], experts: int) -> int:
    """Numbers that paths of rank 1 train: a column of B, and the experts' scales and shifts."""
    return sum(weight_of(linear).shape[0] + 2 * experts for linear in linears.values())


def split_budget(
    budget: int, *, of_a_rank: int, of_attention: int, of_neurons: int, of_a_width: int, fixed: int, most: int
) -> BudgetSplit:
    """Rank 1 and the narrowest gate; then, as far as there is room, neurons, attention, more ranks up to `most`, gate.

    Raises `DataError` when there is no room for either of the first.
    """
    narrow = gates.WIDTH // 8
    least = of_a_rank + fixed + narrow * of_a_width
    room = budget - least
    if room < 0:
        raise DataError(
            f"mop+: rank 1 and a gate of width {narrow} are {least} numbers besides the norms, and the budget of mop "
            f"leaves {budget}; raise --layer or --prompts-per-expert"
        )
    neurons = of_neurons <= room
    room -= of_neurons if neurons else 0
    attention = of_attention <= room
    room -= of_attention if attention else 0
    ranks = min(most - 1, room // of_a_rank)
    room -= ranks * of_a_rank
    return BudgetSplit(1 + ranks, min(gates.WIDTH, narrow + room // of_a_width), neurons, attention)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> GatedRepair:
    """The bare model exactly, with a gate that is pre-trained on the domains and tempered, as for `mop`."""
    states = material.states
    adapter = build(material.model, config)
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(states, config.tasks, config.experts, generator=generator)
    adapter.gate.draw(generator)
    gates.pretrain(adapter.gate, states.summaries, domains.to(states.device), steps=start.gate_pretraining_steps)
    adapter.gate.temper(start.gate_logit_scale)
    with torch.no_grad():
        for path in adapter.linears.values():
            assert isinstance(path, GatedLoRA)  # for mypy: a ModuleDict forgets what it holds
            drawn = torch.empty(path.down.shape).normal_(std=path.down.shape[1] ** -0.5, generator=generator)
            path.down.copy_(drawn)
    return adapter
