"""Settings of a recipe become the configs of adapters and of their training."""

import pytest
from factories import TASKS
from tiny_models import HIDDEN, tiny_model

from mopcompress.entrypoints.from_recipe import adapter_config, adapter_init, first_layer, training_config
from mopcompress.errors import UsageError
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recover.adapter import AdapterConfig, AdapterInit
from mopcompress.recover.training import TrainingConfig

# no value is the default
SETTINGS = {
    "arm": "mop",
    "experts": 5,
    "prompts_per_expert": 4,
    "layer": 3,
    "per_layer_prompts": True,
    "rank": 6,
    "adapter_targets": ("v_proj",),
    "steps": 7,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "gate_learning_rate": 0.02,
    "gate_clipping": "together",
    "gate_pretraining_steps": 11,
    "gate_logit_scale": 0.7,
    "gate_mode": "values",
    "shared_expert": True,
    "top_k": 2,
    "prompt_log_weight": -1.5,
    "warmup_fraction": 0.4,
    "max_grad_norm": 0.6,
    "grad_clip_percentile": 30.0,
}


def test_a_recipe_sets_all_of_the_training():
    modifier = PromptRecoveryModifier(**SETTINGS)
    assert all(getattr(modifier, name) != getattr(PromptRecoveryModifier(), name) for name in SETTINGS if name != "arm")
    assert training_config(modifier, 0.25, seed=8) == TrainingConfig(
        steps=7,
        batch_size=3,
        gradient_accumulation_steps=3,
        learning_rate=0.25,
        gate_learning_rate=0.02,
        warmup_fraction=0.4,
        max_grad_norm=0.6,
        grad_clip_percentile=30.0,
        clip_gate_separately=False,
        seed=8,
    )
    assert training_config(PromptRecoveryModifier(), 0.25, seed=8).clip_gate_separately


def test_a_recipe_sets_all_of_the_initialization():
    init = AdapterInit(gate_pretraining_steps=11, gate_logit_scale=0.7, prompt_log_weight=-1.5, seed=8)
    assert adapter_init(PromptRecoveryModifier(**SETTINGS), 8) == init


def test_a_recipe_sets_all_of_the_adapter(tiny_llama):
    assert adapter_config(PromptRecoveryModifier(**SETTINGS), tiny_llama, TASKS, "base") == AdapterConfig(
        arm="mop",
        experts=5,
        prompts_per_expert=4,
        layer=3,
        per_layer_prompts=True,
        rank=6,
        targets=("v_proj",),
        hidden_size=HIDDEN,
        base_sha256="base",
        tasks=(),
        gate_mode="values",
        shared_expert=True,
        top_k=2,
    )


@pytest.mark.parametrize(("blocks", "layer"), [(32, 10), (30, 9), (2, 1)])
def test_an_arm_acts_from_10_in_32_layers_in_proportion(blocks, layer):
    assert first_layer("mop", None, tiny_model(num_hidden_layers=blocks)) == layer


def test_a_model_of_one_block_has_no_middle():
    with pytest.raises(UsageError, match="the model has one in all"):
        first_layer("mop", None, tiny_model(num_hidden_layers=1))
    for arm in ("input", "lora", "none"):
        assert first_layer(arm, None, tiny_model(num_hidden_layers=1)) == 0
