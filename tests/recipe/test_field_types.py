"""Field types: the present and the stored name of a field, and how messages name it."""

import json
from typing import Any

import pytest
import yaml

from mopcompress.errors import RecipeError
from mopcompress.recipe import PromptRecoveryModifier, RunSpec, dump_recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.field_types import STORED_NAMES, Spec
from mopcompress.recipe.recipe import with_present_names
from mopcompress.recipe.validation_errors import field_name

VALUES = {  # other than the defaults
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 2.0,
    "grad_clip_percentile": 100.0,
    "gate_logit_scale": 1.0,
    "gate_mode": "values",
    "prompt_log_weight": -1.0,
    "per_layer_prompts": True,
    "eval_batch_size": 4,
    "max_new_tokens": 8,
    "skip_rows_longer_than": 64,
    "eval_text": "text.txt",
    "eval_text_samples": 5,
    "columns": {"question": "instruction"},
    "prune_then_quantize": True,
    "max_fallback_fraction": 0.25,
}


def kind_with(field: str) -> type[Spec]:
    [kind] = [kind for kind in (RunSpec, PromptRecoveryModifier) if field in kind.model_fields]
    return kind


def document(field: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe with fields of the part that has `field`."""
    if kind_with(field) is RunSpec:
        return {"run": fields}
    return {"recovery_stage": {"recovery_modifiers": {"PromptRecoveryModifier": fields}}}


def part(recipe: Any, field: str) -> Any:
    return recipe.run if kind_with(field) is RunSpec else recipe.recovery


def error_of(field: str, fields: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(document(field, fields), "r.yaml")
    return str(caught.value)


def test_every_stored_name_is_tried() -> None:
    assert VALUES.keys() == STORED_NAMES.keys()


@pytest.mark.parametrize("field", STORED_NAMES)
def test_a_field_is_read_by_both_names_and_stored_by_the_old_one(field: str) -> None:
    value, stored = VALUES[field], STORED_NAMES[field]
    recipes = [recipe_from_dict(document(field, {name: value}), "r.yaml") for name in (field, stored)]
    assert recipes[0] == recipes[1]
    assert getattr(part(recipes[0], field), field) == value != getattr(kind_with(field)(), field)
    written = recipe_to_dict(recipes[0])
    fields = written["run"]
    if kind_with(field) is PromptRecoveryModifier:
        fields = written["recovery_stage"]["recovery_modifiers"]["PromptRecoveryModifier"]
    assert (fields[stored], field in fields) == (value, False)
    assert recipe_from_dict(yaml.safe_load(dump_recipe(recipes[0])), "r.yaml") == recipes[0]
    assert recipe_from_dict(json.loads(json.dumps(written)), "r.yaml") == recipes[0]


@pytest.mark.parametrize("field", STORED_NAMES)
def test_both_names_of_a_field_are_an_error(field: str) -> None:
    stored = STORED_NAMES[field]
    message = error_of(field, {field: VALUES[field], stored: VALUES[field]})
    assert message.endswith(f".{stored}: the same field as {field}, and both are given; keep {field}")


@pytest.mark.parametrize("field", STORED_NAMES)
def test_an_error_names_the_field_as_it_was_typed(field: str) -> None:
    for name in (field, STORED_NAMES[field]):
        assert f".{name}: not " in error_of(field, {name: [object]})


@pytest.mark.parametrize("field", STORED_NAMES)
def test_a_hint_offers_present_names_alone(field: str) -> None:
    assert error_of(field, {f"{field}s": VALUES[field]}).endswith(f": no such field; did you mean {field!r}?")
    message = error_of(field, {f"{STORED_NAMES[field]}s": VALUES[field]})
    assert ": no such field" in message
    assert f"mean {STORED_NAMES[field]!r}" not in message


def test_a_stored_name_belongs_to_the_part_that_has_it() -> None:
    assert field_name(RunSpec, "batch_size") == "eval_batch_size"
    assert field_name(PromptRecoveryModifier, "batch_size") == "train_batch_size"
    assert field_name(RunSpec, "deep") == "deep"
    assert field_name(RunSpec, "train_rows") == "train_rows"


def test_messages_take_the_present_names_of_a_stored_recipe() -> None:
    recipe = recipe_from_dict(document("max_grad_norm", {}), "r.yaml")
    stored = {**recipe_to_dict(recipe), "model": "a hash", "other": {"batch_size": 1}}
    shown = with_present_names(stored)
    assert set(shown["run"]) == set(RunSpec.model_fields)
    modifier = shown["recovery_stage"]["recovery_modifiers"]["PromptRecoveryModifier"]
    assert set(modifier) == set(PromptRecoveryModifier.model_fields)
    assert (shown["model"], shown["other"]) == ("a hash", {"batch_size": 1})
    assert shown["recovery_stage"]["run_type"] == "train"
    assert stored["run"]["batch_size"] == 16
