"""The dense pass, and methods that match the dense model."""

import pytest
import torch
from compression_cases import (
    CALIBRATION_TOKENS,
    METHOD_OPTIONS,
    RoutedLinears,
    linear_inputs,
    linears,
    method_configs,
    weight_of,
)
from tiny_models import random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.algorithms import METHODS
from mopcompress.compress.dense_pass import dense_activations
from mopcompress.compress.sequential import compress_model


@torch.no_grad()
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "gptq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_matched_linear_starts_from_its_dense_target(family, method):
    fast, slow, dense = (tiny_model(family) for _ in range(3))
    for model in (fast, slow, dense):
        model.network.double()
    compress_model(fast, CALIBRATION_TOKENS, method_configs(method, match_dense=0.7))
    for name, linear in linears(slow).items():
        weight, inputs = weight_of(linear), linear_inputs(slow, linear)
        dense_inputs = linear_inputs(dense, linears(dense)[name])
        # min over V of |W x_dense - V x|² + ridge |V - W|², as one least-squares problem with the ridge as more rows
        ridge = (0.1 * inputs.square().mean()) ** 0.5 * len(inputs) ** 0.5
        left = torch.cat([inputs, ridge * torch.eye(inputs.shape[1])])
        right = torch.cat([dense_inputs @ weight.T, ridge * weight.T])
        best = torch.linalg.lstsq(left, right).solution.T
        target = weight + 0.7 * (best - weight)
        statistic = None if method == "magnitude" else inputs.T @ inputs / len(inputs)
        weight.copy_(METHODS[method].solve(target, statistic, **METHOD_OPTIONS[method]).weight)
    for name, linear in linears(fast).items():
        expected = weight_of(linears(slow)[name])
        assert_close(weight_of(linear), expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tokens_per_run", [1, 60, 1000])
def test_chunks_of_the_dense_pass_change_nothing(monkeypatch, tokens_per_run):
    whole, chunked = tiny_model("llama"), tiny_model("llama")
    for model in (whole, chunked):
        model.network.double()
    compress_model(whole, CALIBRATION_TOKENS, method_configs(match_dense=1.0))
    monkeypatch.setattr("mopcompress.compress.dense_pass._TOKENS", tokens_per_run)
    compress_model(chunked, CALIBRATION_TOKENS, method_configs(match_dense=1.0))
    for name, linear in linears(chunked).items():
        assert_close(linear.weight, linears(whole)[name].weight)


@torch.no_grad()
def test_outputs_are_recorded_where_they_are_fewer():
    model = tiny_model("gpt2")  # its linears have biases
    up, down = model.blocks[0].mlp.c_fc, model.blocks[0].mlp.c_proj
    down.bias.normal_()
    _, activations = dense_activations(model, CALIBRATION_TOKENS, None, 0, [[up], [down]])
    inputs = linear_inputs(model, down)
    assert not activations[up].are_outputs
    assert_close(activations[up].values, linear_inputs(model, up))
    assert activations[down].are_outputs
    assert_close(activations[down].values, inputs @ down.weight, atol=1e-5, rtol=1e-5)


def test_matching_without_earlier_compression_changes_nothing():
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    models = [tiny_model(), tiny_model()]
    for model, match_dense in zip(models, (0.0, 1.0), strict=True):
        compress_model(model, CALIBRATION_TOKENS, method_configs(targets=first, match_dense=match_dense))
    for name in first:
        assert torch.equal(linears(models[0])[name].weight, linears(models[1])[name].weight)


@torch.no_grad()
def test_matching_brings_the_model_closer_to_the_dense_one():
    dense, tokens = tiny_model(), random_tokens(64, 20)
    expected = dense.network(input_ids=tokens).logits
    errors = []
    for match_dense in (0.0, 1.0):
        model = tiny_model()
        compress_model(model, tokens, method_configs(match_dense=match_dense))
        errors.append(float((model.network(input_ids=tokens).logits - expected).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("match_samples", [0.01, 0.5])
def test_match_samples_limits_the_dense_pass(monkeypatch, match_samples):
    """The result differs from matching all samples, and from matching none."""
    samples = []

    def record(model, tokens, hidden, index, groups):
        samples.append((len(tokens), None if hidden is None else len(hidden)))
        return dense_activations(model, tokens, hidden, index, groups)

    monkeypatch.setattr("mopcompress.compress.sequential.dense_activations", record)
    models = [tiny_model() for _ in range(3)]
    tokens = random_tokens(5, 20)
    for model, match_dense, fraction in zip(models, (0.0, 1.0, 1.0), (1.0, 1.0, match_samples), strict=True):
        compress_model(model, tokens, method_configs(match_dense=match_dense, match_samples=fraction))
    matched = 1 if match_samples == 0.01 else 3
    assert samples == [(5, None), *[(5, 5)] * 3, (matched, None), *[(matched, matched)] * 3]
    unmatched, whole, part = (linears(model)["model.layers.2.mlp.down_proj"].weight for model in models)
    assert not torch.equal(part, whole)
    assert not torch.equal(part, unmatched)


@pytest.mark.parametrize("match_samples", [0.01, 1.0])
@pytest.mark.parametrize("tokens_per_run", [1, 1000])
def test_a_linear_with_some_tokens_matches_its_own_outputs(monkeypatch, tokens_per_run, match_samples):
    monkeypatch.setattr("mopcompress.compress.dense_pass._TOKENS", tokens_per_run)
    routed = [tiny_model(), tiny_model()]
    for model, match_dense in zip(routed, (0.0, 1.0), strict=True):
        torch.manual_seed(0)
        model.blocks[3].mlp = RoutedLinears(32).requires_grad_(False)
        names = ["model.layers.3.mlp.up", "model.layers.3.mlp.down"]
        compress_model(
            model,
            CALIBRATION_TOKENS,
            method_configs(targets=names, match_dense=match_dense, match_samples=match_samples),
        )
    for name in names:
        assert torch.equal(linears(routed[0])[name].weight, linears(routed[1])[name].weight)
