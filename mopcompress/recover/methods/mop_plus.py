"""`mop+`, our own arm beyond the paper: repair first, then gate.

A compressed model first needs the same repair on every task, and prompts are poor at it: they only bias the output of
attention (Petrov et al., arXiv 2310.19698). So from block `layer` up

- the norms' weights are trained (PERP, arXiv 2312.15230),
- every neuron of an MLP is scaled if the budget has room for it ((IA)^3, arXiv 2205.05638), and
- every linear that writes to the residual stream, and if there is room those that make queries, keys and values, gets
  a low-rank path with gated experts,

      y = W x + sum_e B ((1 + g_e(instruction) s_e) * A x + g_e(instruction) t_e) / E,

  one `down` A and one `up` B for all, as in HydraLoRA (arXiv 2404.19245) with B_e = B diag(s_e) (ours: an expert costs
  two numbers per rank, and a B of its own for each of ten experts would cost more than all prompts). A is random and
  fixed (LoRA-FA, arXiv 2308.03303): its share of the budget buys more ranks, in more places. An expert's shift t_e
  is a bias, as a prompt is (Petrov et al.), in the direction of the path. The gate is that of `mop`, read once per
  example.

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

# AdamW moves a number by its learning rate, whatever its size; so numbers that have to move further have larger units
UNIT = 10.0  # of s and t: an expert has to move by about 1
NEURON_UNIT = 3.0  # of a neuron's scale less 1: (IA)^3 needs three times the learning rate of norms
PATH_UNIT = 3.0  # of B: beside trained norms, LoRA too needs three times their learning rate


class GatedLoRA(nn.Module):
    """A gated low-rank path of one linear: B diag(scale) A + B shift, with the experts' scales and shifts; A is fixed.

    With `scale_neurons`, also a factor for each input of the linear itself.
    """

    def __init__(self, linear: Linear, rank: int, experts: int, *, scale_neurons: bool) -> None:
        super().__init__()
        rows, columns = weight_of(linear).shape
        self.down: Tensor  # for mypy
        self.register_buffer("down", torch.zeros(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.scales = nn.Parameter(torch.zeros(experts, rank))
        self.shifts = nn.Parameter(torch.zeros(experts, rank))
        self.neurons = nn.Parameter(torch.zeros(columns)) if scale_neurons else None

    def gated(self, linear: nn.Module, weights: Float[Tensor, "batch experts"]) -> nn.Module:
        """Return a replacement of the linear for these examples; the experts' weights have a mean of 1."""
        unit = UNIT * weights / weights.shape[1]
        scale, shift, up = 1 + unit @ self.scales, unit @ self.shifts, PATH_UNIT * self.up
        factors = None if self.neurons is None else 1 + NEURON_UNIT * self.neurons
        if len(weights) == 1:
            return _GatedLinearSingle(linear, self.down, up * scale, (shift @ up.T)[0], factors)
        return _GatedLinear(linear, self.down, up, scale, shift, factors)


