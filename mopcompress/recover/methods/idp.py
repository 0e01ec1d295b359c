"""Inference-time dynamic prompting (Hoang et al., arXiv 2310.00867): of several prompts, the one most attended to.

No gate is trained. The instruction's own attention at the adapter's layer chooses, for each example and in training
too. The group of prompts with the highest mean attention over instruction tokens and heads acts, and the others are
absent there and above. The choice is hard, so gradients reach the chosen group alone.

Differences from the paper (ours): prompts are injected mid-network, as those of every arm here, and are trained through
the choice; `prompt_log_weight` is trained with them. The groups do not see each other: each is what it would be alone,
so one group is the arm `single`.
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
    """Groups of prompts at `layer`, one of which acts per example; `prompt_log_weight` is as in a mixture."""

    def __init__(
        self, initial_prompts: Float[Tensor, "groups prompts hidden"], layer: int, *, prompt_log_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.prompts = nn.Parameter(initial_prompts.clone())
        self.prompt_log_weight = nn.Parameter(torch.tensor(prompt_log_weight))
        self.layer = layer

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Let text attend to the group that its instruction chose, inside the `with` block."""
        return self._attend(model, self.keys_and_values(model), instructions)

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompts to constant keys and values; one block's attention still runs per example."""
        with torch.no_grad():
            all_groups = self.keys_and_values(model)
        return lambda instructions: self._attend(model, all_groups, instructions)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the prompts with `prompt_log_weight`; there is no gate."""
        return {"adapter": [self.prompts, self.prompt_log_weight], "gate": []}

    def expert_weights(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch groups"]:
        """Return 1 for the group that acts, 0 for the others."""
        return self._log_weights(model, self.keys_and_values(model), instructions).exp()

    def keys_and_values(self, model: LanguageModel) -> KeyValues:
        """Return keys and values by layer: [kv_heads, groups x prompts, head]; no group sees another."""
        return record_prompt_kv(model, self.prompts, self.layer)

    def attention(
        self, model: LanguageModel, all_groups: KeyValues, instructions: InstructionStates
    ) -> Float[Tensor, "batch groups"]:
        """Return the attention to each group at the adapter's layer: mean over instruction tokens and heads.

        Text attends to all groups at once here.
        """
        hidden, count = instructions.hidden, instructions.lengths
        keys, values = all_groups
        logits = self.prompt_log_weight.expand(len(hidden), next(iter(keys.values())).shape[1])
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with torch.no_grad(), record_attention() as recorded, attend_to(Prefix(keys, values, logits)):
            model.run_block(tokens, hidden, self.layer)
        is_token = torch.arange(hidden.shape[1], device=hidden.device) < count[:, None]
        means = (recorded[self.layer] * is_token[..., None]).sum(1) / count[:, None]
        return means.unflatten(1, (len(self.prompts), -1)).sum(2)

    def _log_weights(
        self, model: LanguageModel, all_groups: KeyValues, instructions: InstructionStates
    ) -> Float[Tensor, "batch groups"]:
        attention = self.attention(model, all_groups, instructions)
        return torch.full_like(attention, -math.inf).scatter(1, attention.argmax(1, keepdim=True), 0.0)

    def _attend(
        self, model: LanguageModel, all_groups: KeyValues, instructions: InstructionStates
    ) -> AbstractContextManager[None]:
        log_weights = self._log_weights(model, all_groups, instructions)
        active, log_weights = drop_inactive_groups(all_groups, log_weights, "renormalised")
        return attend_to(to_prefix(active, log_weights, self.prompt_log_weight, "renormalised"))


def build(model: LanguageModel, config: AdapterConfig) -> DynamicPrompts:
    """Return as many groups as a mixture has. Raises `DataError` for families without prompt attention."""
    model.require_prompt_attention()
    prompts = torch.zeros(config.groups, config.prompts_per_expert, config.hidden_size)
    return DynamicPrompts(prompts, config.layer).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> DynamicPrompts:
    """Return groups with the first prompts of a mixture's experts."""
    adapter = build(inputs.model, config)
    generator = torch.Generator().manual_seed(init.seed)
    domains = expert_domains(inputs.states, config.tasks, config.experts, generator=generator)
    with torch.no_grad():
        adapter.prompts.copy_(first_prompts(inputs.states, domains, config, generator=generator))
        adapter.prompt_log_weight.fill_(init.prompt_log_weight)
    return adapter
