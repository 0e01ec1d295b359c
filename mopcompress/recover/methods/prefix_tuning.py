"""Prefix tuning (Li and Liang, 2101.00190): trained keys and values in every layer, without the paper's MLP.

As PEFT has it without projection, and as many tokens as are worth the parameters of `mop` with the same settings.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.attention import Prefix, attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods import mixture_of_prompts
from mopcompress.recover.methods.prompt_initialization import sample_token_embeddings
from mopcompress.recover.methods.prompt_kv import LearnedKeyValues, TensorsByLayer, record_prompt_kv, zero_prompt_kv


class TrainedPrefix(nn.Module):
    """Keys and values before every text, in every layer."""

    layer = 0

    def __init__(self, keys: TensorsByLayer, values: TensorsByLayer) -> None:
        super().__init__()
        self.prefix = LearnedKeyValues(keys, values)

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it, text attends to the prefix, with gradients to it."""
        keys, values = self.prefix()
        prompts = next(iter(keys.values())).shape[1]
        return attend_to(Prefix(keys, values, instructions.mean.new_zeros(len(instructions.mean), prompts)))

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """The same: there is nothing to compute."""
        return lambda instructions: self.active(model, instructions)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All keys and values."""
        return {"adapter": list(self.prefix.parameters()), "gate": []}


def build(model: LanguageModel, config: AdapterConfig) -> TrainedPrefix:
    """As many tokens as `mop` with this config has parameters for, its gate included, a deep one's layers not.

    Raises `DataError` for some families, and when a prefix of one token is larger already.
    """
    one = TrainedPrefix(*zero_prompt_kv(model, 0, 1))
    budget = mixture_of_prompts.budget(model, config)
    tokens = budget // trained_parameters(one)
    if tokens == 0:
        raise DataError(
            f"a prefix of one token has {trained_parameters(one)} parameters here, and mop with the same settings "
            f"{budget}; give more --prompts-per-expert"
        )
    return TrainedPrefix(*zero_prompt_kv(model, 0, tokens)).to(model.device)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> TrainedPrefix:
    """A prefix that begins as the keys and values of tokens of training instructions.

    Where positions are rotary, it is at first exactly `input` with those tokens.
    """
    model = material.model
    keys, _ = build(model, config).prefix()
    tokens = next(iter(keys.values())).shape[1]
    embeddings = sample_token_embeddings(material.states, tokens, start)
    with torch.no_grad():
        return TrainedPrefix(
            *record_prompt_kv(model, embeddings[None], 0, first_position=-tokens if model.is_rotary else 0)
        )
