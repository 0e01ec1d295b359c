"""GPTQModifier: published presets, and one clear line for every impossible rounding."""

import pytest
from recipe_builders import faults, in_group

from mopcompress.recipe import (
    GPTQModifier,
    load_recipe,
)


@pytest.mark.parametrize(
    ("scheme", "bits", "group_size"), [("W2A16", 2, 128), ("W3A16", 3, 128), ("w4a16", 4, 128), ("W8A16", 8, None)]
)
def test_schemes_are_the_published_presets(write, scheme, bits, group_size):
    gptq = load_recipe(write(in_group("GPTQModifier", {"scheme": scheme, "targets": "Linear"}))).modifier_for("gptq")
    assert (gptq.bits, gptq.group_size, gptq.symmetric, gptq.targets) == (bits, group_size, True, ("Linear",))


@pytest.mark.parametrize(
    "weights", [{"strategy": "channel"}, {"group_size": -1}, {"strategy": "channel", "group_size": -1}]
)
def test_one_scale_per_row_has_no_group_size(write, weights):
    fields = {"config_groups": {"g": {"weights": {"num_bits": 4, **weights}}}}
    assert load_recipe(write(in_group("GPTQModifier", fields))).modifier_for("gptq").group_size is None


def test_activation_order_is_read_in_either_place(write):
    weights = {"num_bits": 4, "group_size": 64, "actorder": "weight", "observer": "minmax", "dynamic": False}
    gptq = load_recipe(write(in_group("GPTQModifier", {"config_groups": {"g": {"weights": weights}}}))).modifier_for(
        "gptq"
    )
    assert (gptq.actorder, gptq.group_size) == ("static", 64)
    off = load_recipe(write(in_group("GPTQModifier", {"scheme": "W4A16", "actorder": None}))).modifier_for("gptq")
    assert off.actorder is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"num_bits": 1, "group_size": 64},
            "weights.num_bits: not one of 2, 3, 4, 8: no stock tool stores another width, found 1; did you mean 2?",
        ),
        ({"num_bits": 5, "group_size": 64}, "found 5; did you mean 4?"),
        ({"num_bits": 6, "group_size": 64}, "found 6; did you mean 8?"),
        ({"num_bits": 17, "group_size": 64}, "found 17; did you mean 8?"),
        ({"num_bits": 4}, "weights.strategy: not made here; write channel (one scale per row), or group"),
        (
            {"num_bits": 4, "strategy": "tensor"},
            "weights.strategy: not made here; write channel (one scale per row), or group with a group_size",
        ),
        ({"num_bits": 4, "strategy": "group"}, "weights.group_size: strategy: group needs a group_size"),
        ({"num_bits": 4, "strategy": "channel", "group_size": 64}, "channel has one scale per row"),
        (
            {"num_bits": 4, "strategy": "channel", "type": "float"},
            "weights.type: floating-point grids (FP8, NVFP4) are not made here; write int",
        ),
        ({"num_bits": 4, "strategy": "channel", "symmetric": False}, "weights.symmetric: asymmetric grids are not"),
        ({"num_bits": 4, "strategy": "channel", "dynamic": True}, "weights.dynamic: not False, found True"),
        (
            {"num_bits": 4, "strategy": "channel", "observer": "ms"},
            "mse, memoryless_mse, found 'ms'; did you mean 'mse'?",
        ),
        (
            {"num_bit": 4, "num_bits": 4, "strategy": "channel"},
            "weights.num_bit: no such field; did you mean 'num_bits'?",
        ),
    ],
)
def test_an_impossible_rounding_is_one_clear_line(write, weights, message):
    errors = faults(write(in_group("GPTQModifier", {"config_groups": {"g": {"weights": weights}}})))
    assert len(errors) == 1
    assert f"r.yaml: a_stage.b_modifiers.GPTQModifier.config_groups.g.{message}" in errors[0] or message in errors[0]


def test_contradictions_inside_gptq_are_named(write):
    group = {"weights": {"num_bits": 4, "group_size": 64, "actorder": "static"}, "targets": ["re:.*up_proj"]}
    assert (
        "targets differ"
        in faults(write(in_group("GPTQModifier", {"config_groups": {"g": group}, "targets": "Linear"})))[0]
    )
    assert (
        "actorder differs"
        in faults(write(in_group("GPTQModifier", {"config_groups": {"g": group}, "actorder": None})))[0]
    )
    same = {"config_groups": {"g": group}, "targets": "re:.*up_proj"}
    assert load_recipe(write(in_group("GPTQModifier", same))).modifiers(GPTQModifier)[0].targets == ("re:.*up_proj",)
    aimed = {"config_groups": {"g": {"weights": group["weights"]}}, "targets": "re:.*up_proj"}
    assert load_recipe(write(in_group("GPTQModifier", aimed))).modifiers(GPTQModifier)[0].targets == ("re:.*up_proj",)
    activations = {"config_groups": {"g": group | {"input_activations": {"num_bits": 8}}}}
    assert (
        "input_activations: activations are not rounded here; leave it out"
        in faults(write(in_group("GPTQModifier", activations)))[0]
    )
