"""Prefix tuning (Li and Liang, 2101.00190): trained keys and values in every layer, without the paper's MLP.

As PEFT has it without projection, with the most tokens that train no more parameters than `mop` with the same settings.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods import mixture_of_prompts
from mopcompress.recover.methods.prompt_initialization import sample_token_embeddings
from mopcompress.recover.methods.prompt_kv import LearnedKeyValues, TensorsByLayer, record_prompt_kv, zero_prompt_kv
from mopcompress.recover.methods.prompt_tuning import ungated_prefix


class TrainedPrefix(nn.Module):
    """Keys and values before every text, in every layer."""

    layer = 0

    def __init__(self, keys: TensorsByLayer, values: TensorsByLayer) -> None:
        super().__init__()
        self.prefix = LearnedKeyValues(keys, values)

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Let text attend to the prefix inside the `with` block, with gradients to the prefix."""
        keys, values = self.prefix()
        return attend_to(ungated_prefix(keys, values, instructions))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Return `active` itself: keys and values are constants already."""
        return lambda instructions: self.active(model, instructions)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return all keys and values; there is no gate."""
        return {"adapter": list(self.prefix.parameters()), "gate": []}


def build(model: LanguageModel, config: AdapterConfig) -> TrainedPrefix:
    """Return the longest prefix within the budget of `mop` with this config, its gate included.

    Prompts per layer do not raise the budget. Raises `DataError` for families without prompt attention, and when a
    prefix of one token exceeds the budget.
    """
    token_cost = trained_parameters(TrainedPrefix(*zero_prompt_kv(model, 0, 1)))
    budget = mixture_of_prompts.parameter_budget(model, config)
    tokens = budget // token_cost
    if tokens == 0:
        raise DataError(
            f"a prefix of one token has {token_cost} parameters here, and mop with the same settings "
            f"{budget}; raise recovery.prompts_per_expert"
        )
    return TrainedPrefix(*zero_prompt_kv(model, 0, tokens)).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> TrainedPrefix:
    """Return a prefix that begins as the keys and values of tokens of training instructions.

    With rotary positions it is at first exactly the arm `input` with those tokens.
    """
    model = inputs.model
    keys, _ = build(model, config).prefix()
    tokens = next(iter(keys.values())).shape[1]
    embeddings = sample_token_embeddings(inputs.states, tokens, init)
    with torch.no_grad():
        return TrainedPrefix(
            *record_prompt_kv(model, embeddings[None], 0, first_position=-tokens if model.is_rotary else 0)
        )
