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
from tiny_models import FAMILIES, hooks, tiny_model
from torch import nn
from torch.testing import assert_close

from mopcompress.algorithms import METHODS
from mopcompress.algorithms.dense_targets import DenseActivations
from mopcompress.compress.plan import PlannedMethod
from mopcompress.compress.sequential import compress_model, compress_on_input, linears_of
from mopcompress.errors import DataError, NumericalError


def compress_slowly(model, method):
    """Compress linear by linear, each alone, on inputs that are computed anew from the tokens."""
    with torch.no_grad():
        for linear in linears(model).values():
            inputs = linear_inputs(model, linear)
            statistic = {
                "magnitude": None,
                "wanda": inputs.square().mean(0).sqrt(),
                "sparsegpt": inputs.T @ inputs / len(inputs),
                "alps": inputs.T @ inputs / len(inputs),
                "gptq": inputs.T @ inputs / len(inputs),
            }[method]
            solved = METHODS[method].solve(weight_of(linear).clone(), statistic, **METHOD_OPTIONS[method])
            weight_of(linear).copy_(solved.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_pass_is_the_slow_definition(family, method):
    fast, slow = tiny_model(family), tiny_model(family)
    fast.network.double()
    slow.network.double()
    compress_model(fast, CALIBRATION_TOKENS, method_configs(method))
    compress_slowly(slow, method)
    for name, linear in linears(fast).items():
        expected = weight_of(linears(slow)[name])
        assert_close(weight_of(linear), expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(weight_of(linear) == 0, expected == 0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_only_linears_of_blocks_change(family, method):
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    compress_model(model, CALIBRATION_TOKENS, method_configs(method))
    changed = {name for name, weight in model.network.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{name}.weight" for name in linears(model)}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact_and_counted_afterwards(family, method):
    model = tiny_model(family)
    rows = compress_model(model, CALIBRATION_TOKENS, method_configs(method))
    blocks = range(len(model.blocks))
    by_name = {name: linear for index in blocks for linear, name in linears_of(model, index).items()}
    assert sorted(row.name for row in rows) == sorted(by_name)
    for row in rows:
        linear = by_name[row.name]
        outs, ins = weight_of(linear).shape
        count = outs * round(0.4 * ins) if method == "wanda" else round(0.4 * outs * ins)
        assert row.zeros == count == int((linear.weight == 0).sum())
        assert (row.weights, row.blocks, row.escalations) == (outs * ins, 4, 0)
        assert f".{row.block}." in row.name


def test_a_pattern_holds_in_every_group():
    model = tiny_model()
    options = {"sparsity": 0.5, "pattern": (2, 4)}
    compress_model(model, CALIBRATION_TOKENS, method_configs(options=options))
    for linear in linears(model).values():
        assert bool(((linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all())


def test_quantized_weights_lie_on_a_grid():
    model = tiny_model()
    compress_model(model, CALIBRATION_TOKENS, method_configs("gptq"))
    for linear in linears(model).values():
        for group in linear.weight.unflatten(1, (-1, 8)).flatten(0, 1):
            assert len(group.unique()) <= 2**3


def test_sparsity_zero_changes_nothing():
    model, untouched = tiny_model(), tiny_model()
    for method in ("magnitude", "wanda", "sparsegpt"):
        compress_model(model, CALIBRATION_TOKENS, method_configs(method, options={"sparsity": 0.0}))
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, untouched.network.state_dict()[name])


def test_progress_receives_every_row():
    rows = []
    assert compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(), progress=rows.append) == rows
    assert len(rows) == 28


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_hook_stays(family):
    model = tiny_model(family)
    before = hooks(model.network)
    compress_model(model, CALIBRATION_TOKENS, method_configs())
    assert hooks(model.network) == before


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gptq"])
def test_an_error_names_the_layer_and_removes_hooks(method):
    model = tiny_model()
    model.blocks[2].post_attention_layernorm.weight[5] = torch.inf
    before = hooks(model.network)
    with pytest.raises(NumericalError, match=r"^model\.layers\.2\.mlp\.gate_proj: .*input 5"):
        compress_model(model, CALIBRATION_TOKENS, method_configs(method))
    assert hooks(model.network) == before


def test_an_error_about_options_names_the_layer():
    pattern = method_configs(options={"sparsity": 0.6, "pattern": (3, 5)})
    with pytest.raises(DataError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*no multiple"):
        compress_model(tiny_model(), CALIBRATION_TOKENS, pattern)


def test_a_linear_without_the_first_token_is_compressed():
    model = tiny_model()
    model.blocks[1].mlp = RoutedLinears(32).requires_grad_(False)
    rows = compress_model(model, CALIBRATION_TOKENS, method_configs("wanda"))
    assert {row.name for row in rows} >= {"model.layers.1.mlp.up", "model.layers.1.mlp.down"}


def test_an_error_names_a_linear_that_no_token_reaches():
    model = tiny_model()
    model.blocks[1].mlp.spare = nn.Linear(32, 32)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.spare: no calibration token"):
        compress_model(model, CALIBRATION_TOKENS, method_configs())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [20, 30])
def test_dense_activations_are_used_only_when_all_tokens_arrive(tokens):
    linear, inputs = nn.Linear(8, 8, bias=False), torch.randn(20, 8)
    weight = linear.weight.clone()
    activations = {linear: DenseActivations(inputs.roll(1, 0)[:10], are_outputs=False)}
    methods = [PlannedMethod(method_configs("magnitude", options={"sparsity": 0.0}, match_dense=1.0)[0], {"layer": 0})]
    with compress_on_input({linear: "layer"}, [[linear]], activations, methods, tokens=tokens, dtype=None) as solved:
        linear(inputs)
    assert [result.linear for result in solved] == [linear]
    assert torch.equal(linear.weight, weight) == (tokens == 30)
    assert activations == {}
