"""(IA)^3: the linears that it scales."""

import pytest
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
