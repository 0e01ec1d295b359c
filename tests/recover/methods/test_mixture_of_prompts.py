import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, HIDDEN, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
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


def start(seed=0):
    return torch.randn(EXPERTS, PROMPTS, HIDDEN, generator=seeded(seed))


def mixture_of(*, seed=0, prompt_log_weight=0.0, temper=3.0):
    gate = Gate(HIDDEN, EXPERTS, generator=seeded(seed))
    gate.scale_logits(temper)
    return MixtureOfPrompts(start(seed), LAYER, gate, prompt_log_weight=prompt_log_weight)


def plain_of(*, seed=0, prompt_log_weight=0.0):
    return MixtureOfPrompts(start(seed).flatten(0, 1)[None], LAYER, None, prompt_log_weight=prompt_log_weight)


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def everything(states):
    return states.batch(range(len(DOCUMENTS))).instructions


def nats(model, states, mixture):
    """Nats of every response token, document after document."""
    batch = states.batch(range(len(DOCUMENTS)))
    with mixture.active(model, batch.instructions):
        return score_responses(model, batch, states.layer).nll


# --- what the gate weighs


def test_gates_sum_to_the_number_of_experts_for_each_example(states):
    weights = mixture_of().training_log_weights(everything(states)).exp().detach()
    assert weights.shape == (len(DOCUMENTS), EXPERTS)
    assert_close(weights.sum(1), torch.full((len(DOCUMENTS),), float(EXPERTS)))
    assert float(weights.std(0).min()) > 0.01  # they differ between examples


def test_a_gate_weighs_the_prompts_of_an_expert_alike(tiny_llama, states):
    prefix = mixture_of().prefix(tiny_llama, everything(states))
    by_expert = prefix.log_gate.unflatten(1, (EXPERTS, PROMPTS))
    assert_close(by_expert[..., 0], mixture_of().training_log_weights(everything(states)))
    assert torch.equal(by_expert[..., 0], by_expert[..., 1])


def test_the_opening_is_added_to_every_prompt_of_both_arms(tiny_llama, states):
    for build in (mixture_of, plain_of):
        shifted = build(prompt_log_weight=-3.0).prefix(tiny_llama, everything(states)).log_gate
        assert_close(shifted, build().prefix(tiny_llama, everything(states)).log_gate - 3)


def test_a_gate_without_preference_is_the_plain_prompt(tiny_llama, states):
    assert_close(nats(tiny_llama, states, mixture_of(temper=0.0)), nats(tiny_llama, states, plain_of()))
    assert not torch.allclose(nats(tiny_llama, states, mixture_of()), nats(tiny_llama, states, plain_of()), atol=1e-2)


def test_one_expert_with_a_gate_is_the_plain_prompt(tiny_llama, states):
    one = MixtureOfPrompts(start().flatten(0, 1)[None], LAYER, Gate(HIDDEN, 1, generator=seeded()))
    assert torch.equal(nats(tiny_llama, states, one), nats(tiny_llama, states, plain_of()))


@pytest.mark.parametrize("build", [mixture_of, plain_of])
def test_unopened_prompts_are_no_prompts(tiny_llama, states, build):
    batch = states.batch(range(len(DOCUMENTS)))
    bare = score_responses(tiny_llama, batch, LAYER).nll
    assert_close(nats(tiny_llama, states, build(prompt_log_weight=-1e4)), bare, rtol=1e-5, atol=1e-5)


def closed_but(expert, experts=EXPERTS):
    """What a gate says that wants one expert alone."""
    row = torch.full((experts,), -math.inf)
    row[expert] = math.log(EXPERTS)
    return ExpertWeighting(weight_fn=lambda _gate, read: row.expand(len(read.mean), -1))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_experts_that_the_gate_closes_are_absent_but_for_what_they_made_of_those_behind_them(
    tiny_llama, states, expert
):
    """It is as if the prompts ended with the expert that is open, and no text attended to those before it."""
    only = MixtureOfPrompts(start(), LAYER, None, weighting=closed_but(expert))
    ended = MixtureOfPrompts(start()[: expert + 1], LAYER, None, weighting=closed_but(expert, expert + 1))
    assert_close(nats(tiny_llama, states, only), nats(tiny_llama, states, ended), rtol=1e-5, atol=1e-5)
    alone = MixtureOfPrompts(start()[expert : expert + 1], LAYER, None, weighting=closed_but(0, 1))
    same = torch.allclose(nats(tiny_llama, states, only), nats(tiny_llama, states, alone), atol=1e-3)
    assert same == (expert == 0)


# --- the stream of prompts


def test_prompts_reach_every_layer_from_their_own_on(tiny_llama):
    keys, values = mixture_of().keys_and_values(tiny_llama)
    assert sorted(keys) == sorted(values) == list(range(LAYER, BLOCKS))


