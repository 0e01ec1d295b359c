"""Modifiers: older names, checked copies, and one clear line for every impossible value."""

import pytest
from recipe_builders import faults, in_group

from mopcompress.errors import RecipeError
from mopcompress.recipe import (
    MagnitudePruningModifier,
    PromptRecoveryModifier,
    SparseGPTModifier,
    WandaPruningModifier,
    dump_recipe,
    load_recipe,
)


def test_prunen_and_prunem_are_a_mask_structure(write):
    recipe = load_recipe(write(in_group("SparseGPTModifier", {"sparsity": 0.5, "prunen": 2, "prunem": 4})))
    assert recipe.modifiers(SparseGPTModifier)[0].pattern == (2, 4)


def test_magnitude_goes_to_its_final_sparsity(write):
    fields = {
        "init_sparsity": 0.1, "final_sparsity": 0.8, "start": 0, "end": 1, "update": 0.5, "update_scheduler": "cubic",
        "scheduler_args": {},
        "targets": ["re:.*weight"], "mask_structure": "unstructured", "leave_enabled": True, "apply_globally": False,
    }  # fmt: skip
    modifier = load_recipe(write(in_group("MagnitudePruningModifier", fields))).modifiers(MagnitudePruningModifier)[0]
    assert (modifier.method, modifier.sparsity, modifier.pattern) == ("magnitude", 0.8, None)


def test_a_list_has_one_share_per_target(write):
    fields = {"sparsity": [0.5, 0.7], "targets": ["re:.*mlp", "re:.*attn"]}
    recipe = load_recipe(write(in_group("SparseGPTModifier", fields)))
    assert recipe.modifier_for("sparsegpt").sparsity == (0.5, 0.7)
    assert recipe.run.ratios == ()
    assert load_recipe(write(dump_recipe(recipe))) == recipe
    assert recipe.modifier_for("sparsegpt").with_sparsity(0.6).sparsity == 0.6


def test_a_sparsity_profile_is_an_allocation(write):
    fields = {"sparsity": 0.7, "sparsity_profile": "owl", "owl_m": 7, "owl_lmbda": 0.1}
    recipe = load_recipe(write(in_group("SparseGPTModifier", fields)))
    modifier = recipe.modifier_for("sparsegpt")
    assert (modifier.allocation, modifier.owl_m, modifier.allocation_spread) == ("owl", 7, 0.1)
    assert load_recipe(write(dump_recipe(recipe))) == recipe
    unset = {"sparsity": 0.7, "sparsity_profile": None, "owl_m": None, "owl_lmbda": None}
    assert load_recipe(write(in_group("WandaPruningModifier", unset))).modifier_for("wanda").allocation == "uniform"


def test_a_copy_changes_the_share_alone(write):
    fields = {"sparsity": 0.5, "ignore": ["re:.*up_proj"], "percdamp": 0.1, "block_size": 32}
    own = load_recipe(write(in_group("SparseGPTModifier", fields))).modifier_for("sparsegpt")
    assert own.with_sparsity(0.85).model_dump() == own.model_dump() | {"sparsity": 0.85}
    assert MagnitudePruningModifier(final_sparsity=0.5).with_sparsity(0.9).sparsity == 0.9
    gptq = load_recipe(write(in_group("GPTQModifier", {"scheme": "W4A16", "ignore": "lm_head"}))).modifier_for("gptq")
    copy = gptq.with_bits(3, 32)
    assert (copy.bits, copy.group_size, copy.ignore) == (3, 32, ("lm_head",))
    assert copy.with_bits(2, None).group_size is None
    assert PromptRecoveryModifier(steps=7).with_arm("single") == PromptRecoveryModifier(steps=7, arm="single")


def test_a_copy_is_checked_too():
    with pytest.raises(RecipeError, match=r"sparsity: mask_structure 2:4 removes a share of 0.5, found 0.85"):
        WandaPruningModifier(sparsity=0.5, mask_structure="2:4").with_sparsity(0.85)
    with pytest.raises(
        RecipeError, match="num_bits: not one of 2, 3, 4, 8: no stock tool stores another width, found 17"
    ):
        load_recipe(None).modifier_for("gptq").with_bits(17, 64)


