"""Translation of a recipe's modifiers into the configurations of algorithms, adapters and training."""

from mopcompress.compress.plan import REPAIR, MethodConfig
from mopcompress.compress.structured import StructuredConfig
from mopcompress.errors import UsageError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import (
    ALPSModifier,
    GPTQModifier,
    LowRankRepairModifier,
    PromptRecoveryModifier,
    SparseGPTModifier,
    StructuredPruningModifier,
)
from mopcompress.recipe.arms import ARM_DEFAULTS, NO_ADAPTER
from mopcompress.recipe.pruning_modifiers import Masking
from mopcompress.recover.adapter import AdapterConfig, AdapterInit
from mopcompress.recover.training import TrainingConfig

Compressing = Masking | GPTQModifier


def method_config(modifier: Compressing) -> MethodConfig:
    """Return the configuration of a method, with the keywords of its function as options."""
    options: dict[str, object]
    if isinstance(modifier, GPTQModifier):
        options = {
            "bits": modifier.bits,
            "group_size": modifier.group_size,
            "damping": modifier.dampening_frac,
            "block_size": modifier.block_size,
            "act_order": modifier.actorder == "static",
            "keep_zeros": True,  # of earlier pruning; a dense model has hardly any
            "sparsity": modifier.sparsity,
            "pattern": modifier.pattern,
        }
    else:
        options = {"sparsity": modifier.sparsity, "pattern": modifier.pattern}
    if isinstance(modifier, SparseGPTModifier):
        options |= {
            "block_size": modifier.block_size,
            "damping": modifier.dampening_frac,
            "keep_zeros": modifier.preserve_sparsity_mask,
        }
    if isinstance(modifier, ALPSModifier):
        options |= {
            "damping": modifier.dampening_frac,
            "steps": modifier.iterations,
            "refit_steps": modifier.refit_steps,
            "keep_zeros": modifier.preserve_sparsity_mask,
        }
    return MethodConfig(
        method=modifier.method,
        options=options,
        targets=modifier.targets,
        ignore=modifier.ignore,
        match_dense=modifier.match_dense,
        match_samples=modifier.match_samples,
        refit_steps=0 if isinstance(modifier, GPTQModifier | ALPSModifier) else modifier.refit_steps,
    )


def repair_config(modifier: LowRankRepairModifier) -> MethodConfig:
    """Return the configuration of a low-rank repair."""
    return MethodConfig(
        method=REPAIR, options={"rank": modifier.rank}, targets=modifier.targets, ignore=modifier.ignore
    )


def structured_config(modifier: StructuredPruningModifier) -> StructuredConfig:
    """Return the configuration of structured pruning."""
    return StructuredConfig(
        mlp_sparsity=modifier.mlp_sparsity,
        head_sparsity=modifier.head_sparsity,
        score=modifier.score,
        damping=modifier.dampening_frac,
    )


def adapter_init(modifier: PromptRecoveryModifier, seed: int) -> AdapterInit:
    """Return what the first values of the recipe's adapter depend on."""
    return AdapterInit(
        gate_pretraining_steps=modifier.gate_pretraining_steps,
        gate_logit_scale=modifier.gate_logit_scale,
        prompt_log_weight=modifier.prompt_log_weight,
        seed=seed,
    )


def training_config(modifier: PromptRecoveryModifier, learning_rate: float, seed: int) -> TrainingConfig:
    """Return how the recipe's adapter is trained, at this learning rate and seed."""
    return TrainingConfig(
        steps=modifier.steps,
        batch_size=modifier.train_batch_size,
        learning_rate=learning_rate,
        gate_learning_rate=modifier.gate_learning_rate,
        warmup_fraction=modifier.warmup_fraction,
        max_grad_norm=modifier.max_grad_norm,
        grad_clip_percentile=modifier.grad_clip_percentile,
        clip_gate_separately=modifier.gate_clipping == "apart",
        seed=seed,
        gradient_accumulation_steps=modifier.gradient_accumulation_steps,
    )


def adapter_config(
    modifier: PromptRecoveryModifier, model: LanguageModel, tasks: tuple[str, ...], base_sha256: str
) -> AdapterConfig:
    """Return the configuration of the recipe's adapter on a model, for data of these tasks.

    Raises `UsageError` when the model lacks the block, or `top_k` is more than the experts.
    """
    return AdapterConfig(
        arm=modifier.arm,
        experts=modifier.count_experts(tasks),
        prompts_per_expert=modifier.prompts_per_expert,
        layer=first_layer(modifier.arm, modifier.layer, model),
        hidden_size=model.hidden_size,
        base_sha256=base_sha256,
        tasks=modifier.domains(tasks),
        gate_mode=modifier.gate_mode,
        shared_expert=modifier.shared_expert,
        top_k=modifier.top_k,
        per_layer_prompts=modifier.per_layer_prompts,
        rank=modifier.rank,
        targets=modifier.adapter_targets,
    )


def first_layer(arm: str, layer: int | None, model: LanguageModel) -> int:
    """Return the first block that an arm changes: by default the tenth of 32, in proportion, as in the paper.

    It is 0 for arms at the input. Raises `UsageError` when the model lacks the block.
    """
    blocks, defaults = len(model.blocks), ARM_DEFAULTS.get(arm, NO_ADAPTER)
    without_middle = layer is None and blocks == 1
    if defaults.at_input or (defaults.whole and (layer == 0 or without_middle)):
        return 0
    if blocks == 1:
        raise UsageError(f"arm {arm}: it acts above a first block, and the model has one in all; take one at the input")
    if layer is None:
        return max(1, round(10 / 32 * blocks))
    if not 0 < layer < blocks:
        raise UsageError(f"recovery.layer: {layer} is not 1 to {blocks - 1}, and the model has {blocks} blocks")
    return layer