def test_prompts_see_the_prompts_before_them_and_no_others(tiny_llama):
    mixture, changed = mixture_of(), mixture_of()
    with torch.no_grad():
        changed.prompts[1] += 1.0
    (keys, values), (new_keys, new_values) = (one.keys_and_values(tiny_llama) for one in (mixture, changed))
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


def test_compiled_prompts_are_the_trained_ones(tiny_llama, states):
    mixture, batch = mixture_of(prompt_log_weight=-1.0), states.batch(range(len(DOCUMENTS)))
    with mixture.compile_for_inference(tiny_llama)(batch.instructions):
        compiled = score_responses(tiny_llama, batch, LAYER).nll
    assert torch.equal(compiled, nats(tiny_llama, states, mixture))


# --- training reaches what it should


def test_a_gradient_reaches_prompts_opening_and_gate_and_nothing_else(states):
    model, mixture = tiny_model(), mixture_of(prompt_log_weight=-1.0)
    nats(model, states, mixture).mean().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).flatten(1).any(-1).all() if parameter.ndim > 1 else parameter.grad.any()), (
            name
        )
    assert all(weight.grad is None for weight in model.network.parameters())


def test_trained_parameters_count_prompts_opening_and_gate():
    gate = HIDDEN * 128 + 128 + 128 * EXPERTS + EXPERTS
    assert trained_parameters(mixture_of()) == EXPERTS * PROMPTS * HIDDEN + 1 + gate
    assert trained_parameters(plain_of()) == EXPERTS * PROMPTS * HIDDEN + 1


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


def stored(folder, mixture, config):
    with artifacts.publish(folder, {}) as scratch:
        save_adapter(mixture, config, scratch)
    return folder


@pytest.mark.parametrize("arm", ["mop", "single"])
def test_an_adapter_comes_back_as_it_was(tiny_llama, states, tmp_path, arm):
    mixture = mixture_of(prompt_log_weight=-2.0) if arm == "mop" else plain_of(prompt_log_weight=-2.0)
    if arm == "mop":
        mixture.gate.fit_standardization(states.means)
    folder = stored(tmp_path / "adapter", mixture, replace(CONFIG, arm=arm))
    again, config = load_adapter(folder, tiny_llama, base_sha256="base")
    assert config == replace(CONFIG, arm=arm)
    assert again.layer == LAYER
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in mixture.state_dict().items())
    scores = [
        evaluate(tiny_llama, states, one.compile_for_inference(tiny_llama), batch_size=4) for one in (again, mixture)
    ]
    assert scores[0] == scores[1]


def test_an_adapter_of_another_model_is_refused(tiny_llama, tmp_path):
    folder = stored(tmp_path / "adapter", mixture_of(), CONFIG)
    with pytest.raises(DataError, match=r"weights base, .* other"):
        load_adapter(folder, tiny_llama, base_sha256="other")


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_corrupted_adapter_is_refused(tiny_llama, tmp_path, name):
    folder = stored(tmp_path / "adapter", mixture_of(), CONFIG)
    whole = bytearray((folder / name).read_bytes())
    whole[-3] ^= 1
    (folder / name).write_bytes(bytes(whole))
    with pytest.raises(DataError, match=name):
        load_adapter(folder, tiny_llama, base_sha256="base")


def test_an_adapter_that_is_not_there_is_not_found(tiny_llama, tmp_path):
    with pytest.raises(InputNotFoundError, match="mopcompress recover"):
        load_adapter(tmp_path, tiny_llama, base_sha256="base")


def republished(folder, target):
    """The same files with a manifest that agrees with them."""
    with artifacts.publish(target, {}) as scratch:
        for name in ("adapter.safetensors", "adapter.json"):
            (scratch / name).write_bytes((folder / name).read_bytes())
    return target


def test_weights_that_do_not_fit_their_config_are_refused(tiny_llama, tmp_path):
    folder = stored(tmp_path / "adapter", mixture_of(), CONFIG)
    weights = load_file(folder / "adapter.safetensors")
    for number, wrong in enumerate(({"prompts": weights["prompts"]}, weights | {"prompts": torch.zeros(2, 2, 2)})):
        save_file(wrong, folder / "adapter.safetensors")
        with pytest.raises(DataError, match="train it again"):
            load_adapter(republished(folder, tmp_path / str(number)), tiny_llama, base_sha256="base")


def test_a_config_with_unknown_fields_is_refused(tiny_llama, tmp_path):
    folder = stored(tmp_path / "adapter", mixture_of(), CONFIG)
    config = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(config | {"surprise": 1}))
    with pytest.raises(DataError, match="train it again"):
        load_adapter(republished(folder, tmp_path / "again"), tiny_llama, base_sha256="base")
