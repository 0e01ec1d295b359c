"""The manifest of a bench: which settings bind a folder."""

import json
from pathlib import Path

import pytest

from mopcompress.entrypoints.bench.manifest import GRID_FIELDS, check_settings
from mopcompress.errors import RecipeError
from mopcompress.recipe import Recipe, load_recipe, recipe_to_dict
from mopcompress.recipe.overrides import override_recovery

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def folder_of(tmp_path: Path, recipe: Recipe) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe_to_dict(recipe)}))
    return tmp_path


def test_the_fields_of_the_grid_are_these() -> None:
    """By the names that stored recipes have."""
    assert {*GRID_FIELDS} == {
        *("ratios", "methods", "bits", "joint", "arms", "dense_arms", "seeds", "output_dir", "max_fallback"),
    }


def test_a_folder_takes_a_larger_grid(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, load_recipe(None))
    grid = {"ratios": "0.1,0.2", "methods": "wanda", "bits": "4", "arms": "none,lora", "seeds": "0,1"}
    check_settings(load_recipe(None, {**grid, "output_dir": "elsewhere", "max_fallback_fraction": "0.5"}), folder)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"seed": "1"}, "run.seed was 0, is 1"),
        ({"group_size": "32"}, "run.group_size was 64, is 32"),
        ({"eval_batch_size": "2"}, "run.eval_batch_size was 16, is 2"),
        ({"max_new_tokens": "5"}, "run.max_new_tokens was None, is 5"),
        ({"backend_python": "python9"}, "run.backend_python was None, is 'python9'"),
    ],
)
def test_a_field_of_results_binds_the_folder(tmp_path: Path, flags: dict[str, str], named: str) -> None:
    folder = folder_of(tmp_path, load_recipe(None))
    with pytest.raises(RecipeError, match=named):
        check_settings(load_recipe(None, flags), folder)


def test_a_recovery_field_binds_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, load_recipe(None))
    with pytest.raises(RecipeError, match=r"PromptRecoveryModifier\.steps was"):
        check_settings(override_recovery(load_recipe(None), {"steps": 7}), folder)


def test_an_empty_folder_takes_any_recipe(tmp_path: Path) -> None:
    check_settings(load_recipe(None), tmp_path)


def test_the_recipes_of_committed_results_are_read() -> None:
    """All but three early ones, whose recipes have a field that is gone."""
    unreadable = []
    for path in sorted(RESULTS.rglob("run.json")):
        try:
            check_settings(load_recipe(None), path.parent)
        except RecipeError as error:
            if "was made with other settings" not in str(error):
                unreadable.append(str(error))
    assert len(unreadable) == 3
    assert all("prompt_learning_rate: no such field" in message for message in unreadable)


def test_fields_that_are_missing_have_their_earlier_values(tmp_path: Path) -> None:
    recipe = override_recovery(load_recipe(None), {"grad_clip_percentile": 100, "gate_clipping": "together"})
    stored = recipe_to_dict(recipe)
    for stage in stored.values():
        modifier = stage.get("recovery_modifiers", {}).get("PromptRecoveryModifier", {})
        for name in ("clip_percentile", "gate_clipping"):
            modifier.pop(name, None)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": stored}))
    check_settings(recipe, tmp_path)
    with pytest.raises(RecipeError, match=r"grad_clip_percentile was 100\.0"):
        check_settings(load_recipe(None), tmp_path)
