"""Plans of `--dry-run`: flags and settings over a recipe, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from cli_runner import Outcome, invoke, set_fields

from mopcompress.recipe import PromptRecoveryModifier, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def modifiers(outcome: Outcome) -> list[tuple[str, dict[str, Any]]]:
    """Return the modifiers that a plan runs, in order."""
    assert outcome.code == 0, outcome.err
    stages = [stage for name, stage in outcome.json["recipe"].items() if name != "run"]
    groups = [group for stage in stages for name, group in stage.items() if name != "run_type"]
    return [pair for group in groups for pair in group.items()]


def plan(*words: object) -> list[tuple[str, dict[str, Any]]]:
    return modifiers(invoke(*words, "--dry-run", "--json"))


@pytest.mark.parametrize(
    ("flags", "kind", "fields"),
    [
        ([], "ALPSModifier", {"sparsity": 0.5, "mask_structure": "0:0"}),
        (["--sparsity", 0.85], "ALPSModifier", {"sparsity": 0.85}),
        (["--pattern", "2:4"], "ALPSModifier", {"sparsity": 0.5, "mask_structure": "2:4"}),
        (["--pattern", "1:4"], "ALPSModifier", {"sparsity": 0.25, "mask_structure": "1:4"}),
        (["--method", "sparsegpt", "--sparsity", 0.6], "SparseGPTModifier", {"sparsity": 0.6}),
        (["--method", "wanda", "--sparsity", 0.6], "WandaPruningModifier", {"sparsity": 0.6}),
        (["--method", "magnitude", "--sparsity", 0.6], "MagnitudePruningModifier", {"final_sparsity": 0.6}),
    ],
)
def test_flags_of_prune_reach_the_modifier(flags: list[object], kind: str, fields: dict[str, object]) -> None:
    [(name, modifier)] = plan("prune", *flags)
    assert name == kind
    assert {field: modifier[field] for field in fields} == fields


def test_flags_of_quantize_reach_the_modifier() -> None:
    def weights(*flags: object) -> dict[str, Any]:
        [(name, modifier)] = plan("quantize", *flags)
        assert name == "GPTQModifier"
        return {field: modifier["config_groups"]["group_0"]["weights"][field] for field in ("num_bits", "group_size")}

    assert weights() == {"num_bits": 4, "group_size": 64}
    assert weights("--bits", 3) == {"num_bits": 3, "group_size": 64}
    assert weights("--group-size", 32) == {"num_bits": 4, "group_size": 32}
    assert weights("--bits", 8, "--group-size", -1) == {"num_bits": 8, "group_size": None}


def test_flags_of_recovery_reach_the_modifier() -> None:
    fields = {"train_batch_size": 3, "layer": 2, "gate_learning_rate": 0.5, "log_opening": -1}
    for words in [("recover", "--arm", "shuffled"), ("bench",)]:
        modifier = dict(plan(*words, "--steps", 7, *set_fields("recovery", **fields)))["PromptRecoveryModifier"]
        stored = ("steps", "batch_size", "layer", "gate_learning_rate", "log_opening", "arm")
        arm = "shuffled" if words[0] == "recover" else "mop"
        assert [modifier[field] for field in stored] == [7, 3, 2, 0.5, -1, arm]


def test_flags_of_the_run_win_over_the_recipe(stories: Path) -> None:
    outcome = invoke("bench", stories, "--recipe", RECIPES / "tiny.yaml", "--ratios", "0.5,0.6", "--dry-run", "--json")
    run = outcome.json["recipe"]["run"]
    assert run["ratios"] == [0.5, 0.6]
    assert run["train_rows"] == load_recipe(RECIPES / "tiny.yaml").run.train_rows


def test_each_command_runs_its_part_of_a_recipe() -> None:
    both = ("--recipe", RECIPES / "two_four_then_w4a16.yaml")
    assert [name for name, _ in plan("prune", *both)] == ["SparseGPTModifier"]
    assert [name for name, _ in plan("quantize", *both)] == ["SparseGPTModifier", "GPTQModifier"]
    assert [name for name, _ in plan("prune", *both, "--method", "wanda")] == ["WandaPruningModifier"]
    assert [name for name, _ in plan("prune", "--recipe", RECIPES / "default.yaml")] == ["SparseGPTModifier"]
    assert [name for name, _ in plan("recover", "--recipe", RECIPES / "default.yaml")] == ["PromptRecoveryModifier"]


def test_a_model_is_an_argument_alone(stories: Path) -> None:
    assert invoke("prune", stories, "--dry-run", "--json").json["model"]["folder"] == str(stories)
    for words in (("--model", stories), (f"--model={stories}",)):
        outcome = invoke("prune", *words, "--dry-run")
        argument = f"error: --model: no such flag; give the model as an argument: {stories}"
        assert (outcome.code, outcome.errors) == (2, [argument])


def test_the_plan_of_a_bench_counts_its_cells(stories: Path, tmp_path: Path) -> None:
    flags = {"ratios": (0.5, 0.9), "methods": ("wanda", "magnitude"), "bits": (3,), "seeds": (0, 1)}
    words = [word for name, values in flags.items() for word in (f"--{name}", ",".join(map(str, values)))]
    facts = invoke("bench", stories, *words, "--set", "run.group_size=4", "--dry-run", "--json").json
    pruned = [f"{method} {percent}%" for method in ("wanda", "magnitude") for percent in (50, 90)]
    assert facts["settings"] == ["dense", *pruned, "gptq 3-bit"]
    assert facts["cells"] == 1 + 5 * (1 + 2 * 2)  # dense; five settings without prompts and in two arms for each seed
    assert facts["steps"] == 5 * 2 * 2 * PromptRecoveryModifier().steps
    assert facts["disk_bytes"] == 5 * (stories / "model.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_pruning_and_rounding_of_a_recipe_are_one_setting(stories: Path) -> None:
    def settings(*more: object) -> list[str]:
        words = ("bench", stories, "--recipe", RECIPES / "two_four_then_w4a16.yaml", *more, "--dry-run", "--json")
        return invoke(*words, *set_fields("run", group_size=4)).json["settings"]

    assert settings() == ["dense", "sparsegpt 50% + gptq 4-bit"]
    assert settings("--bits", "3,4")[1:] == ["sparsegpt 50% + gptq 3-bit", "sparsegpt 50% + gptq 4-bit"]
    assert settings(*set_fields("run", prune_then_quantize="false"))[1:] == ["sparsegpt 50%", "gptq 4-bit"]
    assert settings("--ratios", "")[1:] == ["gptq 4-bit"]
    grid = ("--methods", "wanda", "--ratios", "0.5,0.6", "--bits", 4)
    joint = set_fields("run", prune_then_quantize="true", group_size=4)
    facts = invoke("bench", stories, *grid, *joint, "--dry-run", "--json").json
    assert facts["settings"][1:] == ["wanda 50% + gptq 4-bit", "wanda 60% + gptq 4-bit"]


def test_an_empty_grid_is_an_error(stories: Path) -> None:
    outcome = invoke("bench", stories, "--ratios", "", "--dry-run")
    assert (outcome.code, outcome.errors) == (
        2,
        ["error: the grid is empty: nothing would be compressed; give --ratios or --bits"],
    )


def test_a_plan_is_readable_without_json(stories: Path) -> None:
    outcome = invoke("bench", stories, "--dry-run")
    assert "settings: dense, sparsegpt 50%, sparsegpt 85%, sparsegpt 95%" in outcome.out
    assert "output: runs/bench" in outcome.out
