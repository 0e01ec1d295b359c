"""Three readings of one gate, each against its equation, and what they have in common."""

import math

import pytest
import torch
from models.test_attention import HEAD, KV_HEADS, Layer, generated
from tiny_models import HIDDEN, generate, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.models.attention import attend_to, prompted_attention
from mopcompress.recover.methods.expert_weights import ExpertWeighting, drop_inactive_groups, to_prefix
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

READINGS = ("renormalised", "values", "separate")
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


def prefix(reading, weights=WEIGHTS, *, opening=0.0, dtype=torch.float64, **made):
    weights = torch.tensor(weights, dtype=dtype)
    return to_prefix(keys_and_values(dtype=dtype, **made), weights.log(), torch.tensor(opening, dtype=dtype), reading)


# --- the definitions


def slowly(query, key, value, keys, values, weights, opening, reading, scaling):
    """The three equations for one query, keys and values it sees, and its own gate."""
    score = [scaling * float(query @ k) for k in key]
    prompt = [scaling * float(query @ k) for k in keys]
    gate = [g for g in weights for _ in range(PROMPTS)]
    text = [math.exp(s) for s in score]
    if reading == "separate":
        answer = sum(w * v for w, v in zip(text, value, strict=True)) / math.fsum(text)
        for expert, g in enumerate(weights):
            own = range(expert * PROMPTS, (expert + 1) * PROMPTS)
            mass = math.fsum(math.exp(prompt[p]) for p in own)
            answer = answer + g * math.exp(opening) * sum(math.exp(prompt[p]) / mass * values[p] for p in own)
        return answer
    if reading == "renormalised":
        mass = [g * math.exp(s + opening) for g, s in zip(gate, prompt, strict=True)]
        scale = [1.0] * len(gate)
    else:
        mass, scale = [math.exp(s + opening) for s in prompt], gate
    total = math.fsum(text) + math.fsum(mass)
    parts = [m * g * v / total for m, g, v in zip(mass, scale, values, strict=True)]
    return sum(parts) + sum(w * v for w, v in zip(text, value, strict=True)) / total


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("time", "count"), [(5, 5), (1, 5)])
def test_a_reading_is_its_equation(reading, time, count):
    seeded = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, length, HEAD, generator=seeded, dtype=torch.float64)
        for heads, length in ((4, time), (KV_HEADS, count), (KV_HEADS, count))
    )
    keys, values = keys_and_values()
    with attend_to(prefix(reading, opening=-0.7)):
        attended, _ = prompted_attention(Layer(), query, key, value, None, scaling=0.3)
    for b in range(2):
        for h in range(4):
            shared = h // 2
            for t in range(time):
                seen = slice(0, count - time + t + 1)
                expected = slowly(
                    query[b, h, t],
                    key[b, shared, seen],
                    value[b, shared, seen],
                    keys[1][shared],
                    values[1][shared],
                    WEIGHTS[b],
                    -0.7,
                    reading,
                    0.3,
                )
                assert_close(attended[b, t, h], expected, rtol=1e-9, atol=1e-9)


def test_a_reading_that_nobody_knows_is_refused():
    with pytest.raises(DataError, match="'sideways'"):
        prefix("sideways")


# --- neutral elements


@torch.no_grad()
def logits(model, made=None):
    if made is None:
        return model.network(input_ids=TOKENS, use_cache=False).logits
    with attend_to(made):
        return model.network(input_ids=TOKENS, use_cache=False).logits


def model_prefix(reading, weights=WEIGHTS, **settings):
    return prefix(reading, weights, dtype=torch.float32, layers=range(1, 4), **settings)


def test_without_preference_two_readings_are_the_plain_prompt(tiny_llama):
    ones = [[1.0] * EXPERTS] * 2
    plain = logits(tiny_llama, model_prefix("renormalised", ones, opening=-0.5))
    assert torch.equal(logits(tiny_llama, model_prefix("values", ones, opening=-0.5)), plain)
    assert not torch.allclose(logits(tiny_llama, model_prefix("separate", ones, opening=-0.5)), plain, atol=0.1)


@pytest.mark.parametrize("reading", READINGS)
def test_an_opening_far_below_is_no_prompts_at_all(tiny_llama, reading):
    assert_close(logits(tiny_llama, model_prefix(reading, opening=-1e4)), logits(tiny_llama), **CLOSE)


def test_separate_groups_of_weight_nought_leave_the_text_to_the_bit(tiny_llama):
    closed = model_prefix("separate", [[0.0] * EXPERTS] * 2)
    assert torch.equal(logits(tiny_llama, closed), logits(tiny_llama))


