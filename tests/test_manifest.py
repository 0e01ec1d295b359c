"""What a bench says of itself."""

import pytest

from mopcompress.recipe import load_recipe
from mopcompress.recipe.commands import with_recovery
from mopcompress.stages.protocol import protocol


@pytest.mark.parametrize(
    ("flags", "labelled"),
    [({}, True), ({"experts": 3}, True), ({"experts": 2}, False), ({"gate_labels": "clusters"}, False)],
)
def test_a_gate_is_said_to_be_taught_by_labels_only_if_it_is(flags: dict[str, object], labelled: bool) -> None:
    text = " ".join(protocol(with_recovery(load_recipe(None), flags), ("add", "sort", "tell")))
    assert ("task labels" in text) is labelled
    assert ("clusters of the training instructions" in text) is not labelled
