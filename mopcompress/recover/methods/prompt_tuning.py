"""One prompt at the embedding, trained after compression ("Compress, Then Prompt", Xu et al., 2305.11186).

Exactly PEFT's prompt tuning (Lester et al., 2104.08691). Prompts come directly before the text, at positions -P..-1.
Moved by P that is PEFT's 0..P-1, and with rotary embeddings only differences of positions count. So the prompts run
once per step, not once per example. Families with other positions raise `DataError`.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import Prefix, attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.prompt_initialization import sample_token_embeddings
from mopcompress.recover.methods.prompt_kv import TensorsByLayer, record_prompt_kv


class InputPrompt(nn.Module):
    """Trained token embeddings, outside of any vocabulary, before every text."""

    layer = 0

    def __init__(self, initial_prompts: Float[Tensor, "prompts hidden"]) -> None:
        super().__init__()
        self.prompts = nn.Parameter(initial_prompts.clone())

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Put the prompt before the text inside the `with` block, with gradients to the prompt."""
        return attend_to(ungated_prefix(*prefix_kv(model, self.prompts[None]), instructions))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Compile the prompt to constant keys and values."""
        with torch.no_grad():
            keys, values = prefix_kv(model, self.prompts[None])
        return lambda instructions: attend_to(ungated_prefix(keys, values, instructions))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the prompt; there is no gate."""
        return {"adapter": [self.prompts], "gate": []}


def build(model: LanguageModel, config: AdapterConfig) -> InputPrompt:
    """Return a prompt of as many tokens as the other arms have.

    Raises `DataError` for families without prompt attention or rotary positions.
    """
    require_prefix_support(model)
    prompts = torch.zeros(config.groups * config.prompts_per_expert, config.hidden_size)
    return InputPrompt(prompts).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> InputPrompt:
    """Return a prompt that begins as embeddings of tokens of training instructions."""
    adapter = build(inputs.model, config)
    with torch.no_grad():
        adapter.prompts.copy_(sample_token_embeddings(inputs.states, len(adapter.prompts), init))
    return adapter


def require_prefix_support(model: LanguageModel) -> None:
    """Raise `DataError` for families in which no prompt can come before the text."""
    model.require_prompt_attention()
    model.require_rotary()


def prefix_kv(
    model: LanguageModel, groups: Float[Tensor, "groups prompts hidden"]
) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Run each group of prompts alone at positions -P to -1; return its keys and values per layer."""
    return record_prompt_kv(model, groups, 0, first_position=-groups.shape[1])


def ungated_prefix(keys: TensorsByLayer, values: TensorsByLayer, instructions: InstructionStates) -> Prefix:
    """Return a prefix in which every prompt has weight 1 for every example of the batch."""
    prompts = next(iter(keys.values())).shape[1]
    return Prefix(keys, values, instructions.mean.new_zeros(len(instructions.mean), prompts))