@pytest.mark.parametrize(
    ("modifier", "fields", "message"),
    [
        ("SparseGPTModifier", {}, "sparsity: required, but missing"),
        ("SparseGPTModifier", {"sparsity": 1.0}, "no weight would be left, found 1.0"),
        ("SparseGPTModifier", {"sparsity": -0.1}, "between 0 and 1, found -0.1"),
        ("SparseGPTModifier", {"sparsity": "0.5"}, "sparsity: not a number, found '0.5'"),
        ("SparseGPTModifier", {"sparsity": True}, "sparsity: not a number, found True"),
        (
            "SparseGPTModifier",
            {"sparsity": [0.5, 0.7]},
            "sparsity: a list has one share per target, and there are 1 targets",
        ),
        ("SparseGPTModifier", {"sparsity": []}, "sparsity: a list has one share per target, and there are 1 targets"),
        ("WandaPruningModifier", {"sparsity": [50]}, "sparsity[0]: not a share of weights between 0 and 1, found 50"),
        ("WandaPruningModifier", {"sparsity": ["a"]}, "sparsity[0]: not a number, found 'a'"),
        ("WandaPruningModifier", {"sparsity": [0.6], "mask_structure": "2:4"}, "2:4 removes a share of 0.5"),
        ("SparseGPTModifier", {"sparsity": 0.5, "sparsity_profile": "owls"}, "sparsity_profile: not 'owl', or another"),
        (
            "SparseGPTModifier",
            {"sparsity": 0.5, "sparsity_profile": "owl", "allocation": "ramp"},
            "write allocation alone",
        ),
        ("SparseGPTModifier", {"sparsity": 0.5, "owl_m": 3}, "have no effect without an allocation"),
        ("SparseGPTModifier", {"sparsity": 0.5, "allocation": "ramp", "owl_m": 3}, "owl_m has no effect"),
        (
            "SparseGPTModifier",
            {"sparsity": 0.5, "allocation": "olw"},
            "allocation: not 'uniform', 'owl', 'ramp', 'error' or 'best'",
        ),
        (
            "SparseGPTModifier",
            {"sparsity": [0.5], "allocation": "owl"},
            "allocation: owl and a list of sparsity both say what each layer loses",
        ),
        (
            "ALPSModifier",
            {"sparsity": 0.5, "mask_structure": "2:4", "allocation": "ramp"},
            "ramp and mask_structure both",
        ),
        (
            "MagnitudePruningModifier",
            {"final_sparsity": 0.5, "apply_globally": True, "allocation": "error"},
            "error and apply_globally both say",
        ),
        ("SparseGPTModifier", {"sparsity": 0.85, "mask_structure": "2:4"}, "2:4 removes a share of 0.5, found 0.85"),
        ("SparseGPTModifier", {"sparsity": 0.5, "mask_structure": "4:2"}, "mask_structure: not N:M"),
        ("SparseGPTModifier", {"sparsity": 0.5, "mask_structure": "4:4"}, "mask_structure: not N:M"),
        ("SparseGPTModifier", {"sparsity": 0.5, "mask_structure": "block_4"}, "not supported yet, found 'block_4'"),
        (
            "SparseGPTModifier",
            {"sparsity": 0.5, "targets": ["Linear", "lm_head"]},
            "targets[1]: embeddings and head are",
        ),
        ("SparseGPTModifier", {"sparsity": 0.5, "quantize": True}, "rounded by a GPTQModifier in a later stage"),
        ("SparseGPTModifier", {"sparsity": "eval(target)"}, "expressions are not computed here; write the value"),
        (
            "SparseGPTModifier",
            {"sparsity": 0.5, "mask_structure": "0:0", "prunen": 2, "prunem": 4},
            "keep mask_structure",
        ),
        ("SparseGPTModifier", {"sparsity": 0.5, "percdamp": 0}, "percdamp: not greater than 0, found 0"),
        ("SparseGPTModifier", {"sparsity": 0.5, "sequential_update": 3}, "not true or false, found 3"),
        ("SparseGPTModifier", {"sparsity": 0.5, "ignore": ["re:" + "(" * 510 + ")" * 510]}, "ignore[0]: not a regular"),
        ("SparseGPTModifier", {"sparsity": 0.5, "ignore": ["re:a{99999999999}"]}, "ignore[0]: not a regular"),
        ("SparseGPTModifier", [], "SparseGPTModifier: not a map of settings"),
        ("WandaPruningModifier", {"sparsity": 0.5, "dampening_frac": 0.1}, "dampening_frac: no such field"),
        ("ALPSModifier", {"sparsity": 0.5, "steps": 3}, "steps: no such field; did you mean 'refit_steps'?"),
        ("ALPSModifier", {"sparsity": 0.5, "iterations": 0}, "iterations: not greater than or equal to 1, found 0"),
        ("SparseGPTModifier", {"sparsity": 0.5, "refit_steps": -1}, "refit_steps: not greater than or equal to 0"),
        ("SparseGPTModifier", {"sparsity": 0.5, "refit_step": 1}, "no such field; did you mean 'refit_steps'?"),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "match_dense": 1.5},
            "match_dense: not less than or equal to 1, found 1.5",
        ),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "sparsity": 0.5},
            "sparsity: weights are removed in the order of the inputs",
        ),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "actorder": None, "mask_structure": "2:4", "sparsity": 0.4},
            "sparsity: mask_structure 2:4 removes a share of 0.5, found 0.4",
        ),
        ("GPTQModifier", {"scheme": "W4A16", "match_dense": True}, "match_dense: not a number, found True"),
        (
            "MagnitudePruningModifier",
            {"final_sparsity": 0.5, "sparsity": 0.5},
            "no such field; did you mean 'final_sparsity'?",
        ),
        (
            "MagnitudePruningModifier",
            {"final_sparsity": 0.5, "apply_globally": True, "mask_structure": "2:4"},
            "apply_globally: mask_structure 2:4 fixes the share of every layer",
        ),
        ("GPTQModifier", {}, "say how: scheme: W4A16, or config_groups"),
        (
            "GPTQModifier",
            {"scheme": "W4A61"},
            "W8A16 (others need config_groups), found 'W4A61'; did you mean 'W4A16'?",
        ),
        (
            "GPTQModifier",
            {"scheme": "W8A8"},
            "scheme: rounds activations too, and here only weights are rounded; W8A16 does",
        ),
        ("GPTQModifier", {"scheme": "FP8_DYNAMIC"}, "scheme: has a floating-point grid"),
        ("GPTQModifier", {"scheme": "w4a16_asym"}, "cannot load such a folder; W4A16 is symmetric"),
        ("GPTQModifier", {"scheme": "W5A16"}, "a width that no stock tool stores; W4A16 and W8A16 have one"),
        ("GPTQModifier", {"scheme": {"W4A16": ["Linear"]}}, "scheme: not one of W2A16"),
        ("GPTQModifier", {"scheme": "W4A16", "config_groups": {"g": {}}}, "both given"),
        ("GPTQModifier", {"scheme": "W4A16", "actorder": "group"}, "found 'group'; did you mean 'static'?"),
        ("GPTQModifier", {"config_groups": {}}, "exactly one group is supported, found 0"),
        (
            "GPTQModifier",
            {"scheme": "W4A16", "kv_cache_scheme": {}},
            "kv_cache_scheme: the cache of keys and values is not rounded here; leave it out",
        ),
        (
            "PromptRecoveryModifier",
            {"arm": "mpo"},
            "found 'mpo'; did you mean 'mop'?",
        ),
        ("PromptRecoveryModifier", {"arm": "none"}, "found 'none'"),
        ("PromptRecoveryModifier", {"learning_rate": 0}, "greater than 0, found 0"),
        ("PromptRecoveryModifier", {"warmup_fraction": 1.5}, "less than or equal to 1, found 1.5"),
        ("PromptRecoveryModifier", {"expert": 3}, "no such field; did you mean 'experts'?"),
        ("SmoothQuantModifier", {}, "SmoothQuantModifier: not done here: prepares the rounding of activations"),
    ],
)
def test_an_impossible_modifier_is_one_clear_line(write, modifier, fields, message):
    errors = faults(write(in_group(modifier, fields)))
    assert len(errors) == 1
    assert errors[0].startswith(f"r.yaml: a_stage.b_modifiers.{modifier}")
    assert message in errors[0]
