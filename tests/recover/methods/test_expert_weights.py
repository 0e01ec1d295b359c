"""Three gate modes, each against its equation, and what they have in common."""

import math

import pytest
import torch
from attention_cases import HEAD, KV_HEADS, AttentionLayer, generate_with_prefix
from factories import response_nll
from tiny_models import HIDDEN, generate, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.models.attention import attend_to, prompted_attention
from mopcompress.recover.methods.expert_weights import ExpertWeighting, drop_inactive_groups, to_prefix
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

MODES = ("renormalised", "values", "separate")
PROMPTS, EXPERTS, LAYER = 2, 3, 2
TOKENS = random_tokens(2, 9)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DOCUMENTS = random_documents(6)
WEIGHTS = ((1.0, 0.25, 1.75), (0.0, 3.0, 0.0))


def keys_and_values(*, layers=(1,), seed=0, dtype=torch.float64, loudness=1.0):
    seeded = torch.Generator().manual_seed(seed)
    return tuple(
        {
            layer: loudness * torch.randn(KV_HEADS, EXPERTS * PROMPTS, HEAD, generator=seeded, dtype=dtype)
            for layer in layers
        }
        for _ in range(2)
    )


def prefix(mode, weights=WEIGHTS, *, prompt_log_weight=0.0, dtype=torch.float64, **tensors):
    weights = torch.tensor(weights, dtype=dtype)
    return to_prefix(
        keys_and_values(dtype=dtype, **tensors), weights.log(), torch.tensor(prompt_log_weight, dtype=dtype), mode
    )


# --- the definitions


def slowly(query, key, value, keys, values, weights, prompt_log_weight, mode, scaling):
    """Compute the three equations for one query, the keys and values that it sees, and its example's weights."""
    score = [scaling * float(query @ k) for k in key]
    prompt = [scaling * float(query @ k) for k in keys]
    gate = [g for g in weights for _ in range(PROMPTS)]
    text = [math.exp(s) for s in score]
    if mode == "separate":
        answer = sum(w * v for w, v in zip(text, value, strict=True)) / math.fsum(text)
        for expert, g in enumerate(weights):
            group = range(expert * PROMPTS, (expert + 1) * PROMPTS)
            mass = math.fsum(math.exp(prompt[p]) for p in group)
            answer = answer + g * math.exp(prompt_log_weight) * sum(
                math.exp(prompt[p]) / mass * values[p] for p in group
            )
        return answer
    if mode == "renormalised":
        mass = [g * math.exp(s + prompt_log_weight) for g, s in zip(gate, prompt, strict=True)]
        scale = [1.0] * len(gate)
    else:
        mass, scale = [math.exp(s + prompt_log_weight) for s in prompt], gate
    total = math.fsum(text) + math.fsum(mass)
    parts = [m * g * v / total for m, g, v in zip(mass, scale, values, strict=True)]
    return sum(parts) + sum(w * v for w, v in zip(text, value, strict=True)) / total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("time", "count"), [(5, 5), (1, 5)])
def test_a_mode_is_its_equation(mode, time, count):
    seeded = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, length, HEAD, generator=seeded, dtype=torch.float64)
        for heads, length in ((4, time), (KV_HEADS, count), (KV_HEADS, count))
    )
    keys, values = keys_and_values()
    with attend_to(prefix(mode, prompt_log_weight=-0.7)):
        attended, _ = prompted_attention(AttentionLayer(), query, key, value, None, scaling=0.3)
    for b in range(2):
        for h in range(4):
            shared = h // 2
            for t in range(time):
                visible = slice(0, count - time + t + 1)
                expected = slowly(
                    query[b, h, t],
                    key[b, shared, visible],
                    value[b, shared, visible],
                    keys[1][shared],
                    values[1][shared],
                    WEIGHTS[b],
                    -0.7,
                    mode,
                    0.3,
                )
                assert_close(attended[b, t, h], expected, rtol=1e-9, atol=1e-9)


def test_an_unknown_mode_raises():
    with pytest.raises(DataError, match="'sideways'"):
        prefix("sideways")


# --- neutral elements


@torch.no_grad()
def logits(model, active_prefix=None):
    if active_prefix is None:
        return model.network(input_ids=TOKENS, use_cache=False).logits
    with attend_to(active_prefix):
        return model.network(input_ids=TOKENS, use_cache=False).logits


def model_prefix(mode, weights=WEIGHTS, **settings):
    return prefix(mode, weights, dtype=torch.float32, layers=range(1, 4), **settings)


