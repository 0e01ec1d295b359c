import pytest
import torch
from compression_cases import CALIBRATION_TOKENS, linear_inputs, linears, weight_of
from tiny_models import hooks, tiny_model

from mopcompress.compress.layer_profile import allocation_errors, profile_layers


def profiled(model):
    return profile_layers(model, CALIBRATION_TOKENS, linears(model), multiple=5.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_those_of_the_dense_model(family):
    model = tiny_model(family)
    profiles, norms = profiled(model)
    assert profiles.keys() == norms.keys() == linears(model).keys()
    for name, linear in linears(model).items():
        expected = linear_inputs(model, linear).square().mean(0).sqrt()
        torch.testing.assert_close(norms[name], expected)
        assert profiles[name].weights == linear.weight.numel()
    assert not hooks(model.network)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trial_is_the_error_of_the_pruned_model(family):
    model, pruned = tiny_model(family), tiny_model(family)
    _, norms = profiled(model)
    sparsities = dict.fromkeys(norms, 0.5)
    dense_weights = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    errors = allocation_errors(
        model, CALIBRATION_TOKENS[:2], {"half": sparsities, "nothing": dict.fromkeys(norms, 0.0)}, norms
    )
    with torch.no_grad():
        for name, linear in linears(pruned).items():
            scores = weight_of(linear).abs() * norms[name]
            remaining = scores.flatten().argsort()[scores.numel() // 2 :]
            mask = torch.zeros(scores.numel()).index_fill(0, remaining, 1.0).reshape(scores.shape)
            weight_of(linear).mul_(mask)
        decoders = [network.get_decoder() for network in (model.network, pruned.network)]
        dense, moved = (decoder(input_ids=CALIBRATION_TOKENS[:2]).last_hidden_state for decoder in decoders)
    assert errors["half"] == pytest.approx(float((moved - dense).square().sum() / dense.square().sum()), rel=1e-4)
    assert errors["nothing"] == 0
    assert all(torch.equal(dense_weights[name], weight) for name, weight in model.network.state_dict().items())


def test_only_the_named_linears_are_profiled():
    model = tiny_model("llama")
    profiles, norms = profile_layers(model, CALIBRATION_TOKENS, ["model.layers.1.mlp.up_proj"], multiple=5.0)
    assert list(profiles) == list(norms) == ["model.layers.1.mlp.up_proj"]
