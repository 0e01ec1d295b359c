"""Mixture of Prompts (Dun et al., AAAI 2025, arXiv 2310.02842): gated groups of soft prompts injected mid-network.

Prompts are hidden states at the injection layer that flow on through all layers above it. They see the prompts before
them and never the text (ours), so their keys and values do not depend on the input: one run of the prompt stream serves
a whole batch, and after training they are constants. A mixture whose gate has no preference is exactly a plain prompt.

Five arms are built here. They begin with the same prompts and differ in grouping and gate alone:

- `single`: all prompts in one group, a plain prompt in every gate mode.
- `mop`: groups of prompts, the experts, weighed by a gate that reads the instruction.
- `uniform`: the experts without a gate, each of weight 1. At equal seeds it equals `single` before and after training.
  In the gate mode `separate` it does not, and the comparison shows how much of `mop` is due to its gate.
- `oracle`: all weight on the expert of the example's true task. No gate is trained, and none could tell tasks apart
  better.
- `shuffled`: `mop`, but the gate reads another example (see `expert_weights.shuffled_weights`), so that it has the
  same parameters and no information about its own example.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.errors import UsageError
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import Prefix, attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods import gate as gates
from mopcompress.recover.methods.expert_weights import (
    ExpertWeightFn,
    ExpertWeighting,
    drop_inactive_groups,
    oracle_weights,
    shuffled_weights,
    to_prefix,
    top_k_weights,
)
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.prompt_initialization import expert_domains, first_prompts
from mopcompress.recover.methods.prompt_kv import LearnedKeyValues, TensorsByLayer, record_prompt_kv

GATED = ("mop", "shuffled")


class MixtureOfPrompts(nn.Module):
    """Groups of prompts at `layer`, and the gate that weighs them; without a gate every group has weight 1.

    `prompt_log_weight` is one trained number added to the log weight of every prompt (ours). Untrained prompts do
    damage. If the number begins low, the model starts close to where it is without prompts, and training raises it.
    """

    prompts: nn.Parameter  # [groups, prompts, hidden]; absent with prompts per layer
    layer_key_values: LearnedKeyValues | None  # None: prompts flow on from `layer`

    def __init__(
        self,
        initial_prompts: Float[Tensor, "groups prompts hidden"],
        layer: int,
        gate: Gate | None,
        *,
        prompt_log_weight: float = 0.0,
        weighting: ExpertWeighting | None = None,
    ) -> None:
        super().__init__()
        self.groups = len(initial_prompts)
        self.prompts = nn.Parameter(initial_prompts.clone())
        self.layer_key_values = None
        self.prompt_log_weight = nn.Parameter(torch.tensor(prompt_log_weight))
        self.layer = layer
        self.gate = gate
        self.weighting = weighting or ExpertWeighting()

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Let text attend to the prompts inside the `with` block, with gradients to prompts and gate."""
        return attend_to(self.prefix(model, instructions))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompts to constant keys and values.

        Only the gate, and the choice of active experts, still runs per example.
        """
        mode = self.weighting.mode
        with torch.no_grad():
            all_groups = self.keys_and_values(model)

        def apply(instructions: InstructionStates) -> AbstractContextManager[None]:
            active, log_weights = drop_inactive_groups(all_groups, self.inference_log_weights(instructions), mode)
            return attend_to(to_prefix(active, log_weights, self.prompt_log_weight, mode))

        return apply

    def prefix(self, model: LanguageModel, instructions: InstructionStates) -> Prefix:
        """Return the prefix that text attends to, with gradients; in training mode every expert acts."""
        log_weights = (
            self.training_log_weights(instructions) if self.training else self.inference_log_weights(instructions)
        )
        return to_prefix(self.keys_and_values(model), log_weights, self.prompt_log_weight, self.weighting.mode)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the prompts with `prompt_log_weight`, and the gate's parameters."""
        gate = [] if self.gate is None else list(self.gate.parameters())
        prompts = [self.prompts] if self.layer_key_values is None else list(self.layer_key_values.parameters())
        return {"adapter": [*prompts, self.prompt_log_weight], "gate": gate}

    @property
    def experts(self) -> int:
        """Number of groups that a gate weighs: all but the shared one."""
        return self.groups - self.weighting.shared

    def training_log_weights(self, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """Return the log weight of each group with all experts acting: 0 as in a plain prompt.

        `prompt_log_weight` is not part of it.
        """
        return self._with_shared_group(self._expert_log_weights(instructions))

    def inference_log_weights(self, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """Return the log weight of each group with the `top_k` strongest experts acting, or all without `top_k`."""
        log_weights = self._expert_log_weights(instructions)
        return self._with_shared_group(top_k_weights(log_weights, self.weighting.top_k or self.experts))

    def expert_weights(
        self, model: LanguageModel, instructions: InstructionStates
    ) -> Float[Tensor, "batch experts"] | None:
        """Return the experts' weights at inference; None without a gate."""
        return None if self.gate is None else self.inference_log_weights(instructions)[:, : self.experts].exp()

    def _expert_log_weights(self, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        if self.weighting.weight_fn is not None:
            return self.weighting.weight_fn(self.gate, instructions)
        means = instructions.mean
        return means.new_zeros(len(means), self.experts) if self.gate is None else self.gate(means)

    def _with_shared_group(self, log_weights: Float[Tensor, "batch experts"]) -> Float[Tensor, "batch groups"]:
        return nn.functional.pad(log_weights, (0, int(self.weighting.shared)))

    def keys_and_values(self, model: LanguageModel) -> tuple[TensorsByLayer, TensorsByLayer]:
        """Return the prompts' keys and values by layer. Raises `DataError` for families without prompt attention."""
        if self.layer_key_values is not None:
            return self.layer_key_values()
        # the experts follow one another as in one long prompt: without a gate they are exactly that
        return record_prompt_kv(model, self.prompts.flatten(0, 1)[None], self.layer)

    @torch.no_grad()
    def use_per_layer_prompts(self, model: LanguageModel) -> None:
        """Replace the flowing prompts, in place, by keys and values that are trained in each layer from `layer` up.

        The mixture computes the same until it is trained further.
        """
        self.layer_key_values = LearnedKeyValues(*self.keys_and_values(model))
        del self.prompts


def build(model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    """Return groups of equally many prompts, with a gate for the arms that have one.

    Raises `DataError` for families without prompt attention, `UsageError` for the oracle without tasks.
    """
    model.require_prompt_attention()
    if config.arm == "oracle" and not config.tasks:
        raise UsageError(
            f"arm oracle: {config.experts} experts are not one for each task of the data; leave recovery.experts out, "
            "or the arm where rows name no tasks"
        )
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    gate = gates.Gate(config.hidden_size, config.experts) if config.arm in GATED else None
    weight_fns: dict[str, ExpertWeightFn] = {
        "oracle": partial(oracle_weights, tuple(config.tasks)),
        "shuffled": shuffled_weights,
    }
    if config.arm == "single":
        mixture = MixtureOfPrompts(prompts.flatten(0, 1)[None], config.layer, None)
    else:
        weighting = ExpertWeighting(
            weight_fn=weight_fns.get(config.arm),
            mode=config.gate_mode,
            shared=config.shared_expert,
            top_k=None if config.arm == "uniform" else config.top_k,
        )
        mixture = MixtureOfPrompts(prompts, config.layer, gate, weighting=weighting)
    mixture = mixture.to(model.device)
    if config.per_layer_prompts:
        mixture.to(model.network.dtype).use_per_layer_prompts(model)
        mixture.float()
    return mixture


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> MixtureOfPrompts:
    """Return a mixture whose prompts are hidden states of training instructions, an expert's from its own domain.

    Every arm gets the very same states, so that arms differ in grouping and gate alone. A gate is pre-trained on the
    domains, and its logits are scaled. Prompts per layer begin as the keys and values of these states.
    """
    states = inputs.states
    mixture = build(inputs.model, replace(config, per_layer_prompts=False))
    generator = torch.Generator().manual_seed(init.seed)
    domains = expert_domains(states, config.tasks, config.experts, generator=generator)
    prompts = first_prompts(states, domains, config, generator=generator)
    with torch.no_grad():
        mixture.prompts.copy_(prompts.view_as(mixture.prompts))
        mixture.prompt_log_weight.fill_(init.prompt_log_weight)
    if mixture.gate is not None:
        mixture.gate.reset_parameters(generator)
        gates.pretrain(mixture.gate, states.means, domains.to(states.device), steps=init.gate_pretraining_steps)
        mixture.gate.scale_logits(init.gate_logit_scale)
    if config.per_layer_prompts:
        mixture.use_per_layer_prompts(inputs.model)
    return mixture


def parameter_budget(model: LanguageModel, config: AdapterConfig) -> int:
    """Return the number of parameters that `mop` trains with these settings, its gate included.

    Rivals may train as many. Prompts per layer do not raise it. Raises `DataError` for families that can have no `mop`.
    """
    return trained_parameters(build(model, replace(config, arm="mop", per_layer_prompts=False)))
