"""A mixture of prompts: its weights, the stream of prompts, training, and adapter folders."""

import json
import math
from dataclasses import replace

import pytest
import torch
from factories import response_nll
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, HIDDEN, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.compat import CACHE
from mopcompress.recover.adapter import AdapterConfig, trained_parameters
from mopcompress.recover.methods.expert_weights import ExpertWeighting
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.storage import artifacts

EXPERTS, PROMPTS, LAYER = 3, 2, 2
DOCUMENTS = random_documents(6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_prompts(seed=0):
    return torch.randn(EXPERTS, PROMPTS, HIDDEN, generator=seeded(seed))


def gated_mixture(*, seed=0, prompt_log_weight=0.0, logit_scale=3.0):
    gate = Gate(HIDDEN, EXPERTS, generator=seeded(seed))
    gate.scale_logits(logit_scale)
    return MixtureOfPrompts(random_prompts(seed), LAYER, gate, prompt_log_weight=prompt_log_weight)


def plain_prompt(*, seed=0, prompt_log_weight=0.0):
    return MixtureOfPrompts(random_prompts(seed).flatten(0, 1)[None], LAYER, None, prompt_log_weight=prompt_log_weight)


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def all_instructions(states):
    return states.batch(range(len(DOCUMENTS))).instructions


# --- the weights


def test_weights_sum_to_the_number_of_experts_per_example(states):
    weights = gated_mixture().training_log_weights(all_instructions(states)).exp().detach()
    assert weights.shape == (len(DOCUMENTS), EXPERTS)
    assert_close(weights.sum(1), torch.full((len(DOCUMENTS),), float(EXPERTS)))
    assert float(weights.std(0).min()) > 0.01  # they differ between examples


def test_the_prompts_of_an_expert_have_the_same_weight(tiny_llama, states):
    prefix = gated_mixture().prefix(tiny_llama, all_instructions(states))
    by_expert = prefix.log_gate.unflatten(1, (EXPERTS, PROMPTS))
    assert_close(by_expert[..., 0], gated_mixture().training_log_weights(all_instructions(states)))
    assert torch.equal(by_expert[..., 0], by_expert[..., 1])


def test_prompt_log_weight_is_added_to_every_prompt(tiny_llama, states):
    for build in (gated_mixture, plain_prompt):
        shifted = build(prompt_log_weight=-3.0).prefix(tiny_llama, all_instructions(states)).log_gate
        assert_close(shifted, build().prefix(tiny_llama, all_instructions(states)).log_gate - 3)


def test_a_gate_without_preference_is_the_plain_prompt(tiny_llama, states):
    assert_close(
        response_nll(tiny_llama, states, gated_mixture(logit_scale=0.0)),
        response_nll(tiny_llama, states, plain_prompt()),
    )
    assert not torch.allclose(
        response_nll(tiny_llama, states, gated_mixture()), response_nll(tiny_llama, states, plain_prompt()), atol=1e-2
    )


def test_a_single_expert_with_a_gate_is_the_plain_prompt(tiny_llama, states):
    gated = MixtureOfPrompts(random_prompts().flatten(0, 1)[None], LAYER, Gate(HIDDEN, 1, generator=seeded()))
    assert torch.equal(response_nll(tiny_llama, states, gated), response_nll(tiny_llama, states, plain_prompt()))


@pytest.mark.parametrize("build", [gated_mixture, plain_prompt])
def test_prompts_of_weight_0_are_no_prompts(tiny_llama, states, build):
    bare = response_nll(tiny_llama, states)
    assert_close(response_nll(tiny_llama, states, build(prompt_log_weight=-1e4)), bare, rtol=1e-5, atol=1e-5)


def only_expert(expert, experts=EXPERTS):
    """Return a weighting with all weight on an expert."""
    row = torch.full((experts,), -math.inf)
    row[expert] = math.log(EXPERTS)
    return ExpertWeighting(weight_fn=lambda _gate, instructions: row.expand(len(instructions.mean), -1))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_a_closed_expert_only_shapes_the_experts_after_it(tiny_llama, states, expert):
    """The prompts then end with the open expert, and no text attends to those before it."""
    only = MixtureOfPrompts(random_prompts(), LAYER, None, weighting=only_expert(expert))
    ended = MixtureOfPrompts(random_prompts()[: expert + 1], LAYER, None, weighting=only_expert(expert, expert + 1))
    assert_close(response_nll(tiny_llama, states, only), response_nll(tiny_llama, states, ended), rtol=1e-5, atol=1e-5)
    alone = MixtureOfPrompts(random_prompts()[expert : expert + 1], LAYER, None, weighting=only_expert(0, 1))
    same = torch.allclose(response_nll(tiny_llama, states, only), response_nll(tiny_llama, states, alone), atol=1e-3)
    assert same == (expert == 0)


# --- the stream of prompts


def test_prompts_reach_every_layer_from_their_own_on(tiny_llama):
    keys, values = gated_mixture().keys_and_values(tiny_llama)
    assert sorted(keys) == sorted(values) == list(range(LAYER, BLOCKS))


def test_prompts_see_the_prompts_before_them_and_no_others(tiny_llama):
    mixture, changed = gated_mixture(), gated_mixture()
    with torch.no_grad():
        changed.prompts[1] += 1.0
    (keys, values), (new_keys, new_values) = (prompts.keys_and_values(tiny_llama) for prompts in (mixture, changed))
    first, second, third = (slice(expert * PROMPTS, (expert + 1) * PROMPTS) for expert in range(EXPERTS))
    for layer in range(LAYER, BLOCKS):
        assert torch.equal(keys[layer][:, first], new_keys[layer][:, first])
        assert torch.equal(values[layer][:, first], new_values[layer][:, first])
        assert not torch.allclose(keys[layer][:, second], new_keys[layer][:, second], atol=1e-2)
    # in its own layer a prompt is still what was trained; above it has seen the one before
    assert torch.equal(keys[LAYER][:, third], new_keys[LAYER][:, third])
    assert not torch.allclose(keys[LAYER + 1][:, third], new_keys[LAYER + 1][:, third], atol=1e-2)


def test_the_stream_of_prompts_is_a_text_of_its_own(tiny_llama):
    """Prompts that are the hidden states of a text get the keys and values of that text."""
    tokens = torch.tensor([DOCUMENTS[0].tokens[:4]])
    cache = tiny_llama.network(input_ids=tokens, use_cache=True)[CACHE]
    mixture = MixtureOfPrompts(tiny_llama.run_lower(tokens, LAYER), LAYER, None)
    keys, values = mixture.keys_and_values(tiny_llama)
    for layer in range(LAYER, BLOCKS):
        assert_close(keys[layer], cache.layers[layer].keys[0])
        assert_close(values[layer], cache.layers[layer].values[0])


def test_compiled_adapters_are_the_trained_ones(tiny_llama, states):
    mixture = gated_mixture(prompt_log_weight=-1.0)
    compiled = response_nll(tiny_llama, states, mixture, compiled=True)
    assert torch.equal(compiled, response_nll(tiny_llama, states, mixture))


# --- training


def test_gradients_reach_the_trained_parameters_and_no_others(states):
    model, mixture = tiny_model(), gated_mixture(prompt_log_weight=-1.0)
    response_nll(model, states, mixture).mean().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).flatten(1).any(-1).all() if parameter.ndim > 1 else parameter.grad.any()), (
            name
        )
    assert all(weight.grad is None for weight in model.network.parameters())


