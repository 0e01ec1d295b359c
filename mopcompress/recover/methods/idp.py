"""Inference-time dynamic prompting (Hoang et al., arXiv 2310.00867): of several prompts, the one most attended to.

No gate is trained. The instruction's own attention at the adapter's layer chooses, for each example and in training
too: the group of prompts with the highest mean over instruction tokens and heads stays, the others are gone there and
above. The choice is hard, so gradients reach the chosen group alone.

Differences from the paper (ours): prompts stand mid-network at the injection layer, as those of every arm here, and are
trained through the choice; an opening is trained with them. The groups do not see each other: each is what it would be
alone, so one group is the arm `single`.
"""

import math
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import Prefix, attend_to, record_attention
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.expert_weights import KeyValues, drop_inactive_groups, to_prefix
from mopcompress.recover.methods.prompt_initialization import expert_domains, first_prompts
from mopcompress.recover.methods.prompt_kv import record_prompt_kv


class DynamicPrompts(nn.Module):
    """Groups of prompts at `layer` of which one acts; `prompt_log_weight` is as in a mixture."""

    def __init__(
        self, start: Float[Tensor, "groups prompts hidden"], layer: int, *, prompt_log_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.prompts = nn.Parameter(start.clone())
        self.prompt_log_weight = nn.Parameter(torch.tensor(prompt_log_weight))
        self.layer = layer

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it, text attends to the group that its instruction chose."""
        return self._attending(model, self.keys_and_values(model), instructions)

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompts to constants; what is left an example is one block's attention."""
        with torch.no_grad():
            everything = self.keys_and_values(model)
        return lambda instructions: self._attending(model, everything, instructions)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Prompts with their opening; there is no gate."""
        return {"adapter": [self.prompts, self.prompt_log_weight], "gate": []}

    def chosen(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """1 for the group that acts, 0 for the others."""
        return self._log_weights(model, self.keys_and_values(model), instructions).exp()

    def keys_and_values(self, model: LanguageModel) -> KeyValues:
        """What text attends to, by layer: [kv_heads, groups x prompts, head]; no group sees another."""
        return record_prompt_kv(model, self.prompts, self.layer)

    def attention(
        self, model: LanguageModel, everything: KeyValues, instructions: InstructionStates
    ) -> Float[Tensor, "batch groups"]:
        """Attention to each group at the adapter's layer: mean over instruction tokens and heads, all groups there."""
        hidden, count = instructions.hidden, instructions.lengths
        keys, values = everything
        logits = self.prompt_log_weight.expand(len(hidden), next(iter(keys.values())).shape[1])
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with torch.no_grad(), record_attention() as seen, attend_to(Prefix(keys, values, logits)):
            model.run_block(tokens, hidden, self.layer)
        real = torch.arange(hidden.shape[1], device=hidden.device) < count[:, None]
        means = (seen[self.layer] * real[..., None]).sum(1) / count[:, None]
        return means.unflatten(1, (len(self.prompts), -1)).sum(2)

    def _log_weights(
        self, model: LanguageModel, everything: KeyValues, instructions: InstructionStates
    ) -> Float[Tensor, "batch groups"]:
        attention = self.attention(model, everything, instructions)
        return torch.full_like(attention, -math.inf).scatter(1, attention.argmax(1, keepdim=True), 0.0)

    def _attending(
        self, model: LanguageModel, everything: KeyValues, instructions: InstructionStates
    ) -> AbstractContextManager[None]:
        log_weights = self._log_weights(model, everything, instructions)
        heard, log_weights = drop_inactive_groups(everything, log_weights, "renormalised")
        return attend_to(to_prefix(heard, log_weights, self.prompt_log_weight, "renormalised"))


def build(model: LanguageModel, config: AdapterConfig) -> DynamicPrompts:
    """As many groups as a mixture has. Raises `DataError` for some families."""
    model.require_prompt_attention()
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    return DynamicPrompts(prompts, config.layer).to(model.device)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> DynamicPrompts:
    """Prompts that begin as those of a mixture's experts."""
    adapter = build(material.model, config)
    generator = torch.Generator().manual_seed(start.seed)
    domains = expert_domains(material.states, config.tasks, config.experts, generator=generator)
    with torch.no_grad():
        adapter.prompts.copy_(first_prompts(material.states, domains, config, generator=generator))
        adapter.prompt_log_weight.fill_(start.prompt_log_weight)
    return adapter
