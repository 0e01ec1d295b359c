"""Mixtures with prompts per layer: keys and values that are trained in each layer by themselves."""

import pytest
import torch
from factories import adapter_init, initialized_adapter, response_nll
from tiny_models import BLOCKS, HIDDEN, random_documents

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.adapter import trained_parameters

DOCUMENTS = random_documents(9)
EXPERTS, PROMPTS, LAYER = 3, 2, 2


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def initialized(arm, model, states, *, per_layer):
    init = adapter_init(gate_pretraining_steps=20)
    return initialized_adapter(arm, model, states, init=init, tasks=[], per_layer_prompts=per_layer)[0]


@pytest.mark.parametrize("arm", ["mop", "single"])
def test_prompts_per_layer_begin_as_the_flowing_ones(tiny_llama, states, arm):
    flowing, per_layer = (initialized(arm, tiny_llama, states, per_layer=per_layer) for per_layer in (False, True))
    assert torch.equal(response_nll(tiny_llama, states, per_layer), response_nll(tiny_llama, states, flowing))
    instructions = states.batch(range(len(DOCUMENTS))).instructions
    assert torch.equal(per_layer.training_log_weights(instructions), flowing.training_log_weights(instructions))


def test_trained_parameters_count_the_prompts_of_all_layers(tiny_llama, states):
    flowing, per_layer = (initialized("mop", tiny_llama, states, per_layer=per_layer) for per_layer in (False, True))
    tokens, numbers = EXPERTS * PROMPTS, 2 * 2 * 8
    added = tokens * numbers * (BLOCKS - LAYER) - tokens * HIDDEN
    assert trained_parameters(per_layer) == trained_parameters(flowing) + added
    assert trained_parameters(per_layer) == sum(parameter.numel() for parameter in per_layer.parameters())


def test_each_layer_is_trained_by_itself(tiny_llama, states):
    mixture = initialized("mop", tiny_llama, states, per_layer=True)
    before = {layer: key.clone() for layer, key in mixture.keys_and_values(tiny_llama)[0].items()}
    with torch.no_grad():
        mixture.layer_key_values.keys[str(LAYER)].add_(1.0)
    after, _ = mixture.keys_and_values(tiny_llama)
    assert sorted(after) == list(range(LAYER, BLOCKS))
    assert [layer for layer in after if not torch.equal(after[layer], before[layer])] == [LAYER]
