"""Recipes: what is shipped and published, what a bench takes from one, and writing one back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_builders import ALTERNATING, TWO_FOUR_THEN_W4A16, in_group

from mopcompress.errors import MopError
from mopcompress.recipe import (
    PromptRecoveryModifier,
    RunSpec,
    SparseGPTModifier,
    dump_recipe,
    load_recipe,
    recipe_to_dict,
)
from mopcompress.recipe.recovery_modifier import ConstantPruningModifier

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert {path.stem for path in SHIPPED} >= {"default", "dolly", "sni", "tiny", "sparse_24", "two_four_then_w4a16"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_states_its_purpose(path):
    assert load_recipe(path).stages
    header = path.read_text()
    assert all(word in header for word in ("# Purpose:", "# Command:", "# Time:", "# Expected:"))


def test_no_recipe_is_the_default_recipe():
    assert load_recipe(next(path for path in SHIPPED if path.stem == "default")) == load_recipe(None)


def test_a_published_2_4_w4a16_recipe_keeps_its_meaning(write):
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


def test_older_names_are_read_and_stages_are_separate(write):
    recipe = load_recipe(write(ALTERNATING))
    first, second = recipe.modifiers(SparseGPTModifier)
    assert (first.sparsity, first.dampening_frac, first.ignore) == (0.5, 0.02, ("re:.*lm_head",))
    assert (second.sparsity, second.pattern, second.dampening_frac) == (0.7, None, 0.01)
    assert recipe.modifiers(ConstantPruningModifier)[0].targets == ("__ALL__",)
    assert recipe.modifier_for("sparsegpt") is first
    assert ConstantPruningModifier().targets == ("__ALL__",)
    assert "target_ids" not in dump_recipe(recipe)


def test_json_and_markdown_hold_the_same_recipe(write):
    tree = yaml.safe_load(TWO_FOUR_THEN_W4A16)
    expected = load_recipe(write(TWO_FOUR_THEN_W4A16))
    assert load_recipe(write(json.dumps(tree, indent="\t"), "r.json")) == expected
    assert load_recipe(write(f"---{TWO_FOUR_THEN_W4A16}---\n# Card\n---\n", "r.md")) == expected
    assert load_recipe(write(b"\xef\xbb\xbf" + TWO_FOUR_THEN_W4A16.encode(), "r.yml")) == expected
    assert load_recipe(write(b"\xef\xbb\xbf" + json.dumps(tree).encode(), "bom.json")) == expected


def test_the_grid_comes_from_modifiers_then_run_then_flags(write):
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


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().seed = 1