def test_without_preference_two_modes_are_the_plain_prompt(tiny_llama):
    ones = [[1.0] * EXPERTS] * 2
    plain = logits(tiny_llama, model_prefix("renormalised", ones, prompt_log_weight=-0.5))
    assert torch.equal(logits(tiny_llama, model_prefix("values", ones, prompt_log_weight=-0.5)), plain)
    assert not torch.allclose(
        logits(tiny_llama, model_prefix("separate", ones, prompt_log_weight=-0.5)), plain, atol=0.1
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_very_low_prompt_log_weight_is_no_prompts_at_all(tiny_llama, mode):
    assert_close(logits(tiny_llama, model_prefix(mode, prompt_log_weight=-1e4)), logits(tiny_llama), **CLOSE)


def test_separate_groups_of_weight_0_change_no_bit_of_the_text(tiny_llama):
    closed = model_prefix("separate", [[0.0] * EXPERTS] * 2)
    assert torch.equal(logits(tiny_llama, closed), logits(tiny_llama))


def test_prompts_of_weight_0_take_attention_in_mode_values_only(tiny_llama):
    zero = [[0.0] * EXPERTS] * 2
    assert_close(logits(tiny_llama, model_prefix("renormalised", zero)), logits(tiny_llama), **CLOSE)
    assert not torch.allclose(logits(tiny_llama, model_prefix("values", zero)), logits(tiny_llama), atol=0.1)


def test_the_modes_differ(tiny_llama):
    results = [logits(tiny_llama, model_prefix(mode)) for mode in MODES]
    assert min(float((results[a] - results[b]).abs().max()) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.1


# --- generation: cache, padding, beams


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_with_a_cache_is_generation_without(family, mode):
    model, loud = tiny_model(family), model_prefix(mode, loudness=2.0)
    cached = generate_with_prefix(model, TOKENS, loud, use_cache=True)
    assert torch.equal(cached, generate_with_prefix(model, TOKENS, loud, use_cache=False))
    assert not torch.equal(cached, generate_with_prefix(model, TOKENS, model_prefix(mode, prompt_log_weight=-1e4)))


@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_changes_no_generated_token(tiny_llama, mode):
    loud = model_prefix(mode, loudness=2.0)
    static = generate_with_prefix(tiny_llama, TOKENS, loud, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate_with_prefix(tiny_llama, TOKENS, loud))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_example_is_generated_with_its_own_weights(tiny_llama, mode, beams):
    together = generate_with_prefix(tiny_llama, TOKENS, model_prefix(mode, loudness=2.0), num_beams=beams)
    for row in range(2):
        row_prefix = model_prefix(mode, WEIGHTS[row : row + 1], loudness=2.0)
        assert torch.equal(
            together[row : row + 1],
            generate_with_prefix(tiny_llama, TOKENS[row : row + 1], row_prefix, num_beams=beams),
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_padded_batch_generates_as_each_alone(tiny_llama, mode):
    short = TOKENS[:1, 3:]
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), TOKENS[1:]])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    together = generate_with_prefix(tiny_llama, padded, model_prefix(mode), attention_mask=mask)
    alone = generate_with_prefix(tiny_llama, short, model_prefix(mode, WEIGHTS[:1]))
    assert torch.equal(together[0, 9:], alone[0, 6:])


# --- a mixture in each mode


def gated_mixture(mode="renormalised", *, logit_scale=3.0, prompt_log_weight=-0.5, layer=LAYER, **weighting):
    seeded = torch.Generator().manual_seed(0)
    groups = torch.randn(EXPERTS + weighting.get("shared", False), PROMPTS, HIDDEN, generator=seeded)
    gate = Gate(HIDDEN, EXPERTS, generator=seeded)
    gate.scale_logits(logit_scale)
    return MixtureOfPrompts(
        groups, layer, gate, prompt_log_weight=prompt_log_weight, weighting=ExpertWeighting(mode=mode, **weighting)
    )


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_all_parameters_and_no_network(states, mode):
    model, mixture = tiny_model(), gated_mixture(mode)
    response_nll(model, states, mixture).mean().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_compiled_adapters_are_the_trained_ones(tiny_llama, states, mode):
    mixture = gated_mixture(mode)
    assert torch.equal(
        response_nll(tiny_llama, states, mixture, compiled=True), response_nll(tiny_llama, states, mixture)
    )


@pytest.mark.parametrize("mode", MODES)
def test_prompts_of_weight_0_are_no_prompts(tiny_llama, states, mode):
    bare = score_responses(tiny_llama, states.batch(range(len(DOCUMENTS))), LAYER).nll
    assert_close(
        response_nll(tiny_llama, states, gated_mixture(mode, prompt_log_weight=-1e4)), bare, rtol=1e-5, atol=1e-5
    )


