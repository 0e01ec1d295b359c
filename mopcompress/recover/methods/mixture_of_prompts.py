"""Mixture of Prompts (Dun et al., AAAI 2025, arXiv 2310.02842): gated groups of soft prompts injected mid-network.

Prompts are hidden states at the injection layer that flow on through all layers above it. They see the prompts before
them and never the text (ours), so their keys and values do not depend on the input: one run of the prompt stream serves
a whole batch, and after training they are constants. A mixture whose gate has no preference is exactly a plain prompt.
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
    """Groups of prompts at `layer`, and the gate that weighs them; no gate means every group counts fully.

    `prompt_log_weight` is one trained number added to the log weight of every prompt (ours). Prompts that are not trained yet
    do damage: begun low, the model starts close to where it is without them, and training opens them as they get good.
    """

    prompts: nn.Parameter  # [experts, prompts, hidden]; none in a deep mixture
    layer_key_values: LearnedKeyValues | None

    def __init__(
        self,
        start: Float[Tensor, "groups prompts hidden"],
        layer: int,
        gate: Gate | None,
        *,
        prompt_log_weight: float = 0.0,
        mixing: ExpertWeighting | None = None,
    ) -> None:
        super().__init__()
        self.groups = start.shape[:2]
        self.prompts = nn.Parameter(start.clone())
        self.layer_key_values = None
        self.prompt_log_weight = nn.Parameter(torch.tensor(prompt_log_weight))
        self.layer = layer
        self.gate = gate
        self.mixing = mixing or ExpertWeighting()

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it, text attends to the prompts, with gradients to prompts and gate."""
        return attend_to(self.prefix(model, instructions))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompts to constants; what is left an example is the gate, and which experts are left out."""
        with torch.no_grad():
            everything = self.keys_and_values(model)

        def applied(instructions: InstructionStates) -> AbstractContextManager[None]:
            heard, log_weights = drop_inactive_groups(everything, self.acting(instructions), self.mixing.reading)
            return attend_to(to_prefix(heard, log_weights, self.prompt_log_weight, self.mixing.reading))

        return applied

    def prefix(self, model: LanguageModel, instructions: InstructionStates) -> Prefix:
        """What text attends to, with gradients; in training mode every expert acts."""
        log_weights = self.log_weights(instructions) if self.training else self.acting(instructions)
        return to_prefix(self.keys_and_values(model), log_weights, self.prompt_log_weight, self.mixing.reading)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Prompts with their opening, and the gate."""
        gate = [] if self.gate is None else list(self.gate.parameters())
        prompts = [self.prompts] if self.layer_key_values is None else list(self.layer_key_values.parameters())
        return {"adapter": [*prompts, self.prompt_log_weight], "gate": gate}

    @property
    def experts(self) -> int:
        """The groups that a gate weighs."""
        return self.groups[0] - self.mixing.shared

    def log_weights(self, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """The log weight of each group, the opening left out: 0 as in a plain prompt."""
        return self._with_shared(self._of_experts(instructions))

    def acting(self, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """The same at inference: only the strongest experts act, if so many were asked for."""
        return self._with_shared(top_k_weights(self._of_experts(instructions), self.mixing.top_k or self.experts))

    def chosen(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"] | None:
        """The experts' weights at inference; None without a gate."""
        return None if self.gate is None else self.acting(instructions)[:, : self.experts].exp()

    def _of_experts(self, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
        if self.mixing.weighing is not None:
            return self.mixing.weighing(self.gate, instructions)
        summary = instructions.mean
        return summary.new_zeros(len(summary), self.experts) if self.gate is None else self.gate(summary)

    def _with_shared(self, log_weights: Float[Tensor, "batch experts"]) -> Float[Tensor, "batch groups"]:
        return nn.functional.pad(log_weights, (0, int(self.mixing.shared)))

    def keys_and_values(self, model: LanguageModel) -> tuple[TensorsByLayer, TensorsByLayer]:
        """What text attends to, by layer. Raises `DataError` for some families."""
        if self.layer_key_values is not None:
            return self.layer_key_values()
        # the experts stand one after the other, as in one long prompt: without a gate they are exactly that
        return record_prompt_kv(model, self.prompts.flatten(0, 1)[None], self.layer)

    @torch.no_grad()
    def deepen(self, model: LanguageModel) -> None:
        """Train every layer's keys and values by themselves, in place.

        At first it is the same mixture; its parameters are keys and values times the layers from `layer` on.
        """
        self.layer_key_values = LearnedKeyValues(*self.keys_and_values(model))
        del self.prompts


def build(model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    """Groups of prompts, and a gate for the arms that have one; equally many prompts in all of them.

    Raises `DataError` for some families, `UsageError` when the oracle has no tasks to go by.
    """
    model.require_prompt_attention()
    if config.arm == "oracle" and not config.tasks:
        raise UsageError(
            f"arm oracle: {config.experts} experts are not one for each task of the data; leave --experts out, or the "
            "arm where rows name no tasks"
        )
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    gate = gates.Gate(config.hidden_size, config.experts) if config.arm in GATED else None
    if config.arm == "single":
        return _built(MixtureOfPrompts(prompts.flatten(0, 1)[None], config.layer, None), model, config)
    weighings: dict[str, ExpertWeightFn] = {
        "oracle": partial(oracle_weights, tuple(config.tasks)),
        "shuffled": shuffled_weights,
    }
    mixing = ExpertWeighting(
        weighing=weighings.get(config.arm),
        reading=config.gate_mode,
        shared=config.shared_expert,
        top_k=None if config.arm == "uniform" else config.top_k,
    )
    return _built(MixtureOfPrompts(prompts, config.layer, gate, mixing=mixing), model, config)


def _built(mixture: MixtureOfPrompts, model: LanguageModel, config: AdapterConfig) -> MixtureOfPrompts:
    mixture = mixture.to(model.device)
    if config.per_layer_prompts:
        mixture.to(model.network.dtype).deepen(model)
        mixture.float()
    return mixture


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> MixtureOfPrompts:
    """Prompts that begin as hidden states of training instructions, an expert's from its own domain.

    Every arm gets the very same states, so that arms differ in grouping and gate alone. A gate is pre-trained on the
    domains and tempered. A deep mixture begins as what these prompts are in every layer.
    """
    states = material.states
    mixture = build(material.model, replace(config, per_layer_prompts=False))
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(states, config.tasks, config.experts, generator=generator)
    groups = first_prompts(states, domains, config, generator=generator)
    with torch.no_grad():
        mixture.prompts.copy_(groups.view_as(mixture.prompts))
        mixture.prompt_log_weight.fill_(start.prompt_log_weight)
    if mixture.gate is not None:
        mixture.gate.draw(generator)
        gates.pretrain(mixture.gate, states.summaries, domains.to(states.device), steps=start.gate_pretraining_steps)
        mixture.gate.temper(start.gate_logit_scale)
    if config.per_layer_prompts:
        mixture.deepen(material.model)
    return mixture


def budget(model: LanguageModel, config: AdapterConfig) -> int:
    """How many numbers `mop` trains with these settings, its gate included, a deep one's layers not.

    It is what rivals may train too. Raises `DataError` for families that can have no `mop`.
    """
    return trained_parameters(build(model, replace(config, arm="mop", per_layer_prompts=False)))
