"""The arms that recipes name and those that can be built are the same."""

from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.registry import RECOVERY_METHODS


def test_recipes_and_recovery_know_the_same_arms():
    """And every arm has a default learning rate."""
    assert list(ARM_DEFAULTS) == list(RECOVERY_METHODS)


def test_only_the_oracle_needs_tasks():
    assert {name for name, arm in ARM_DEFAULTS.items() if arm.needs_tasks} == {"oracle"}
