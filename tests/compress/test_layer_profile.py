import pytest
import torch
from compress.test_sequential import TOKENS, input_of, linears, weight_of
from tiny_models import hooks, tiny_model

from mopcompress.compress.layer_profile import errors_of, profile_layers


def surveyed(model):
    return profile_layers(model, TOKENS, linears(model), multiple=5.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_those_of_the_dense_model(family):
    model = tiny_model(family)
    surveys, norms = surveyed(model)
    assert surveys.keys() == norms.keys() == linears(model).keys()
    for name, linear in linears(model).items():
        expected = input_of(model, linear).square().mean(0).sqrt()
        torch.testing.assert_close(norms[name], expected)
        assert surveys[name].weights == linear.weight.numel()
    assert not hooks(model.network)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trial_is_the_pruned_models_distance_and_leaves_the_model_alone(family):
    model, pruned = tiny_model(family), tiny_model(family)
    _, norms = surveyed(model)
    shares = dict.fromkeys(norms, 0.5)
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    errors = errors_of(model, TOKENS[:2], {"half": shares, "nothing": dict.fromkeys(norms, 0.0)}, norms)
    with torch.no_grad():
        for name, linear in linears(pruned).items():
            scores = weight_of(linear).abs() * norms[name]
            kept = scores.flatten().argsort()[scores.numel() // 2 :]
            mask = torch.zeros(scores.numel()).index_fill(0, kept, 1.0).reshape(scores.shape)
            weight_of(linear).mul_(mask)
        decoder, other = model.network.get_decoder(), pruned.network.get_decoder()
        dense, moved = (one(input_ids=TOKENS[:2]).last_hidden_state for one in (decoder, other))
    assert errors["half"] == pytest.approx(float((moved - dense).square().sum() / dense.square().sum()), rel=1e-4)
    assert errors["nothing"] == 0
    assert all(torch.equal(before[name], weight) for name, weight in model.network.state_dict().items())


def test_only_the_named_linears_are_surveyed():
    model = tiny_model("llama")
    surveys, norms = profile_layers(model, TOKENS, ["model.layers.1.mlp.up_proj"], multiple=5.0)
    assert list(surveys) == list(norms) == ["model.layers.1.mlp.up_proj"]