def test_prompts_of_weight_nought_still_take_attention_only_where_values_are_scaled(tiny_llama):
    nought = [[0.0] * EXPERTS] * 2
    assert_close(logits(tiny_llama, model_prefix("renormalised", nought)), logits(tiny_llama), **CLOSE)
    assert not torch.allclose(logits(tiny_llama, model_prefix("values", nought)), logits(tiny_llama), atol=0.1)


def test_the_readings_differ(tiny_llama):
    found = [logits(tiny_llama, model_prefix(reading)) for reading in READINGS]
    assert min(float((found[a] - found[b]).abs().max()) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.1


# --- generation: cache, padding, beams


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_with_a_cache_is_generation_without(family, reading):
    model, made = tiny_model(family), model_prefix(reading, loudness=2.0)
    cached = generated(model, TOKENS, made, use_cache=True)
    assert torch.equal(cached, generated(model, TOKENS, made, use_cache=False))
    assert not torch.equal(cached, generated(model, TOKENS, model_prefix(reading, opening=-1e4)))


@pytest.mark.parametrize("reading", READINGS)
def test_generation_with_a_static_cache_is_generation_with_a_growing_one(tiny_llama, reading):
    made = model_prefix(reading, loudness=2.0)
    static = generated(tiny_llama, TOKENS, made, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generated(tiny_llama, TOKENS, made))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_example_is_generated_with_its_own_weights(tiny_llama, reading, beams):
    together = generated(tiny_llama, TOKENS, model_prefix(reading, loudness=2.0), num_beams=beams)
    for row in range(2):
        own = model_prefix(reading, WEIGHTS[row : row + 1], loudness=2.0)
        assert torch.equal(together[row : row + 1], generated(tiny_llama, TOKENS[row : row + 1], own, num_beams=beams))


@pytest.mark.parametrize("reading", READINGS)
def test_a_padded_batch_generates_as_each_alone(tiny_llama, reading):
    short = TOKENS[:1, 3:]
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), TOKENS[1:]])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    together = generated(tiny_llama, padded, model_prefix(reading), attention_mask=mask)
    alone = generated(tiny_llama, short, model_prefix(reading, WEIGHTS[:1]))
    assert torch.equal(together[0, 9:], alone[0, 6:])


# --- a mixture in each reading


def mixture_of(
    reading="renormalised", *, experts=EXPERTS, gated=True, temper=3.0, prompt_log_weight=-0.5, layer=LAYER, **mixing
):
    seeded = torch.Generator().manual_seed(0)
    groups = torch.randn(experts + mixing.get("shared", False), PROMPTS, HIDDEN, generator=seeded)
    gate = Gate(HIDDEN, experts, generator=seeded) if gated else None
    if gate is not None:
        gate.scale_logits(temper)
    return MixtureOfPrompts(
        groups, layer, gate, prompt_log_weight=prompt_log_weight, weighting=ExpertWeighting(mode=reading, **mixing)
    )


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def nats(model, states, mixture, *, compiled=False):
    batch = states.batch(range(len(DOCUMENTS)))
    applied = (
        mixture.compile_for_inference(model)(batch.instructions)
        if compiled
        else mixture.active(model, batch.instructions)
    )
    with applied:
        return score_responses(model, batch, states.layer).nll


@pytest.mark.parametrize("reading", READINGS)
def test_a_gradient_reaches_prompts_opening_and_gate(states, reading):
    model, mixture = tiny_model(), mixture_of(reading)
    nats(model, states, mixture).mean().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize("reading", READINGS)
def test_compiled_is_trained(tiny_llama, states, reading):
    mixture = mixture_of(reading)
    assert torch.equal(nats(tiny_llama, states, mixture, compiled=True), nats(tiny_llama, states, mixture))


@pytest.mark.parametrize("reading", READINGS)
def test_unopened_prompts_are_no_prompts(tiny_llama, states, reading):
    bare = score_responses(tiny_llama, states.batch(range(len(DOCUMENTS))), LAYER).nll
    assert_close(nats(tiny_llama, states, mixture_of(reading, prompt_log_weight=-1e4)), bare, rtol=1e-5, atol=1e-5)


