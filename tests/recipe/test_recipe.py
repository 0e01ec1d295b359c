"""Recipes: the borrowed grammar, every fault in the user's words, and nothing that could run or explode."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mopcompress.errors import InputNotFoundError, MopError, RecipeError, UsageError
from mopcompress.recipe import (
    GPTQModifier,
    MagnitudePruningModifier,
    PromptRecoveryModifier,
    RunSpec,
    SparseGPTModifier,
    WandaPruningModifier,
    dump_recipe,
    load_recipe,
    recipe_to_dict,
)
from mopcompress.recipe.arms import ARM_DEFAULTS, arms_using
from mopcompress.recipe.overrides import pruning_recipe, recovery_recipe
from mopcompress.recipe.recovery_modifier import ConstantPruningModifier

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TWO_FOUR_THEN_W4A16 = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", sequential_update: false}
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier: {targets: ['re:.*q_proj.weight', 're:.*down_proj.weight'], start: 0}
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}
          targets: [Linear]
"""
ALTERNATING = """
initial_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, block_size: 64, percdamp: 0.02, mask_structure: 0:0, targets: [Linear], ignore: ["re:.*lm_head"]}
initial_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: '__ALL__', start: 0}
next_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier: {sparsity: 0.7, prunen: 0, prunem: 0, target_ids: ["attention_mask", "position_ids"]}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into the working directory, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def to(text, name="r.yaml"):
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to


def in_group(modifier, fields):
    return f"a_stage:\n  b_modifiers:\n    {modifier}: {json.dumps(fields)}\n"


def faults(path, error=RecipeError, flags=None):
    with pytest.raises(error) as caught:
        load_recipe(path, flags or {})
    return str(caught.value).splitlines()


# What is shipped, and what others wrote


def test_there_are_recipes():
    assert {path.stem for path in SHIPPED} >= {"default", "dolly", "sni", "tiny", "sparse_24", "two_four_then_w4a16"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_what_it_is_for(path):
    assert load_recipe(path).stages
    header = path.read_text()
    assert all(word in header for word in ("# Purpose:", "# Command:", "# Time:", "# Expected:"))


def test_the_default_recipe_is_what_runs_without_one():
    assert load_recipe(next(path for path in SHIPPED if path.stem == "default")) == load_recipe(None)


def test_the_published_two_four_then_w4a16_recipe_means_what_it_says(write):
    recipe = load_recipe(write(TWO_FOUR_THEN_W4A16))
    assert [(stage.name, stage.run_type) for stage in recipe.stages] == [
        ("sparsity_stage", "oneshot"),
        ("finetuning_stage", "train"),
        ("quantization_stage", "oneshot"),
    ]
    pruning, rounding = recipe.modifier_for("sparsegpt"), recipe.modifier_for("gptq")
    assert (pruning.sparsity, pruning.pattern) == (0.5, (2, 4))
    assert (rounding.bits, rounding.group_size, rounding.symmetric) == (4, None, True)
    assert (rounding.targets, rounding.ignore) == (("Linear",), ("lm_head",))
    assert recipe.modifiers(ConstantPruningModifier)[0].targets == ("re:.*q_proj.weight", "re:.*down_proj.weight")


def test_older_names_mean_the_new_ones_and_stages_stay_apart(write):
    recipe = load_recipe(write(ALTERNATING))
    first, second = recipe.modifiers(SparseGPTModifier)
    assert (first.sparsity, first.dampening_frac, first.ignore) == (0.5, 0.02, ("re:.*lm_head",))
    assert (second.sparsity, second.pattern, second.dampening_frac) == (0.7, None, 0.01)
    assert recipe.modifiers(ConstantPruningModifier)[0].targets == ("__ALL__",)
    assert recipe.modifier_for("sparsegpt") is first
    assert ConstantPruningModifier().targets == ("__ALL__",)
    assert "target_ids" not in dump_recipe(recipe)


def test_prunen_and_prunem_are_a_mask_structure(write):
    recipe = load_recipe(write(in_group("SparseGPTModifier", {"sparsity": 0.5, "prunen": 2, "prunem": 4})))
    assert recipe.modifiers(SparseGPTModifier)[0].pattern == (2, 4)


def test_two_to_four_without_quotes_is_not_the_sexagesimal_124(write):
    path = write("a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: 2:4}}}")
    assert load_recipe(path).modifier_for("wanda").pattern == (2, 4)


def test_numbers_may_be_written_1e_3(write):
    recipe = load_recipe(write("a_stage: {b_modifiers: {PromptRecoveryModifier: {gate_learning_rate: 2e-3}}}"))
    assert recipe.recovery.gate_learning_rate == 0.002


def test_magnitude_goes_to_its_final_sparsity(write):
    fields = {
        "init_sparsity": 0.1, "final_sparsity": 0.8, "start": 0, "end": 1, "update": 0.5, "update_scheduler": "cubic",
        "scheduler_args": {},
        "targets": ["re:.*weight"], "mask_structure": "unstructured", "leave_enabled": True, "apply_globally": False,
    }  # fmt: skip
    modifier = load_recipe(write(in_group("MagnitudePruningModifier", fields))).modifiers(MagnitudePruningModifier)[0]
    assert (modifier.method, modifier.sparsity, modifier.pattern) == ("magnitude", 0.8, None)


@pytest.mark.parametrize(
    ("scheme", "bits", "group_size"), [("W2A16", 2, 128), ("W3A16", 3, 128), ("w4a16", 4, 128), ("W8A16", 8, None)]
)
def test_schemes_are_the_published_presets(write, scheme, bits, group_size):
    gptq = load_recipe(write(in_group("GPTQModifier", {"scheme": scheme, "targets": "Linear"}))).modifier_for("gptq")
    assert (gptq.bits, gptq.group_size, gptq.symmetric, gptq.targets) == (bits, group_size, True, ("Linear",))


@pytest.mark.parametrize(
    "weights", [{"strategy": "channel"}, {"group_size": -1}, {"strategy": "channel", "group_size": -1}]
)
def test_one_scale_a_row_has_no_group_size(write, weights):
    fields = {"config_groups": {"g": {"weights": {"num_bits": 4, **weights}}}}
    assert load_recipe(write(in_group("GPTQModifier", fields))).modifier_for("gptq").group_size is None


def test_activation_order_may_stand_in_either_place(write):
    weights = {"num_bits": 4, "group_size": 64, "actorder": "weight", "observer": "minmax", "dynamic": False}
    gptq = load_recipe(write(in_group("GPTQModifier", {"config_groups": {"g": {"weights": weights}}}))).modifier_for(
        "gptq"
    )
    assert (gptq.actorder, gptq.group_size) == ("static", 64)
    off = load_recipe(write(in_group("GPTQModifier", {"scheme": "W4A16", "actorder": None}))).modifier_for("gptq")
    assert off.actorder is None


def test_json_and_markdown_carry_the_same_recipe(write):
    tree = yaml.safe_load(TWO_FOUR_THEN_W4A16)
    expected = load_recipe(write(TWO_FOUR_THEN_W4A16))
    assert load_recipe(write(json.dumps(tree, indent="\t"), "r.json")) == expected
    assert load_recipe(write(f"---{TWO_FOUR_THEN_W4A16}---\n# Card\n---\n", "r.md")) == expected
    assert load_recipe(write(b"\xef\xbb\xbf" + TWO_FOUR_THEN_W4A16.encode(), "r.yml")) == expected
    assert load_recipe(write(b"\xef\xbb\xbf" + json.dumps(tree).encode(), "bom.json")) == expected


def test_a_list_has_one_share_a_target_and_survives(write):
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


# What the bench makes of it


def test_the_grid_is_the_recipes_own_unless_run_or_a_flag_says_otherwise(write):
    own = load_recipe(write(TWO_FOUR_THEN_W4A16)).run
    assert (own.methods, own.ratios, own.bits, own.group_size) == (("sparsegpt",), (0.5,), (4,), None)
    assert own.prune_then_quantize
    wanda = in_group("WandaPruningModifier", {"sparsity": 0.6})
    assert load_recipe(write(wanda)).run.methods == ("wanda",)
    assert not load_recipe(write(wanda)).run.prune_then_quantize
    assert not load_recipe(write(TWO_FOUR_THEN_W4A16 + "run: {joint: false}")).run.prune_then_quantize
    assert load_recipe(write(in_group("WandaPruningModifier", {"sparsity": 0}))).run.ratios == ()
    path = write(wanda + "run: {ratios: [0.1, 0.2], seeds: [1], data: mine.jsonl}")
    assert load_recipe(path).run.ratios == (0.1, 0.2)
    run = load_recipe(path, {"ratios": "0.3,0.9", "seeds": None, "device": "cpu", "output_dir": Path("out")}).run
    assert (run.ratios, run.seeds, run.data, run.device, run.output_dir) == (
        (0.3, 0.9),
        (1,),
        "mine.jsonl",
        "cpu",
        "out",
    )


def test_without_stages_the_defaults_of_the_methods_apply(write):
    recipe = load_recipe(write("run: {ratios: [0.5]}"))
    assert recipe.stages == ()
    assert {method: recipe.modifier_for(method).method for method in ("sparsegpt", "wanda", "magnitude", "gptq")} == {
        method: method for method in ("sparsegpt", "wanda", "magnitude", "gptq")
    }
    assert (recipe.modifier_for("gptq").bits, recipe.modifier_for("gptq").group_size) == (4, 64)
    assert recipe.recovery == PromptRecoveryModifier()


def test_a_copy_changes_the_share_and_nothing_else(write):
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


# Writing back


def test_a_dumped_recipe_is_plain_and_loads_as_the_same(write):
    at_once = {"scheme": "W3A16", "actorder": None, "sparsity": 0.5, "mask_structure": "2:4", "match_dense": 0.3}
    allocated = {"final_sparsity": 0.6, "allocation": "error", "allocation_spread": 0.2, "refit_steps": 4}
    ours = in_group("MagnitudePruningModifier", allocated) + in_group("GPTQModifier", at_once).replace(
        "a_stage", "z_stage"
    )
    for text in (
        TWO_FOUR_THEN_W4A16,
        ALTERNATING,
        ours,
        "run: {model: '1e3', data: 'no', map: {q: instruction}}",
        "run: {}",
    ):
        recipe = load_recipe(write(text))
        dumped = dump_recipe(recipe)
        assert "!!" not in dumped
        assert json.loads(json.dumps(recipe_to_dict(recipe))) == yaml.safe_load(dumped) == recipe_to_dict(recipe)
        assert load_recipe(write(dumped)) == recipe


share = st.floats(0, 1, exclude_max=True)
word = st.text(min_size=1, max_size=8).filter(lambda text: text.strip() and "\0" not in text and text.isascii())
structure = st.sampled_from(["2:4", "4:8", "1:2", "0:0"])
weights = st.fixed_dictionaries({"num_bits": st.sampled_from([2, 3, 4, 8]), "group_size": st.sampled_from([-1, 2, 64])})
modifier = st.one_of(  # plain data: hypothesis forbids strategies to run type-checked code, which draws at random
    st.tuples(
        st.just("SparseGPTModifier"),
        st.fixed_dictionaries({"sparsity": share, "ignore": st.lists(word.filter(lambda text: text[:3] != "re:"))}),
    ),
    st.tuples(
        st.just("ALPSModifier"),
        st.fixed_dictionaries(
            {"sparsity": st.one_of(share, st.lists(share, min_size=1, max_size=1))},
            optional={"iterations": st.integers(1, 99), "refit_steps": st.integers(0, 99), "match_dense": share},
        ),
    ),
    st.tuples(
        st.just("WandaPruningModifier"),
        st.fixed_dictionaries({"sparsity": st.just(0.5), "mask_structure": structure}),
    ),
    st.tuples(st.just("MagnitudePruningModifier"), st.fixed_dictionaries({"final_sparsity": share})),
    st.tuples(st.just("ConstantPruningModifier"), st.just({})),
    st.tuples(st.just("GPTQModifier"), weights.map(lambda drawn: {"config_groups": {"g": {"weights": drawn}}})),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(modifier, min_size=1, max_size=4), word, st.lists(share.filter(bool), unique=True, max_size=3))
def test_any_recipe_survives_dump_and_load(tmp_path_factory, modifiers, model, ratios):
    modifiers.sort(key=lambda drawn: drawn[0] == "GPTQModifier")  # pruning comes before rounding
    tree = {f"{place}_stage": {"x_modifiers": {name: fields}} for place, (name, fields) in enumerate(modifiers)}
    path = tmp_path_factory.mktemp("dump") / "r.json"
    path.write_text(json.dumps(tree | {"run": {"model": model, "ratios": ratios}}))
    recipe = load_recipe(path)
    names = [type(stage.groups[0].modifiers[0]).__name__ for stage in recipe.stages]
    assert names == [name for name, _ in modifiers]
    again = path.with_suffix(".yaml")
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe_to_dict(recipe)


# Faults


def test_all_faults_come_at_once_each_with_its_place(write):
    path = write(
        "sparsity_stage:\n  run_type: oneshott\n  sparsity_modifiers:\n"
        "    SparseGPTModifier: {sparsty: 0.5, sparsity: 50, block_size: 0.5, targets: ['re:(']}\n"
        "    SparseGTPModifier: {}\n"
        "run: {ratio: [0.5], seeds: [0, -1], methods: [sparsgpt]}\nmodel: x\n"
    )
    assert faults(path) == [
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.targets[0]: not a regular expression "
        "(missing ), unterminated subpattern at position 0), found 're:('",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.sparsity: "
        "not a share of weights between 0 and 1, found 50; did you mean 0.5?",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.block_size: not a whole number, found 0.5",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.sparsty: no such field; did you mean 'sparsity'?",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGTPModifier: no such modifier here (SparseGPTModifier, "
        "ALPSModifier, WandaPruningModifier, MagnitudePruningModifier, StructuredPruningModifier, "
        "ConstantPruningModifier, GPTQModifier, LowRankRepairModifier, "
        "PromptRecoveryModifier); did you mean 'SparseGPTModifier'?",
        "r.yaml: sparsity_stage.run_type: not oneshot or train, found 'oneshott'; did you mean 'oneshot'?",
        "r.yaml: run.methods[0]: not one of sparsegpt, alps, wanda, magnitude, structured, found 'sparsgpt'; "
        "did you mean 'sparsegpt'?",
        "r.yaml: run.seeds[1]: not greater than or equal to 0, found -1",
        "r.yaml: run.ratio: no such field; did you mean 'ratios'?",
        "r.yaml: model: neither run: nor a <name>_stage:; did you mean 'model_stage'?",
    ]


@pytest.mark.parametrize(
    ("modifier", "fields", "said"),
    [
        ("SparseGPTModifier", {}, "sparsity: required, but missing"),
        ("SparseGPTModifier", {"sparsity": 1.0}, "no weight would be left, found 1.0"),
        ("SparseGPTModifier", {"sparsity": -0.1}, "between 0 and 1, found -0.1"),
        ("SparseGPTModifier", {"sparsity": "0.5"}, "sparsity: not a number, found '0.5'"),
        ("SparseGPTModifier", {"sparsity": True}, "sparsity: not a number, found True"),
        (
            "SparseGPTModifier",
            {"sparsity": [0.5, 0.7]},
            "sparsity: a list has one share a target, and there are 1 targets",
        ),
        ("SparseGPTModifier", {"sparsity": []}, "sparsity: a list has one share a target, and there are 1 targets"),
        ("WandaPruningModifier", {"sparsity": [50]}, "sparsity[0]: not a share of weights between 0 and 1, found 50"),
        ("WandaPruningModifier", {"sparsity": ["a"]}, "sparsity[0]: not a number, found 'a'"),
        ("WandaPruningModifier", {"sparsity": [0.6], "mask_structure": "2:4"}, "2:4 removes a share of 0.5"),
        ("SparseGPTModifier", {"sparsity": 0.5, "sparsity_profile": "owls"}, "sparsity_profile: not 'owl', or another"),
        (
            "SparseGPTModifier",
            {"sparsity": 0.5, "sparsity_profile": "owl", "allocation": "ramp"},
            "write allocation alone",
        ),
        ("SparseGPTModifier", {"sparsity": 0.5, "owl_m": 3}, "say nothing without an allocation"),
        ("SparseGPTModifier", {"sparsity": 0.5, "allocation": "ramp", "owl_m": 3}, "owl_m says nothing"),
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
def test_an_impossible_modifier_is_one_clear_line(write, modifier, fields, said):
    found = faults(write(in_group(modifier, fields)))
    assert len(found) == 1
    assert found[0].startswith(f"r.yaml: a_stage.b_modifiers.{modifier}")
    assert said in found[0]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            {"num_bits": 1, "group_size": 64},
            "weights.num_bits: not one of 2, 3, 4, 8: no stock tool stores another width, found 1; did you mean 2?",
        ),
        ({"num_bits": 5, "group_size": 64}, "found 5; did you mean 4?"),
        ({"num_bits": 6, "group_size": 64}, "found 6; did you mean 8?"),
        ({"num_bits": 17, "group_size": 64}, "found 17; did you mean 8?"),
        ({"num_bits": 4}, "weights.strategy: not made here; write channel (one scale a row), or group"),
        (
            {"num_bits": 4, "strategy": "tensor"},
            "weights.strategy: not made here; write channel (one scale a row), or group with a group_size",
        ),
        ({"num_bits": 4, "strategy": "group"}, "weights.group_size: strategy: group needs a group_size"),
        ({"num_bits": 4, "strategy": "channel", "group_size": 64}, "channel has one scale a row"),
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
def test_an_impossible_rounding_is_one_clear_line(write, weights, said):
    found = faults(write(in_group("GPTQModifier", {"config_groups": {"g": {"weights": weights}}})))
    assert len(found) == 1
    assert f"r.yaml: a_stage.b_modifiers.GPTQModifier.config_groups.g.{said}" in found[0] or said in found[0]


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "the top of a recipe is a map of stages, found a list"),
        ("a_stage: [1]\n", "a_stage: not a map with groups of modifiers, found [1]"),
        ("a_stage:\n", "a_stage: not a map with groups of modifiers, found None"),
        ("a_stage: {run_type: oneshot}\n", "a_stage: no modifiers"),
        ("a_stage: {b_modifiers: {}}\n", "a_stage.b_modifiers: not a map of modifiers"),
        ("a_stage: {b_modifiers: {SparseGPTModifier: }}\n", "SparseGPTModifier.sparsity: required, but missing"),
        ("a_stage: {SparseGPTModifier: {sparsity: 0.5}}\n", "modifiers stand in a group"),
        ("SparseGPTModifier: {sparsity: 0.5}\n", "SparseGPTModifier: stands outside a stage"),
        ("quant_modifiers: {GPTQModifier: {scheme: W4A16}}\n", "quant_modifiers: stands outside a stage"),
        ("pruning_modifiers: [{}]\n", "the form of SparseML before 1.6"),
        ("run: 3\n", "run: not a map of settings, found 3"),
        ("rum: {}\n", "rum: neither run: nor a <name>_stage:; did you mean 'run'?"),
        ("run: {}\nrun: {}\n", "line 2, column 1: the key 'run' stands twice"),
        ("run: {ratios: .nan}\n", "run.ratios: not a list, found nan"),
        ("run: {ratios: [.nan]}\n", "run.ratios[0]: not a finite number, found nan"),
        ("run: {seed: " + "9" * 5000 + "}\n", "cannot be read as a recipe"),
        ("run: {1: 2}\n", "the key 1 is not text"),
        ("run: {? {a: b} : 2}\n", "is not text"),
        ("run: {map: {a: 1}}\n", "run.map.a: not text, found 1"),
        ("run: {model: ''}\n", "run.model: not a name: empty, found ''"),
        ("run: {train_rows: 0}\n", "run.train_rows: not greater than or equal to 1, found 0"),
        ("run: {device: cudaa}\n", "cuda, cuda:N, mps, found 'cudaa'; did you mean 'cuda'?"),
        ("run: {max_fallback: 2}\n", "run.max_fallback: not less than or equal to 1, found 2"),
        ("run: {arms: []}\n", "run.arms: not long enough: at least one entry is needed, found []"),
        ("run: [\n", "line 2, column 1: "),
        ("run:\n\t- a\n", "line 2, column 1: "),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed"),
        ("run: {}\n---\nrun: {}\n", "line 2, column 1: "),
        ("run: {model: \x01}\n", "cannot be read as a recipe"),
        ('run: {model: "\\ud800"}\n', "run.model: "),
        ("a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}}, run_type: train}", "with run_type: oneshot"),
        ("a_stage: {m_modifiers: {PromptRecoveryModifier: {}}, run_type: oneshot}", "with run_type: train"),
        ("<<: {run: {}}\n", "<<: neither run: nor"),
        ("a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}}, run_type: [train]}", "found ['train']"),
        (
            "a_stage: {m_modifiers: {GPTQModifier: {scheme: W4A16}}}\nb_stage: {m_modifiers: {WandaPruningModifier: "
            "{sparsity: 0.5}}}",
            "b_stage.m_modifiers.WandaPruningModifier: would change weights that the GPTQModifier of a_stage",
        ),
        (
            "a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}, MagnitudePruningModifier: "
            "{final_sparsity: 0.6, apply_globally: true}}}",
            "MagnitudePruningModifier.apply_globally: its threshold is that of the given weights, and a_stage changes",
        ),
        (
            "a_stage: {m_modifiers: {PromptRecoveryModifier: {arm: mop}}}\nb_stage: {m_modifiers: "
            "{PromptRecoveryModifier: {arm: lora}}}",
            "b_stage.m_modifiers.PromptRecoveryModifier: a_stage has one already, and a recipe has one recovery",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(write, text, said):
    found = faults(write(text))
    assert len(found) == 1
    assert found[0].startswith("r.yaml: ")
    assert said in found[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: !!python/object/apply:os.system [echo]\n",
            "line 1, column 4: YAML tags are not accepted, found '!!python/",
        ),
        ("!!python/name:os.system x\n", "a recipe is data and never names code"),
        ("a: !!int 3\n", "YAML tags are not accepted"),
        ("m:\n- !OBSPruningModifier\n  final_sparsity: 0.8\n", "the form of SparseML before 1.6"),
        ("a: &a [x]\n" + "".join(f"b{i}: [*a, *a, *a]\n" for i in range(4)), "more than 10 aliases"),
        ("run: &r {model: *r}\n", "the alias *r contains itself"),
        ("a: " + "[" * 100_000, "nested deeper than 20 levels"),
        ("- " * 3000 + "a", "nested deeper than 20 levels"),
        ("a: " + "x" * 1_000_001, "larger than 1000000 bytes"),
        (b"run: {model: \xff}\n", "not UTF-8 at byte 13"),
        ("run: {model: x}\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_tricks_are_refused_before_anything_is_built(write, text, said):
    found = faults(write(text))
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"run": {}, "run": {}}', "the key 'run' stands twice"),
        ('{"run": {"ratios": [NaN]}}', "not a finite number, found nan"),
        ("[" * 50_000, "cannot be read as a recipe"),
        ("[" * 30 + "]" * 30, "nested deeper than 20 levels"),
        ("{", "cannot be read as a recipe"),
        ("", "cannot be read as a recipe"),
    ],
)
def test_json_gets_the_same_checks(write, text, said):
    found = faults(write(text, "r.json"))
    assert len(found) == 1
    assert said in found[0]


def test_a_few_aliases_are_fine(write):
    path = write("run: {ratios: [0.5], data: &d here, calibration: *d}")
    assert load_recipe(path).run.calibration == "here"


def test_a_hostile_number_of_entries_takes_no_hostile_time_or_space(write):
    many = ",".join(["0.5"] * 2_000)
    assert "0.5 stands twice" in faults(write(f"run: {{ratios: [{many}]}}"))[0]
    wrong = faults(write(f"run: {{ratios: [{','.join(['7'] * 2_000)}]}}"))
    assert (len(wrong), wrong[-1]) == (41, "... and 1960 faults more")


def test_files_that_cannot_be_read_are_told_apart(write, tmp_path):
    assert "nothing.yaml: cannot read the recipe" in faults(Path("nothing.yaml"), InputNotFoundError)[0]
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: cannot read the recipe" in faults(Path("folder.yaml"), InputNotFoundError)[0]
    assert "a recipe ends in .yaml, .yml, .json, .md, found '.txt'" in faults(write("run: {}", "r.txt"))[0]
    assert "no YAML front matter" in faults(write("# Title\n", "r.md"))[0]


def test_a_message_stays_on_its_line_whatever_the_recipe_is_called(write):
    assert faults(write("rum: {}", "two\nlines.yaml"))[0].startswith("'two\\nlines.yaml': rum: ")
    assert len(faults(write('"a\\nb": {}'))) == 1


# Flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"ratios": "50"}, "--ratios: 50 is not a share of weights between 0 and 1; did you mean 0.5?"),
        (
            {"ratios": "0,0.5"},
            "--ratios: 0 is not a share to remove: 0 is the dense model, which every bench measures",
        ),
        ({"ratios": (0.5, 1.0)}, "--ratios: 1.0 is not a share of weights between 0 and 1: no weight would be left"),
        ({"ratios": "-0.1"}, "--ratios: -0.1 is not a share of weights between 0 and 1"),
        ({"ratios": "nan"}, "--ratios: nan is not a finite number"),
        ({"ratios": "0.5,,0.9"}, "--ratios: an entry is empty: write values with one comma between, found '0.5,,0.9'"),
        ({"ratios": "0.5,0.50"}, "--ratios: (0.5, 0.5) is not distinct: 0.5 stands twice"),
        ({"ratios": "half"}, "--ratios: 'half' is not a number"),
        ({"seeds": "0,-1"}, "--seeds: -1 is not greater than or equal to 0"),
        ({"seeds": "1.5"}, "--seeds: 1.5 is not a whole number"),
        ({"bits": "4,17"}, "--bits: 17 is not one of 2, 3, 4, 8: no stock tool stores another width; did you mean 8?"),
        (
            {"methods": "wnada"},
            "--methods: 'wnada' is not one of sparsegpt, alps, wanda, magnitude, structured; did you mean 'wanda'?",
        ),
        (
            {"methods": "gptq"},
            "--methods: 'gptq' is not one of sparsegpt, alps, wanda, magnitude, structured; did you mean --bits?",
        ),
        ({"arms": ["mop", "mop"]}, "stands twice"),
        ({"map": "question"}, "--map: 'question' is not column=field"),
        ({"max_seq_length": 4}, "--max-seq-length: 4 is not greater than or equal to 8"),
        ({"device": "gpu"}, "--device: 'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ({"ratio": "0.5"}, "--ratio: no such field; did you mean 'ratios'?"),
    ],
)
def test_an_impossible_flag_is_a_usage_error(flags, said):
    found = faults(None, UsageError, flags)
    assert len(found) == 1
    assert said in found[0]


def test_several_impossible_flags_are_told_at_once():
    assert len(faults(None, UsageError, {"ratios": "2,3", "seed": -1, "bits": "4,,3"})) == 4


def test_flags_are_read_as_typed():
    run = load_recipe(
        None, {"ratios": "", "bits": "4, 3", "methods": "wanda,sparsegpt", "map": "q=instruction,a=output", "seed": "7"}
    ).run
    assert (run.ratios, run.bits, run.methods, run.seed) == ((), (4, 3), ("wanda", "sparsegpt"), 7)
    assert run.columns == {"q": "instruction", "a": "output"}
    assert load_recipe(None, {"group_size": "-1"}).run.group_size is None
    assert load_recipe(None, {"seeds": (3, 4), "model": "123"}).run.model == "123"


def test_a_fault_in_the_recipe_is_told_before_one_in_the_flags(write):
    assert faults(write("rum: {}"), RecipeError, {"ratios": "50"})


def test_exit_codes_are_those_of_sysexits(write):
    for path, flags, code in ((write("rum: {}"), {}, 78), (Path("no.yaml"), {}, 66), (None, {"seed": -1}, 2)):
        with pytest.raises(MopError) as caught:
            load_recipe(path, flags)
        assert caught.value.exit_code == code


def test_a_recipe_is_checked_before_torch_loads():
    code = (
        "import sys\nfrom mopcompress.recipe import load_recipe\nload_recipe(None)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().seed = 1


def test_a_rank_is_told_by_the_flag_of_its_command() -> None:
    recipe = load_recipe(None)
    with pytest.raises(UsageError, match=r"^--rank: 0"):
        recovery_recipe(recipe, {"rank": 0})
    with pytest.raises(UsageError, match=r"^--repair-rank: 0"):
        pruning_recipe(recipe, repair_rank=0)


@pytest.mark.parametrize(
    ("arm", "flags", "said"),
    [
        ("single", {"top_k": 1}, "--top-k: has no effect on single, only on mop, shuffled; leave it out"),
        ("idp", {"deep": True}, "--deep: has no effect on idp, only on single, mop, uniform, oracle, shuffled; leave"),
        ("lora", {"deep": True}, "--deep: has no effect on lora"),
        ("input", {"rank": 2}, "--rank: has no effect on input, only on lora, masklora, eora; leave it out"),
        ("eora", {"batch_size": 4}, "--batch-size: has no effect on eora"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(arm, flags, said) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        recovery_recipe(load_recipe(None), {"arm": arm, **flags})


def test_a_flag_that_says_what_is_so_anyway_is_no_mistake() -> None:
    recipe = recovery_recipe(
        load_recipe(None), {"arm": "single", "deep": False, "gate_logit_scale": 0.3, "top_k": None}
    )
    assert recipe.recovery.arm == "single"


OTHERS = {  # another value than the default of each
    "experts": 3,
    "prompts_per_expert": 3,
    "layer": 2,
    "per_layer_prompts": True,
    "rank": 2,
    "adapter_targets": ("q_proj",),
    "gate_learning_rate": 0.5,
    "gate_clipping": "together",
    "gate_pretraining_steps": 3,
    "gate_logit_scale": 1.0,
    "gate_labels": "clusters",
    "gate_mode": "values",
    "shared_expert": True,
    "top_k": 1,
    "prompt_log_weight": -1.0,
}


@pytest.mark.parametrize("arm", ARM_DEFAULTS)
def test_an_arm_takes_the_flags_that_say_something_to_it(arm) -> None:
    own = {name: OTHERS[name] for name in ARM_DEFAULTS[arm].own}
    found = recovery_recipe(load_recipe(None), {"arm": arm, **own}).recovery
    assert {name: getattr(found, name) for name in own} == own


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"teacher": "dense"}, "--teacher: has no effect without distill or squarehead; set one, or leave it out"),
        ({"distill_temperature": 2.0}, "--distill-temperature: has no effect without distill"),
        ({"sweep_steps": 7}, "--sweep-steps: has no effect without sweep"),
    ],
)
def test_a_flag_that_leans_on_another_is_refused_without_it(flags, said) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        recovery_recipe(load_recipe(None), flags)
    assert recovery_recipe(load_recipe(None), {**flags, "distill": 0.5, "sweep": True})
    if "teacher" in flags:
        assert recovery_recipe(load_recipe(None), {**flags, "arm": "eora"})


def test_every_setting_of_a_recovery_says_something_to_some_arm() -> None:
    fields = PromptRecoveryModifier.model_fields
    assert [name for name in fields if not arms_using(name)] == []
    assert {name for settings in ARM_DEFAULTS.values() for name in settings.own} <= fields.keys()
