"""`--set`: keys and values of single fields, their checks, and what goes with a flag."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.overrides import bench_recipe, pruning_recipe, quantization_recipe, recovery_recipe
from mopcompress.recipe.settings import PARTS, Settings, parse_settings


def parsed(*words: str, parts: Sequence[str] = tuple(PARTS)) -> Settings:
    return parse_settings(words, parts)


def run_with(*words: str, **flags: object) -> Any:
    return load_recipe(None, flags, parsed(*words).get("run", {})).run


def pruned(*words: str, **flags: Any) -> Recipe:
    return pruning_recipe(load_recipe(None), settings=parsed(*words), **flags)


def quantized(*words: str, **flags: Any) -> Recipe:
    return quantization_recipe(load_recipe(None), settings=parsed(*words), **flags)


def recovered(*words: str, **flags: object) -> Recipe:
    return recovery_recipe(load_recipe(None), flags, parsed(*words)["recovery"])


def benched(*words: str, run: dict[str, object] | None = None, **flags: object) -> Recipe:
    return bench_recipe(load_recipe(None, run or {}), flags, parsed(*words))


def error_of(call: Callable[..., object], *words: str, **flags: object) -> str:
    with pytest.raises(UsageError) as caught:
        call(*words, **flags)
    return str(caught.value)


# --- keys and values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e-3", 0.001),
        ("2:4", "2:4"),
        ("true", True),
        ("null", None),
        ("", None),
        ("[0.5, 0.85]", [0.5, 0.85]),
        ("{question: instruction}", {"question": "instruction"}),
        ("a=b", "a=b"),
        ("'8'", "8"),
        ("no", "no"),
    ],
)
def test_a_value_is_yaml_of_a_recipe(text: str, value: object) -> None:
    assert parsed(f"run.data={text}") == {"run": {"data": value}}


def test_settings_are_grouped_by_part() -> None:
    words = ("run.seed=1", "recovery.top_k=2", "run.data=a", "repair.rank=4")
    assert parsed(*words) == {"run": {"seed": 1, "data": "a"}, "recovery": {"top_k": 2}, "repair": {"rank": 4}}
    assert parsed() == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run.seed",), "--set 'run.seed': no value; write --set run.seed=VALUE"),
        (("=3",), "--set : a key is run.FIELD or recovery.FIELD"),
        (("steps=3",), "--set steps: a key is run.FIELD or recovery.FIELD; did you mean 'recovery.steps'?"),
        (
            ("deep=true",),
            "--set deep: a key is run.FIELD or recovery.FIELD; did you mean 'recovery.per_layer_prompts'?",
        ),
        (
            ("recvery.steps=3",),
            "--set recvery.steps: a key is run.FIELD or recovery.FIELD; did you mean 'recovery.steps'?",
        ),
        (("zzz.steps=3",), "--set zzz.steps: a key is run.FIELD or recovery.FIELD"),
        (("run.=3",), "--set run.: a key is run.FIELD or recovery.FIELD"),
        (("repair.rank=3",), "--set repair.rank: has no effect here; a key is run.FIELD or recovery.FIELD"),
        (("run.seed=1", "run.seed=1"), "--set run.seed: given twice; give it once"),
        (("run.text=a", "run.eval_text=b"), "--set run.eval_text: given twice; give it once"),
        (
            ("run.ratios=[0.5",),
            "--set run.ratios: '[0.5' is not a YAML value (expected ',' or ']', but got '<stream end>')",
        ),
        (
            ("run.data=!!python/name:os",),
            "--set run.data: '!!python/name:os' is not a YAML value (YAML tags are not accepted",
        ),
        (("run.data=&a [*a]",), "--set run.data: '&a [*a]' is not a YAML value (the alias *a contains itself"),
        (
            ("run.columns={a: 1, a: 2}",),
            "--set run.columns: '{a: 1, a: 2}' is not a YAML value (the key 'a' stands twice)",
        ),
    ],
)
def test_a_wrong_key_or_value_is_a_usage_error(words: tuple[str, ...], message: str) -> None:
    assert error_of(lambda: parsed(*words, parts=("run", "recovery"))).startswith(message)


# --- run


def test_a_setting_of_the_run_wins_over_the_recipe() -> None:
    run = run_with("run.train_rows=null", "run.ratios=[0.9]", "run.group_size=-1", "run.columns={q: input}", seed="3")
    assert (run.train_rows, run.ratios, run.group_size, run.seed) == (None, (0.9,), None, 3)
    assert run.columns == {"q": "input"}
    recipe = recipe_from_dict({"run": {"write_tokens": 5, "text": "a"}}, "r", {"seed": 1}, {"max_new_tokens": 7})
    assert (recipe.run.max_new_tokens, recipe.run.eval_text, recipe.run.seed) == (7, "a", 1)
    recipe = recipe_from_dict({"run": {"write_tokens": 5, "text": "a"}}, "r", {"text": "b"}, {"write_tokens": 7})
    assert (recipe.run.max_new_tokens, recipe.run.eval_text) == (7, "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run.train_rowz=3",), "--set run.train_rowz: no such field; did you mean 'train_rows'?"),
        (("run.train_rows=0",), "--set run.train_rows: not greater than or equal to 1, found 0"),
        (("run.train_rows='3'",), "--set run.train_rows: not a whole number, found '3'"),
        (
            ("run.ratios=[0.5, 50]",),
            "--set run.ratios[1]: not a share of weights between 0 and 1, found 50; did you mean 0.5?",
        ),
        (("run.ratios=0.5",), "--set run.ratios: not a list, found 0.5"),
        (("run.map=3",), "--set run.map: not a map, found 3"),
        (("run.eval_text=a", "run.train_text=a"), "train_text: the same as eval_text"),
    ],
)
def test_a_wrong_setting_of_the_run_names_its_key(words: tuple[str, ...], message: str) -> None:
    assert error_of(run_with, *words).startswith(message)


def test_faults_of_flags_and_settings_come_at_once() -> None:
    assert error_of(run_with, "run.seed=-1", ratios="50").splitlines() == [
        "--ratios: 50 is not a share of weights between 0 and 1; did you mean 0.5?",
        "--set run.seed: not greater than or equal to 0, found -1",
    ]


@pytest.mark.parametrize("flag", ["max_new_tokens", "write_tokens"])
@pytest.mark.parametrize("field", ["max_new_tokens", "write_tokens"])
def test_a_flag_and_a_setting_of_one_field_are_an_error(flag: str, field: str) -> None:
    message = f"--{flag.replace('_', '-')}: given twice, by --set run.{field} too; give it once"
    assert error_of(run_with, f"run.{field}=3", **{flag: 4}) == message
    assert run_with(f"run.{field}=3", **{flag: None}).max_new_tokens == 3


# --- recovery


def test_settings_of_recovery_reach_its_modifier() -> None:
    recovery = recovered(
        "recovery.batch_size=4", "recovery.max_grad_norm=2.0", "recovery.experts=null", steps=7
    ).recovery
    assert (recovery.train_batch_size, recovery.max_grad_norm, recovery.experts, recovery.steps) == (4, 2.0, None, 7)


@pytest.mark.parametrize("call", [recovered, benched])
@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (("recovery.max_grad_nrm=3",), {}, "--set recovery.max_grad_nrm: no such field; did you mean 'max_grad_norm'?"),
        (("recovery.steps=0",), {}, "--set recovery.steps: not greater than or equal to 1, found 0"),
        (("recovery.steps=3",), {"steps": 0}, "--steps: given twice, by --set recovery.steps too; give it once"),
        (("recovery.layer=3",), {"steps": 0}, "--steps: 0 is not greater than or equal to 1"),
        (("recovery.layer=-3",), {"steps": 7}, "--set recovery.layer: not greater than or equal to 0, found -3"),
        (
            ("recovery.gate_mode=value",),
            {},
            "--set recovery.gate_mode: not 'renormalised', 'values' or 'separate', found",
        ),
    ],
)
def test_a_wrong_setting_of_recovery_names_its_key(
    call: Callable[..., object], words: tuple[str, ...], flags: dict[str, object], message: str
) -> None:
    assert error_of(call, *words, **flags).startswith(message)


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (
            ("recovery.top_k=1",),
            {"arm": "single"},
            "--set recovery.top_k: has no effect on single, only on mop, shuffled",
        ),
        (("recovery.deep=true",), {"arm": "lora"}, "--set recovery.deep: has no effect on lora"),
        (("recovery.arm=eora", "recovery.clip_norm=2.0"), {}, "--set recovery.clip_norm: has no effect on eora"),
        (("recovery.arm=eora",), {"steps": 7}, "--steps: has no effect on eora"),
        (("recovery.sweep_steps=7",), {}, "--set recovery.sweep_steps: has no effect without sweep; set one"),
    ],
)
def test_a_setting_without_effect_is_an_error(words: tuple[str, ...], flags: dict[str, object], message: str) -> None:
    assert error_of(recovered, *words, **flags).startswith(message)


def test_a_setting_equal_to_the_default_is_accepted() -> None:
    assert recovered("recovery.top_k=null", "recovery.deep=false", arm="single").recovery.arm == "single"


def test_one_rate_replaces_the_rates_of_arms() -> None:
    recipe = bench_recipe(load_recipe(None), {}, parsed("recovery.learning_rates={mop: 0.2}"))
    assert recipe.recovery.rate == 0.2
    assert bench_recipe(recipe, {}, parsed("recovery.learning_rate=0.3")).recovery.rate == 0.3


# --- pruning, rounding and repair


def test_settings_of_pruning_reach_its_modifier() -> None:
    [modifier] = pruned("pruning.block_size=32", "pruning.percdamp=0.1", method="sparsegpt").modifiers(
        *PARTS["pruning"]
    )
    assert (modifier.block_size, modifier.dampening_frac, modifier.sparsity) == (32, 0.1, 0.5)
    [modifier] = pruned("pruning.mask_structure=1:4", sparsity=None).modifiers(*PARTS["pruning"])
    assert (modifier.pattern, modifier.sparsity) == ((1, 4), 0.25)
    [modifier] = pruned("pruning.head_sparsity=0.5", method="structured").modifiers(*PARTS["pruning"])
    assert (modifier.mlp_sparsity, modifier.head_sparsity) == (0.25, 0.5)


def test_settings_of_rounding_reach_its_modifier() -> None:
    [modifier] = quantized("quantization.block_size=32", bits=3).modifiers(*PARTS["quantization"])
    assert (modifier.bits, modifier.group_size, modifier.block_size) == (3, 64, 32)
    [modifier] = quantized("quantization.scheme=W8A16").modifiers(*PARTS["quantization"])
    assert (modifier.bits, modifier.group_size, modifier.match_dense) == (8, None, 1.0)


def test_settings_of_repair_add_one() -> None:
    assert pruned("repair.rank=8").repair.rank == 8
    assert quantized("repair.rank=8").repair.rank == 8
    assert benched("repair.rank=8").repair.rank == 8
    assert pruned("repair.ignore=[up_proj]", repair_rank=4).repair.ignore == ("up_proj",)


@pytest.mark.parametrize(
    ("call", "words", "flags", "message"),
    [
        (pruned, ("pruning.sparsty=0.5",), {}, "--set pruning.sparsty: no such field; did you mean 'sparsity'?"),
        (
            pruned,
            ("pruning.sparsity=50",),
            {},
            "--set pruning.sparsity: not a share of weights between 0 and 1, found 50",
        ),
        (
            pruned,
            ("pruning.sparsity=0.6",),
            {"sparsity": 0.5},
            "--sparsity: given twice, by --set pruning.sparsity too",
        ),
        (pruned, ("pruning.mask_structure=2:4",), {"pattern": "2:4"}, "--pattern: given twice, by --set"),
        (
            pruned,
            ("pruning.mask_structure=2:4",),
            {"sparsity": 0.6},
            "--sparsity: mask_structure 2:4 removes a share of",
        ),
        (pruned, ("pruning.final_sparsity=0.6",), {"method": "magnitude", "sparsity": 0.5}, "--sparsity: given twice"),
        (pruned, ("pruning.head_sparsity=0.5",), {}, "--set pruning.head_sparsity: no such field"),
        (pruned, ("pruning.refit_steps=2",), {"sparsity": 50.0}, "--sparsity: 50.0 is not a share of weights"),
        (quantized, ("pruning.block_size=32",), {}, "--set pruning.block_size: nothing is pruned here; leave it out"),
        (
            quantized,
            ("quantization.block_sise=32",),
            {},
            "--set quantization.block_sise: no such field; did you mean 'block_s",
        ),
        (quantized, ("quantization.scheme=W9A16",), {}, "--set quantization.scheme: not one of W2A16"),
        (
            quantized,
            ("quantization.scheme=W8A16",),
            {"bits": 3},
            "--set quantization.scheme: says what --bits and --group-size",
        ),
        (quantized, ("quantization.block_size=32",), {"bits": 7}, "--bits: 7 is not one of 2, 3, 4, 8"),
        (pruned, ("repair.rank=0",), {}, "--set repair.rank: not greater than or equal to 1, found 0"),
        (pruned, ("repair.rank=2",), {"repair_rank": 2}, "--repair-rank: given twice, by --set repair.rank too"),
        (pruned, ("repair.targets=q_proj",), {}, "--set repair.rank: required, but missing"),
        (pruned, ("repair.rank=2",), {"method": "structured"}, "--set repair.rank: structured refits what it keeps"),
        (
            benched,
            ("pruning.sparsity=0.6",),
            {},
            "--set pruning.sparsity: a bench takes it from its grid; give --ratios",
        ),
        (benched, ("recovery.arm=mop",), {}, "--set recovery.arm: a bench takes it from its grid; give --arms"),
        (
            benched,
            ("quantization.scheme=W8A16",),
            {},
            "--set quantization.scheme: a bench takes it from its grid; give --b",
        ),
        (
            benched,
            ("quantization.block_size=8",),
            {},
            "--set quantization.block_size: nothing is rounded here; leave it out",
        ),
        (benched, ("pruning.head_sparsity=0.6",), {}, "--set pruning.head_sparsity: no such field"),
    ],
)
def test_a_wrong_setting_of_compression_names_its_key(
    call: Callable[..., object], words: tuple[str, ...], flags: dict[str, object], message: str
) -> None:
    assert error_of(call, *words, **flags).startswith(message)


def test_settings_of_a_bench_reach_the_methods_of_its_grid() -> None:
    grid: dict[str, object] = {"methods": "wanda,sparsegpt", "ratios": "0.5", "bits": "3"}
    recipe = benched("pruning.block_size=32", "pruning.refit_steps=2", "quantization.block_size=8", run=grid)
    wanda, sparsegpt, gptq = (recipe.modifier_for(method) for method in ("wanda", "sparsegpt", "gptq"))
    assert (wanda.refit_steps, sparsegpt.refit_steps, sparsegpt.block_size, gptq.block_size) == (2, 2, 32, 8)
    assert recipe.recovery == load_recipe(None).recovery
    assert recipe_from_dict(recipe_to_dict(recipe), "r") == recipe


def test_a_bench_that_could_not_be_read_again_is_an_error() -> None:
    with pytest.raises(RecipeError, match="compresses it no further"):
        benched("pruning.dampening_frac=0.1", run={"methods": "sparsegpt,structured"})


def test_a_bench_without_settings_keeps_its_recipe() -> None:
    recipe = load_recipe(None)
    assert bench_recipe(recipe, {"steps": None}, {"run": {"seed": 1}}) is recipe