# --- the strongest experts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [EXPERTS, None])
def test_top_k_of_all_experts_changes_no_bit(tiny_llama, states, mode, count):
    nll = response_nll(tiny_llama, states, gated_mixture(mode, top_k=count), compiled=True)
    assert torch.equal(nll, response_nll(tiny_llama, states, gated_mixture(mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_only_the_strongest_act_and_only_at_inference(tiny_llama, states, mode, count):
    """The definition: others have weight 0, active ones the same proportions, all together the number of experts."""
    read, mixture = states.batch(range(len(DOCUMENTS))).instructions, gated_mixture(mode, top_k=count)
    weights = mixture.training_log_weights(read).exp()
    expected = torch.zeros_like(weights)
    for row, row_weights in enumerate(weights.tolist()):
        active = sorted(range(EXPERTS), key=lambda expert: -row_weights[expert])[:count]
        for expert in active:
            total = math.fsum(row_weights[other] for other in active)
            expected[row, expert] = row_weights[expert] * EXPERTS / total
    assert_close(mixture.inference_log_weights(read).exp(), expected)
    assert_close(mixture.expert_weights(tiny_llama, read), expected)
    full = to_prefix(mixture.keys_and_values(tiny_llama), expected.log(), mixture.prompt_log_weight, mode)
    with attend_to(full):
        slow = score_responses(tiny_llama, states.batch(range(len(DOCUMENTS))), LAYER).nll
    assert_close(response_nll(tiny_llama, states, mixture, compiled=True), slow)
    assert torch.equal(response_nll(tiny_llama, states, mixture), response_nll(tiny_llama, states, gated_mixture(mode)))


def test_of_equal_experts_the_first_act(states):
    read = states.batch(range(len(DOCUMENTS))).instructions
    active = gated_mixture(logit_scale=0.0, top_k=2).inference_log_weights(read).exp()
    assert_close(active, torch.tensor([1.5, 1.5, 0.0]).expand(len(DOCUMENTS), -1))


def test_groups_of_weight_0_are_dropped():
    all_groups = keys_and_values(layers=(1, 2))
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]])[:, :EXPERTS].log()
    (keys, values), log_weights = drop_inactive_groups(all_groups, weights, "renormalised")
    assert torch.equal(log_weights, weights[:, 1:2])
    for layer in (1, 2):
        assert torch.equal(keys[layer], all_groups[0][layer][:, PROMPTS : 2 * PROMPTS])
        assert torch.equal(values[layer], all_groups[1][layer][:, PROMPTS : 2 * PROMPTS])
    unchanged, same = drop_inactive_groups(all_groups, torch.zeros(2, EXPERTS), "renormalised")
    assert unchanged is all_groups
    assert drop_inactive_groups(all_groups, weights, "values") == (all_groups, weights)  # they take attention there
    assert same.shape == (2, EXPERTS)


@pytest.mark.parametrize("weighting", [{"mode": mode} for mode in MODES] + [{"top_k": 1}, {"shared": True}])
def test_neither_cache_nor_batch_changes_an_answer(tiny_llama, weighting):
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    mixture = gated_mixture(**weighting, layer=1).requires_grad_(False)
    batched = generate(tiny_llama, mixture, prompts, max_new_tokens=8)
    assert batched == generate(tiny_llama, mixture, prompts, max_new_tokens=8, use_cache=False)
    assert batched == [generate(tiny_llama, mixture, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert batched != generate(tiny_llama, None, prompts, max_new_tokens=8)


# --- a shared expert


def test_a_shared_expert_has_weight_1_outside_of_the_gate(tiny_llama, states):
    read, shared = states.batch(range(len(DOCUMENTS))).instructions, gated_mixture(shared=True, top_k=1)
    weights = shared.training_log_weights(read)
    assert weights.shape == (len(DOCUMENTS), EXPERTS + 1)
    assert torch.equal(weights[:, -1], torch.zeros(len(DOCUMENTS)))
    assert torch.equal(weights[:, :-1], shared.gate(read.mean))
    assert_close(weights[:, :-1].exp().sum(1), torch.full((len(DOCUMENTS),), float(EXPERTS)))
    assert torch.equal(shared.inference_log_weights(read)[:, -1], torch.zeros(len(DOCUMENTS)))
    assert shared.expert_weights(tiny_llama, read).shape == (len(DOCUMENTS), EXPERTS)


def test_without_preference_a_shared_expert_is_more_prompt(tiny_llama, states):
    shared = gated_mixture(shared=True, logit_scale=0.0)
    plain = MixtureOfPrompts(shared.prompts.detach().flatten(0, 1)[None], LAYER, None, prompt_log_weight=-0.5)
    assert_close(response_nll(tiny_llama, states, shared), response_nll(tiny_llama, states, plain))


def test_a_shared_expert_leaves_the_others_unchanged(tiny_llama):
    (keys, values), (expert_keys, expert_values) = (
        mixture.keys_and_values(tiny_llama) for mixture in (gated_mixture(shared=True), gated_mixture())
    )
    with torch.no_grad():
        for layer, key in expert_keys.items():
            assert_close(keys[layer][:, :-PROMPTS], key)
            assert_close(values[layer][:, :-PROMPTS], expert_values[layer])