def test_trained_parameters_count_prompts_weight_and_gate():
    gate = HIDDEN * 128 + 128 + 128 * EXPERTS + EXPERTS
    assert trained_parameters(gated_mixture()) == EXPERTS * PROMPTS * HIDDEN + 1 + gate
    assert trained_parameters(plain_prompt()) == EXPERTS * PROMPTS * HIDDEN + 1


# --- on disk

CONFIG = AdapterConfig(
    arm="mop",
    experts=EXPERTS,
    prompts_per_expert=PROMPTS,
    layer=LAYER,
    hidden_size=HIDDEN,
    base_sha256="base",
    tasks=["add", "sort", "tell"],
)


def saved(folder, mixture, config):
    with artifacts.publish(folder, {}) as scratch:
        save_adapter(mixture, config, scratch)
    return folder


@pytest.mark.parametrize("arm", ["mop", "single"])
def test_a_saved_adapter_loads_unchanged(tiny_llama, states, tmp_path, arm):
    mixture = gated_mixture(prompt_log_weight=-2.0) if arm == "mop" else plain_prompt(prompt_log_weight=-2.0)
    if arm == "mop":
        mixture.gate.fit_standardization(states.means)
    folder = saved(tmp_path / "adapter", mixture, replace(CONFIG, arm=arm))
    loaded, config = load_adapter(folder, tiny_llama, base_sha256="base")
    assert config == replace(CONFIG, arm=arm)
    assert loaded.layer == LAYER
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in mixture.state_dict().items())
    scores = [
        evaluate(tiny_llama, states, adapter.compile_for_inference(tiny_llama), batch_size=4)
        for adapter in (loaded, mixture)
    ]
    assert scores[0] == scores[1]


def test_an_adapter_of_another_model_raises(tiny_llama, tmp_path):
    folder = saved(tmp_path / "adapter", gated_mixture(), CONFIG)
    with pytest.raises(DataError, match=r"weights base, .* other"):
        load_adapter(folder, tiny_llama, base_sha256="other")


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_corrupted_adapter_raises(tiny_llama, tmp_path, name):
    folder = saved(tmp_path / "adapter", gated_mixture(), CONFIG)
    whole = bytearray((folder / name).read_bytes())
    whole[-3] ^= 1
    (folder / name).write_bytes(bytes(whole))
    with pytest.raises(DataError, match=name):
        load_adapter(folder, tiny_llama, base_sha256="base")


def test_a_missing_adapter_raises(tiny_llama, tmp_path):
    with pytest.raises(InputNotFoundError, match="mopcompress recover"):
        load_adapter(tmp_path, tiny_llama, base_sha256="base")


def republished(folder, target):
    """Publish the files again, with a manifest that agrees with them."""
    with artifacts.publish(target, {}) as scratch:
        for name in ("adapter.safetensors", "adapter.json"):
            (scratch / name).write_bytes((folder / name).read_bytes())
    return target


def test_weights_that_do_not_fit_their_config_raise(tiny_llama, tmp_path):
    folder = saved(tmp_path / "adapter", gated_mixture(), CONFIG)
    weights = load_file(folder / "adapter.safetensors")
    for number, wrong in enumerate(({"prompts": weights["prompts"]}, weights | {"prompts": torch.zeros(2, 2, 2)})):
        save_file(wrong, folder / "adapter.safetensors")
        with pytest.raises(DataError, match="train it again"):
            load_adapter(republished(folder, tmp_path / str(number)), tiny_llama, base_sha256="base")


def test_a_config_with_unknown_fields_raises(tiny_llama, tmp_path):
    folder = saved(tmp_path / "adapter", gated_mixture(), CONFIG)
    config = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(config | {"surprise": 1}))
    with pytest.raises(DataError, match="train it again"):
        load_adapter(republished(folder, tmp_path / "again"), tiny_llama, base_sha256="base")
