import math
from dataclasses import replace

import pytest
import torch
from attention_cases import HEAD, KV_HEADS, AttentionLayer, generate_with_prefix
from tiny_models import config_of, network_of, random_tokens, tiny_model
from torch.testing import assert_close
from transformers import DynamicCache

from mopcompress.errors import DataError
from mopcompress.models.attention import Prefix, attend_to, prompted_attention, record_attention, record_kv
from mopcompress.models.compat import CACHE

TOKENS = random_tokens(2, 9)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = 3


def to_prefix(log_gate, *, layers=range(1, 4), seed=0, loudness=1.0):
    """Return random keys and values for some layers of a tiny Llama."""
    seeded = torch.Generator().manual_seed(seed)
    keys = {layer: loudness * torch.randn(KV_HEADS, PROMPTS, HEAD, generator=seeded) for layer in layers}
    values = {layer: loudness * torch.randn(KV_HEADS, PROMPTS, HEAD, generator=seeded) for layer in layers}
    return Prefix(keys, values, log_gate)


def gates(*rows):
    """Return log gates from a row of weights per example."""
    return torch.tensor(rows).log()


@torch.no_grad()
def logits(model, tokens, prefix=None, **inputs):
    if prefix is None:
        return model.network(input_ids=tokens, use_cache=False, **inputs).logits
    with attend_to(prefix):
        return model.network(input_ids=tokens, use_cache=False, **inputs).logits


# --- without prompts


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_without_prompts_it_is_sdpa_to_the_bit(family):
    ours, theirs = (network_of(config_of(family), attention=name) for name in ("mopcompress", "sdpa"))
    padded = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    for inputs in ({}, {"attention_mask": padded}):
        assert torch.equal(ours(input_ids=TOKENS, **inputs).logits, theirs(input_ids=TOKENS, **inputs).logits)


@pytest.mark.parametrize("log_gate", [-1e4, -math.inf])
def test_a_closed_gate_is_no_prompt(tiny_llama, log_gate):
    closed = to_prefix(torch.full((2, PROMPTS), log_gate))
    assert_close(logits(tiny_llama, TOKENS, closed), logits(tiny_llama, TOKENS), **CLOSE)


def test_prompts_matter(tiny_llama):
    """Otherwise the other tests would compare nothing."""
    changed = logits(tiny_llama, TOKENS, to_prefix(torch.zeros(2, PROMPTS))) - logits(tiny_llama, TOKENS)
    assert float(changed.abs().amax(-1).min()) > 0.1


# --- the definition


def attention_by_definition(query, key, value, prefix, layer, scaling):
    """Normalise weights exp(s) of text and g exp(s) of prompts together, query by query."""
    batch, heads, time, _ = query.shape
    result = torch.empty(batch, time, heads, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            shared = h // (heads // key.shape[1])
            for t in range(time):
                position = key.shape[2] - time + t
                keys = [*prefix.keys[layer][shared], *key[b, shared, : position + 1]]
                values = [*prefix.values[layer][shared], *value[b, shared, : position + 1]]
                factors = [*prefix.log_gate[b].exp().tolist(), *[1.0] * (position + 1)]
                weights = [
                    g * math.exp(scaling * float(query[b, h, t] @ k)) for g, k in zip(factors, keys, strict=True)
                ]
                parts = [weight * v for weight, v in zip(weights, values, strict=True)]
                result[b, t, h] = torch.stack(parts).sum(0) / math.fsum(weights)
    return result


@pytest.mark.parametrize(("time", "keys"), [(5, 5), (1, 5)])
def test_gates_scale_the_weight_of_each_prompt(time, keys):
    seeded = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, length, HEAD, generator=seeded, dtype=torch.float64)
        for heads, length in ((4, time), (KV_HEADS, keys), (KV_HEADS, keys))
    )
    in_fp32 = to_prefix(gates([1.0, 0.25, 3.0], [0.0, 1.0, 1e-3]))
    prefix = Prefix({1: in_fp32.keys[1].double()}, {1: in_fp32.values[1].double()}, in_fp32.log_gate.double())
    with attend_to(prefix):
        attended, _ = prompted_attention(AttentionLayer(), query, key, value, None, scaling=0.3)
    assert_close(attended, attention_by_definition(query, key, value, prefix, 1, 0.3), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("value_gate", [None, torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.1, 3.0]])])
@pytest.mark.parametrize("examples", [2, 6])
def test_one_query_alone_is_the_last_of_many(value_gate, examples):
    """Compare a generation step with the run of the prompt, with padding and with three beams per example."""
    seeded = torch.Generator().manual_seed(0)
    shapes = ((examples, 4, 5, HEAD), (examples, KV_HEADS, 7, HEAD), (examples, KV_HEADS, 7, HEAD))
    query, key, value = (torch.randn(shape, generator=seeded) for shape in shapes)
    mask = torch.rand(examples, 1, 5, 7, generator=seeded) < 0.7
    module = torch.nn.Module()
    module.layer_idx = 1
    prefix = replace(to_prefix(torch.randn(2, PROMPTS, generator=seeded)), value_gate=value_gate)
    with attend_to(prefix), record_attention() as recorded:
        many, _ = prompted_attention(module, query, key, value, mask)
        recorded_many = recorded[1]
        alone, _ = prompted_attention(module, query[:, :, -1:], key, value, mask[:, :, -1:])
    assert_close(alone, many[:, -1:])
    assert_close(recorded[1], recorded_many[:, -1:])


