"""Arms: the fields that are relevant to them."""

from mopcompress.recipe import (
    PromptRecoveryModifier,
)
from mopcompress.recipe.arms import ARM_DEFAULTS, arms_using


def test_every_field_of_recovery_is_relevant_to_an_arm() -> None:
    fields = PromptRecoveryModifier.model_fields
    assert [name for name in fields if not arms_using(name)] == []
    assert {name for settings in ARM_DEFAULTS.values() for name in settings.relevant_fields} <= fields.keys()