class _GatedLinear(nn.Module):
    """A linear with its low-rank path, scaled and shifted for each example of a batch."""

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
        self._parts = (linear, down, up, scale, shift, factors)  # in a tuple: neither submodule nor parameters

    def forward(self, inputs: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        linear, down, up, scale, shift, factors = self._parts
        # tokens of an example are adjacent, also in families that flatten batch and time, and so are its beams
        low = nn.functional.linear(inputs, down).view(len(scale), -1, len(down))
        low = torch.addcmul(shift[:, None], low, scale[:, None]).view(*inputs.shape[:-1], len(down))
        return linear(inputs if factors is None else inputs * factors) + nn.functional.linear(low, up)


class _GatedLinearSingle(nn.Module):
    """A `_GatedLinear` for one example, as in a chat, where a step is so short that every operation counts."""

    def __init__(
        self,
        linear: nn.Module,
        down: Tensor,
        up: Float[Tensor, "rows rank"],
        bias: Float[Tensor, " rows"],
        factors: Float[Tensor, " columns"] | None,
    ) -> None:
        super().__init__()
        self._parts = (linear, down, up, bias, factors)

    def forward(self, inputs: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        linear, down, up, bias, factors = self._parts
        path = nn.functional.linear(nn.functional.linear(inputs, down), up, bias)
        return linear(inputs if factors is None else inputs * factors) + path


class GatedRepair(nn.Module):
    """Trained norms that replace the network's own, and low-rank paths of its linears, by dotted names."""

    def __init__(self, layer: int, norms: Mapping[str, nn.Module], paths: Mapping[str, GatedLoRA], gate: Gate) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate
        # torch takes no dots in the names of a ModuleDict
        self.norms = nn.ModuleDict({name.replace(".", "/"): norm for name, norm in norms.items()})
        self.linears = nn.ModuleDict({name.replace(".", "/"): path for name, path in paths.items()})

    @contextmanager
    def active(self, model: LanguageModel, instructions: InstructionStates) -> Iterator[None]:
        """Apply the repair inside the `with` block, its low-rank paths mixed for these examples."""
        weights = self.gate(instructions.mean).exp()
        replacements = {name.replace("/", "."): norm for name, norm in self.norms.items()}
        for key, path in self.linears.items():
            name = key.replace("/", ".")
            replacements[name] = path.gated(model.network.get_submodule(name), weights)  # type: ignore[operator]
        with replaced_modules(model.network, replacements):
            yield

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Return `active`: the gate, and 2 `rank` numbers per linear, are all that it computes per example."""
        return lambda instructions: self.active(model, instructions)

    def expert_weights(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        """Return the gate's weights of the experts."""
        return self.gate(instructions.mean).exp()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return norms and paths, and the gate's parameters."""
        return {"adapter": [*self.norms.parameters(), *self.linears.parameters()], "gate": [*self.gate.parameters()]}


@dataclass(frozen=True)
class BudgetSplit:
    """Sizes of the parts that share the budget."""

    rank: int  # of the paths of linears that write to the residual stream
    gate_width: int
    scale_neurons: bool
    adapt_attention: bool  # whether queries, keys and values have a path of rank 1


def build(model: LanguageModel, config: AdapterConfig) -> GatedRepair:
    """Return the largest repair within the budget of `mop`. Raises `DataError` for families with unknown linears."""
    norms, writers = norms_from_layer(model, config.layer), writers_from_layer(model, config.layer)
    attention, readers = attention_readers_from_layer(model, config.layer), mlp_readers_from_layer(model, config.layer)
    sizes = split_budget(
        mixture_of_prompts.parameter_budget(model, config)
        - sum(parameter.numel() for norm in norms.values() for parameter in norm.parameters()),
        rank_cost=_rank_cost(writers, config.experts),
        attention_cost=_rank_cost(attention, config.experts),
        neuron_cost=sum(weight_of(linear).shape[1] for linear in readers.values()),
        width_cost=config.hidden_size + 1 + config.experts,
        gate_bias_cost=config.experts,
        max_rank=min(min(weight_of(linear).shape) for linear in writers.values()),
    )
    ranks = dict.fromkeys(writers, sizes.rank) | (dict.fromkeys(attention, 1) if sizes.adapt_attention else {})
    paths = {
        name: GatedLoRA(linear, ranks[name], config.experts, scale_neurons=sizes.scale_neurons and name in readers)
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


def _rank_cost(linears: Mapping[str, Linear], experts: int) -> int:
    """Return how many numbers paths of rank 1 train: a column of B, and the experts' scales and shifts."""
    return sum(weight_of(linear).shape[0] + 2 * experts for linear in linears.values())


def split_budget(
    budget: int,
    *,
    rank_cost: int,
    attention_cost: int,
    neuron_cost: int,
    width_cost: int,
    gate_bias_cost: int,
    max_rank: int,
) -> BudgetSplit:
    """Split a number of parameters between the parts; costs are in parameters, of a rank or a unit of width.

    Rank 1 and the narrowest gate come first. Then, while there is room: neurons, attention, ranks up to `max_rank`, and
    the width of the gate. Raises `DataError` when there is no room for rank 1 and the narrowest gate.
    """
    min_width = gates.WIDTH // 8
    least = rank_cost + gate_bias_cost + min_width * width_cost
    room = budget - least
    if room < 0:
        raise DataError(
            f"mop+: rank 1 and a gate of width {min_width} are {least} numbers besides the norms, and the budget of "
            f"mop leaves {budget}; raise recovery.layer or recovery.prompts_per_expert"
        )
    scale_neurons = neuron_cost <= room
    room -= neuron_cost if scale_neurons else 0
    adapt_attention = attention_cost <= room
    room -= attention_cost if adapt_attention else 0
    more_ranks = min(max_rank - 1, room // rank_cost)
    room -= more_ranks * rank_cost
    width = min(gates.WIDTH, min_width + room // width_cost)
    return BudgetSplit(1 + more_ranks, width, scale_neurons, adapt_attention)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> GatedRepair:
    """Return the bare model exactly, with a gate that is pre-trained on the domains and scaled, as for `mop`."""
    states = inputs.states
    adapter = build(inputs.model, config)
    generator = torch.Generator().manual_seed(init.seed)
    domains = expert_domains(states, config.tasks, config.experts, generator=generator)
    adapter.gate.reset_parameters(generator)
    gates.pretrain(adapter.gate, states.means, domains.to(states.device), steps=init.gate_pretraining_steps)
    adapter.gate.scale_logits(init.gate_logit_scale)
    with torch.no_grad():
        for path in adapter.linears.values():
            assert isinstance(path, GatedLoRA)  # for mypy: a ModuleDict forgets the type of its modules
            down = torch.empty(path.down.shape).normal_(std=path.down.shape[1] ** -0.5, generator=generator)
            path.down.copy_(down)
    return adapter
