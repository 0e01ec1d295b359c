"""One prompt at the embedding, trained after compression ("Compress, Then Prompt", Xu et al., 2305.11186).

Exactly PEFT's prompt tuning (Lester et al., 2104.08691): prompts stand directly before the text, at positions -P..-1.
Moved by P that is PEFT's 0..P-1, and with rotary embeddings only differences of positions count. So the prompts run
once a step, not once an example. Families with other positions are refused.
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
    """Embeddings of tokens that no vocabulary has, before every text."""

    layer = 0

    def __init__(self, start: Float[Tensor, "prompts hidden"]) -> None:
        super().__init__()
        self.prompts = nn.Parameter(start.clone())

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it, text stands behind the prompt, with gradients to it."""
        return attend_to(_before(instructions, *prefix_kv(model, self.prompts[None])))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """The prompt as constant keys and values."""
        with torch.no_grad():
            keys, values = prefix_kv(model, self.prompts[None])
        return lambda instructions: attend_to(_before(instructions, keys, values))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompt."""
        return {"adapter": [self.prompts], "gate": []}


def build(model: LanguageModel, config: AdapterConfig) -> InputPrompt:
    """As many tokens as the other arms have. Raises `DataError` for some families."""
    require_prefix_support(model)
    prompts = torch.zeros(config.groups * config.prompts_per_expert, config.hidden_size)
    return InputPrompt(prompts).to(model.device)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> InputPrompt:
    """A prompt that begins as embeddings of tokens of training instructions."""
    adapter = build(material.model, config)
    with torch.no_grad():
        adapter.prompts.copy_(sample_token_embeddings(material.states, len(adapter.prompts), start))
    return adapter


def require_prefix_support(model: LanguageModel) -> None:
    """Raise `DataError` when nothing can stand before the text of this family."""
    model.require_prompt_attention()
    model.require_rotary()


def prefix_kv(
    model: LanguageModel, groups: Float[Tensor, "groups prompts hidden"]
) -> tuple[TensorsByLayer, TensorsByLayer]:
    """Keys and values of embedded prompts, each group as if it alone stood directly before the text."""
    return record_prompt_kv(model, groups, 0, first_position=-groups.shape[1])


def _before(instructions: InstructionStates, keys: TensorsByLayer, values: TensorsByLayer) -> Prefix:
    prompts = next(iter(keys.values())).shape[1]
    return Prefix(keys, values, instructions.mean.new_zeros(len(instructions.mean), prompts))