def test_open_gates_equal_a_real_prefix_of_the_text(tiny_llama):
    """Keys and values of real text, used as prompts in every layer, have the effect of the text itself."""
    text, split = random_tokens(1, 12, seed=3), PROMPTS
    cache = DynamicCache(config=tiny_llama.network.config)
    tiny_llama.network(input_ids=text[:, :split], use_cache=True, **{CACHE: cache})
    prefix = Prefix(
        {layer: cached.keys[0] for layer, cached in enumerate(cache.layers)},
        {layer: cached.values[0] for layer, cached in enumerate(cache.layers)},
        torch.zeros(1, split),
    )
    later = logits(tiny_llama, text[:, split:], prefix, position_ids=torch.arange(split, 12)[None])
    assert_close(later, logits(tiny_llama, text)[:, split:], **CLOSE)


def test_layers_without_prompts_are_unchanged(tiny_llama):
    with attend_to(to_prefix(torch.zeros(2, PROMPTS), layers=[2, 3])):
        inside = tiny_llama.run_lower(TOKENS, 2), tiny_llama.run_lower(TOKENS, 3)
    assert torch.equal(inside[0], tiny_llama.run_lower(TOKENS, 2))
    assert not torch.allclose(inside[1], tiny_llama.run_lower(TOKENS, 3), atol=1e-2)


# --- batches, padding, generation


def test_a_batchs_neighbours_do_not_matter(tiny_llama):
    log_gate = gates([1.0, 2.0, 0.1], [0.5, 0.0, 1.0])
    together = logits(tiny_llama, TOKENS, to_prefix(log_gate))
    for row in range(2):
        alone = logits(tiny_llama, TOKENS[row : row + 1], to_prefix(log_gate[row : row + 1]))
        assert_close(together[row : row + 1], alone, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(tiny_llama, side):
    prefix, width = to_prefix(gates([1.0, 2.0, 0.1])), 4
    tokens, padding = TOKENS[:1], torch.zeros(1, 4, dtype=torch.long)
    real = slice(width, None) if side == "left" else slice(None, -width)
    padded = torch.cat([padding, tokens] if side == "left" else [tokens, padding], dim=1)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded_logits = logits(tiny_llama, padded, prefix, attention_mask=mask, position_ids=positions)
    assert bool(padded_logits.isfinite().all())
    assert_close(padded_logits[:, real], logits(tiny_llama, tokens, prefix), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_does_not_change_generation(family):
    model, prefix = tiny_model(family), to_prefix(gates([1.0, 2.0, 0.1], [0.5, 0.0, 1.0]), loudness=2.0)
    cached = generate_with_prefix(model, TOKENS, prefix, use_cache=True)
    assert torch.equal(cached, generate_with_prefix(model, TOKENS, prefix, use_cache=False))
    assert not torch.equal(cached, generate_with_prefix(model, TOKENS, to_prefix(torch.full((2, PROMPTS), -1e4))))


def test_a_static_cache_does_not_change_generation(tiny_llama):
    prefix = to_prefix(gates([1.0, 2.0, 0.1], [0.5, 0.0, 1.0]), loudness=2.0)
    static = generate_with_prefix(tiny_llama, TOKENS, prefix, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate_with_prefix(tiny_llama, TOKENS, prefix))


@pytest.mark.parametrize("beams", [1, 3])
def test_each_example_is_generated_with_its_own_gate(tiny_llama, beams):
    log_gate = gates([5.0, 0.1, 0.1], [0.1, 0.1, 5.0])
    together = generate_with_prefix(tiny_llama, TOKENS, to_prefix(log_gate, loudness=2.0), num_beams=beams)
    for row in range(2):
        row_prefix = to_prefix(log_gate[row : row + 1], loudness=2.0)
        alone = generate_with_prefix(tiny_llama, TOKENS[row : row + 1], row_prefix, num_beams=beams)
        assert torch.equal(together[row : row + 1], alone)


def test_a_padded_batch_generates_as_each_alone(tiny_llama):
    log_gate = gates([1.0, 2.0, 0.1], [0.5, 0.0, 1.0])
    short = TOKENS[:1, 3:]
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), TOKENS[1:]])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    together = generate_with_prefix(tiny_llama, padded, to_prefix(log_gate), attention_mask=mask)
    alone = generate_with_prefix(tiny_llama, short, to_prefix(log_gate[:1]))
    assert torch.equal(together[0, 9:], alone[0, 6:])


# --- contexts


def test_an_error_ends_the_prompts_too(tiny_llama):
    before = logits(tiny_llama, TOKENS)
    with pytest.raises(KeyError), attend_to(to_prefix(torch.zeros(2, PROMPTS))):
        raise KeyError
    assert torch.equal(logits(tiny_llama, TOKENS), before)


def test_the_outer_prefix_returns_after_the_inner_one(tiny_llama):
    outer, inner = to_prefix(torch.zeros(2, PROMPTS)), to_prefix(torch.zeros(2, PROMPTS), seed=1)
    expected = logits(tiny_llama, TOKENS, outer)
    with attend_to(outer):
        assert not torch.equal(logits(tiny_llama, TOKENS, inner), expected)
        assert torch.equal(logits(tiny_llama, TOKENS), expected)


@torch.no_grad()
def test_recorded_keys_and_values_are_those_of_the_cache(tiny_llama):
    with record_kv() as recorded:
        cache = tiny_llama.network(input_ids=TOKENS, use_cache=True)[CACHE]
    tiny_llama.network(input_ids=TOKENS)
    assert sorted(recorded) == [0, 1, 2, 3]
    for layer, (key, value) in recorded.items():
        assert torch.equal(key, cache.layers[layer].keys)
        assert torch.equal(value, cache.layers[layer].values)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_unsupported_attention_is_a_data_error(argument):
    query, key = torch.zeros(1, 4, 2, HEAD), torch.zeros(1, KV_HEADS, 2, HEAD)
    with pytest.raises(DataError, match=argument):
        prompted_attention(AttentionLayer(), query, key, key, None, **{argument: torch.ones(())})
