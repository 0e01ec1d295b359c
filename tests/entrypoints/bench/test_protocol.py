"""The sentences of a report on how arms are compared."""

import pytest

from mopcompress.entrypoints.bench.protocol import protocol
from mopcompress.recipe import load_recipe
from mopcompress.recipe.overrides import override_recovery


def test_a_teacher_and_deep_prompts_are_mentioned() -> None:
    recipe = load_recipe(None)
    plain = protocol(recipe, ("add",))
    assert not [line for line in plain if "follows" in line or "deep" in line or "hidden states of" in line]
    taught = protocol(
        override_recovery(recipe, {"distill": 0.5, "squarehead": 2.0, "per_layer_prompts": True}), ("add",)
    )
    assert len(set(taught) - set(plain)) == 3
    assert [line for line in taught if line.startswith("0.5 of every trained arm's loss follows")]


@pytest.mark.parametrize("arm", ["single", "eora"])
def test_the_gate_is_described_for_any_arm_of_the_recipe(arm: str) -> None:
    recipe = override_recovery(load_recipe(None), {"arm": arm})
    assert "task labels" in " ".join(protocol(recipe, ("add", "sort")))


@pytest.mark.parametrize(
    ("flags", "labelled"),
    [({}, True), ({"experts": 3}, True), ({"experts": 2}, False), ({"gate_labels": "clusters"}, False)],
)
def test_gate_labels_are_described_as_they_are(flags: dict[str, object], labelled: bool) -> None:
    text = " ".join(protocol(override_recovery(load_recipe(None), flags), ("add", "sort", "tell")))
    assert ("task labels" in text) is labelled
    assert ("clusters of the training instructions" in text) is not labelled
