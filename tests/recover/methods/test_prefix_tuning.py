"""Trained keys and values in every layer: their number, their shapes and their first values."""

from functools import partial

import pytest
import torch
from factories import adapter_config, initialized_adapter, response_nll
from tiny_models import BLOCKS, random_documents, tiny_model

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.methods import prefix_tuning
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.prefix_tuning import TrainedPrefix
from mopcompress.recover.methods.prompt_kv import zero_prompt_kv
from mopcompress.recover.registry import RECOVERY_METHODS

DOCUMENTS = random_documents(9)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_prefix_is_the_longest_within_the_budget_of_mop(tiny_llama, prompts, per_layer):
    """The budget is that of flowing prompts, also in a bench whose other arms have prompts per layer."""
    sizes = {}
    for arm, layer, per_layer_prompts in (("prefix", 0, per_layer), ("mop", 2, False)):
        changes = {"layer": layer, "prompts_per_expert": prompts, "per_layer_prompts": per_layer_prompts, "tasks": []}
        config = adapter_config(arm, tiny_llama, **changes)
        sizes[arm] = trained_parameters(RECOVERY_METHODS[arm].build(tiny_llama, config))
    token = 2 * BLOCKS * 2 * 8  # keys and values, layers, heads, numbers
    assert sizes["mop"] - token < sizes["prefix"] <= sizes["mop"]
    assert sizes["prefix"] % token == 0


def test_a_prefix_that_cannot_be_small_enough_raises(tiny_llama, monkeypatch):
    narrow = partial(Gate, width=1)
    monkeypatch.setattr("mopcompress.recover.methods.mixture_of_prompts.gates.Gate", narrow)
    config = adapter_config("prefix", tiny_llama, experts=1, prompts_per_expert=1, tasks=[])
    with pytest.raises(DataError, match="one token has 128 parameters here, and mop with the same settings"):
        prefix_tuning.build(tiny_llama, config)


def test_a_prefix_begins_as_the_prompt_of_the_same_tokens(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, 0, batch_size=4)
    prefix, _ = initialized_adapter("prefix", tiny_llama, states, tasks=[])
    tokens = prefix.prefix()[0][0].shape[1]
    plain, _ = initialized_adapter("input", tiny_llama, states, experts=1, prompts_per_expert=tokens, tasks=[])
    assert torch.equal(response_nll(tiny_llama, states, prefix), response_nll(tiny_llama, states, plain))


def test_a_prefix_needs_no_rotary_positions():
    model = tiny_model("gpt2")
    states = HiddenStateDataset(model, DOCUMENTS, 0, batch_size=4)
    adapter, _ = initialized_adapter("prefix", model, states, tasks=[])
    assert sorted(adapter.prefix()[0]) == list(range(BLOCKS))
    bare = response_nll(model, states)
    assert not torch.allclose(response_nll(model, states, adapter), bare, atol=1e-2)


def test_a_prefix_has_keys_and_values_in_the_shapes_of_layers(tiny_llama):
    keys, values = TrainedPrefix(*zero_prompt_kv(tiny_llama, 0, 7)).prefix()
    assert {layer: key.shape for layer, key in keys.items()} == dict.fromkeys(range(BLOCKS), (2, 7, 8))
    assert {layer: value.shape for layer, value in values.items()} == dict.fromkeys(range(BLOCKS), (2, 7, 8))
