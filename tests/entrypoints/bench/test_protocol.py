"""What a bench says of itself."""

import pytest

from mopcompress.entrypoints.bench.protocol import protocol
from mopcompress.recipe import load_recipe
from mopcompress.recipe.overrides import override_recovery


def test_a_teacher_and_deep_prompts_are_told() -> None:
    recipe = load_recipe(None)
    plain = protocol(recipe, ("add",))
    assert not [line for line in plain if "follows" in line or "deep" in line or "hidden states of" in line]
    taught = protocol(override_recovery(recipe, {"distill": 0.5, "squarehead": 2.0, "deep": True}), ("add",))
    assert len(set(taught) - set(plain)) == 3
    assert [line for line in taught if line.startswith("0.5 of every trained arm's loss follows")]


@pytest.mark.parametrize("arm", ["single", "eora"])
def test_the_gate_of_mop_is_told_of_whatever_arm_a_recipe_names(arm: str) -> None:
    recipe = override_recovery(load_recipe(None), {"arm": arm})
    assert "task labels" in " ".join(protocol(recipe, ("add", "sort")))


@pytest.mark.parametrize(
    ("flags", "labelled"),
    [({}, True), ({"experts": 3}, True), ({"experts": 2}, False), ({"gate_labels": "clusters"}, False)],
)
def test_a_gate_is_said_to_be_taught_by_labels_only_if_it_is(flags: dict[str, object], labelled: bool) -> None:
    text = " ".join(protocol(override_recovery(load_recipe(None), flags), ("add", "sort", "tell")))
    assert ("task labels" in text) is labelled
    assert ("clusters of the training instructions" in text) is not labelled
