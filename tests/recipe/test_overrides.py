"""Flags of recovery and repair: which arms use them, and which fields depend on others."""

import pytest

from mopcompress.errors import UsageError
from mopcompress.recipe import (
    load_recipe,
)
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.overrides import pruning_recipe, recovery_recipe


def test_each_rank_is_named_by_its_own_flag() -> None:
    recipe = load_recipe(None)
    with pytest.raises(UsageError, match=r"^--rank: 0"):
        recovery_recipe(recipe, {"rank": 0})
    with pytest.raises(UsageError, match=r"^--repair-rank: 0"):
        pruning_recipe(recipe, repair_rank=0)


@pytest.mark.parametrize(
    ("arm", "flags", "message"),
    [
        ("single", {"top_k": 1}, "--top-k: has no effect on single, only on mop, shuffled; leave it out"),
        ("idp", {"deep": True}, "--deep: has no effect on idp, only on single, mop, uniform, oracle, shuffled; leave"),
        ("lora", {"deep": True}, "--deep: has no effect on lora"),
        ("input", {"rank": 2}, "--rank: has no effect on input, only on lora, masklora, eora; leave it out"),
        ("eora", {"batch_size": 4}, "--batch-size: has no effect on eora"),
    ],
)
def test_a_flag_without_effect_is_an_error(arm, flags, message) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        recovery_recipe(load_recipe(None), {"arm": arm, **flags})


def test_a_flag_equal_to_the_default_is_accepted() -> None:
    recipe = recovery_recipe(
        load_recipe(None), {"arm": "single", "deep": False, "gate_logit_scale": 0.3, "top_k": None}
    )
    assert recipe.recovery.arm == "single"


OTHERS = {  # another value than the default of each
    "experts": 3,
    "prompts_per_expert": 3,
    "layer": 2,
    "per_layer_prompts": True,
    "rank": 2,
    "adapter_targets": ("q_proj",),
    "gate_learning_rate": 0.5,
    "gate_clipping": "together",
    "gate_pretraining_steps": 3,
    "gate_logit_scale": 1.0,
    "gate_labels": "clusters",
    "gate_mode": "values",
    "shared_expert": True,
    "top_k": 1,
    "prompt_log_weight": -1.0,
}


@pytest.mark.parametrize("arm", ARM_DEFAULTS)
def test_an_arm_accepts_its_relevant_fields(arm) -> None:
    relevant = {name: OTHERS[name] for name in ARM_DEFAULTS[arm].relevant_fields}
    recovery = recovery_recipe(load_recipe(None), {"arm": arm, **relevant}).recovery
    assert {name: getattr(recovery, name) for name in relevant} == relevant


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher": "dense"}, "--teacher: has no effect without distill or squarehead; set one, or leave it out"),
        ({"distill_temperature": 2.0}, "--distill-temperature: has no effect without distill"),
        ({"sweep_steps": 7}, "--sweep-steps: has no effect without sweep"),
    ],
)
def test_a_dependent_flag_alone_is_an_error(flags, message) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        recovery_recipe(load_recipe(None), flags)
    assert recovery_recipe(load_recipe(None), {**flags, "distill": 0.5, "sweep": True})
    if "teacher" in flags:
        assert recovery_recipe(load_recipe(None), {**flags, "arm": "eora"})
