"""(IA)^3: the linears that it scales."""

import pytest
import torch
from factories import adapter_config
from tiny_models import tiny_model

from mopcompress.errors import DataError
from mopcompress.recover.methods import ia3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_have_no_linear_to_scale(family):
    model = tiny_model(family)
    with pytest.raises(DataError, match="no linears down_proj, or fc2"):
        ia3.build(model, adapter_config("ia3", model, layer=2))


def test_keys_values_and_mlps_are_scaled_on_their_own_side(tiny_llama):
    patches = ia3.build(tiny_llama, adapter_config("ia3", tiny_llama, layer=3)).patches_by_name()
    sides = {name.rpartition(".")[2]: patch.scales_inputs for name, patch in patches.items()}
    assert sides == {"k_proj": False, "v_proj": False, "down_proj": True}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_biases_of_scaled_outputs_are_scaled_too(family):
    model = tiny_model(family)
    patches = ia3.build(model, adapter_config("ia3", model, layer=3)).patches_by_name()
    for name, patch in patches.items():
        linear = model.network.get_submodule(name)
        linear.bias.add_(1.0)
        patch.scale.mul_(2.0)
        assert torch.equal(patch.merged(linear)["weight"], 2 * linear.weight)
        assert ("bias" in patch.merged(linear)) == (not patch.scales_inputs)
        if not patch.scales_inputs:
            assert torch.equal(patch.merged(linear)["bias"], 2 * linear.bias)