# --- the strongest experts


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("count", [EXPERTS, None])
def test_all_experts_are_the_strongest_to_the_bit(tiny_llama, states, reading, count):
    found = nats(tiny_llama, states, mixture_of(reading, top_k=count), compiled=True)
    assert torch.equal(found, nats(tiny_llama, states, mixture_of(reading)))


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("count", [1, 2])
def test_only_the_strongest_act_and_only_at_inference(tiny_llama, states, reading, count):
    """The definition: others weigh nothing, kept ones as before to each other, all together the number of experts."""
    read, mixture = states.batch(range(len(DOCUMENTS))).instructions, mixture_of(reading, top_k=count)
    weights = mixture.training_log_weights(read).exp()
    expected = torch.zeros_like(weights)
    for row, one in enumerate(weights.tolist()):
        kept = sorted(range(EXPERTS), key=lambda expert: -one[expert])[:count]
        for expert in kept:
            expected[row, expert] = one[expert] * EXPERTS / math.fsum(one[other] for other in kept)
    assert_close(mixture.inference_log_weights(read).exp(), expected)
    assert_close(mixture.expert_weights(tiny_llama, read), expected)
    full = to_prefix(mixture.keys_and_values(tiny_llama), expected.log(), mixture.prompt_log_weight, reading)
    with attend_to(full):
        slow = score_responses(tiny_llama, states.batch(range(len(DOCUMENTS))), LAYER).nll
    assert_close(nats(tiny_llama, states, mixture, compiled=True), slow)
    assert torch.equal(nats(tiny_llama, states, mixture), nats(tiny_llama, states, mixture_of(reading)))


def test_of_equal_experts_the_first_act(states):
    read = states.batch(range(len(DOCUMENTS))).instructions
    acting = mixture_of(temper=0.0, top_k=2).inference_log_weights(read).exp()
    assert_close(acting, torch.tensor([1.5, 1.5, 0.0]).expand(len(DOCUMENTS), -1))


def test_groups_that_nobody_hears_are_dropped():
    made = keys_and_values(layers=(1, 2))
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]])[:, :EXPERTS].log()
    (keys, values), left = drop_inactive_groups(made, weights, "renormalised")
    assert torch.equal(left, weights[:, 1:2])
    for layer in (1, 2):
        assert torch.equal(keys[layer], made[0][layer][:, PROMPTS : 2 * PROMPTS])
        assert torch.equal(values[layer], made[1][layer][:, PROMPTS : 2 * PROMPTS])
    kept, same = drop_inactive_groups(made, torch.zeros(2, EXPERTS), "renormalised")
    assert kept is made
    assert drop_inactive_groups(made, weights, "values") == (made, weights)  # there they take attention all the same
    assert same.shape == (2, EXPERTS)


@pytest.mark.parametrize("mixing", [{"reading": reading} for reading in READINGS] + [{"top_k": 1}, {"shared": True}])
def test_the_cache_and_the_batch_change_no_answer(tiny_llama, mixing):
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    mixture = mixture_of(**mixing, layer=1).requires_grad_(False)
    batched = generate(tiny_llama, mixture, prompts, max_new_tokens=8)
    assert batched == generate(tiny_llama, mixture, prompts, max_new_tokens=8, use_cache=False)
    assert batched == [generate(tiny_llama, mixture, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert batched != generate(tiny_llama, None, prompts, max_new_tokens=8)


# --- a shared expert


def test_a_shared_expert_weighs_one_and_the_gate_is_over_the_others(tiny_llama, states):
    read, shared = states.batch(range(len(DOCUMENTS))).instructions, mixture_of(shared=True, top_k=1)
    weights = shared.training_log_weights(read)
    assert weights.shape == (len(DOCUMENTS), EXPERTS + 1)
    assert torch.equal(weights[:, -1], torch.zeros(len(DOCUMENTS)))
    assert torch.equal(weights[:, :-1], shared.gate(read.mean))
    assert_close(weights[:, :-1].exp().sum(1), torch.full((len(DOCUMENTS),), float(EXPERTS)))
    assert torch.equal(shared.inference_log_weights(read)[:, -1], torch.zeros(len(DOCUMENTS)))
    assert shared.expert_weights(tiny_llama, read).shape == (len(DOCUMENTS), EXPERTS)


def test_without_preference_a_shared_expert_is_one_more_group_of_the_plain_prompt(tiny_llama, states):
    shared = mixture_of(shared=True, temper=0.0)
    plain = MixtureOfPrompts(shared.prompts.detach().flatten(0, 1)[None], LAYER, None, prompt_log_weight=-0.5)
    assert_close(nats(tiny_llama, states, shared), nats(tiny_llama, states, plain))


def test_a_shared_expert_leaves_the_others_as_they_are(tiny_llama):
    (keys, values), (own_keys, own_values) = (
        one.keys_and_values(tiny_llama) for one in (mixture_of(shared=True), mixture_of())
    )
    with torch.no_grad():
        for layer, key in own_keys.items():
            assert_close(keys[layer][:, :-PROMPTS], key)
            assert_close(values[layer][:, :-PROMPTS], own_values[layer])
