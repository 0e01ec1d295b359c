"""Modifiers that train, or that mean nothing where weights are not trained."""

from typing import Annotated, Literal

from pydantic import Field

from mopcompress.recipe.fields import Spec, Targets, Time
from mopcompress.recipe.modifiers import changed


class ConstantPruningModifier(Spec):
    """Keep zeros while training. Always so here: recovery trains prompts and never touches a weight."""

    targets: Targets = ("__ALL__",)
    start: Time = None
    end: Time = None
    update: Time = None


class PromptRecoveryModifier(Spec):
    """Train prompts in front of a frozen compressed model: one prompt, or a mixture chosen by a gate."""

    arm: Literal["single", "mop"] = "mop"
    experts: Annotated[int, Field(ge=1, le=1024)] | None = None  # None: one a task of the data
    prompts_per_expert: Annotated[int, Field(ge=1, le=1024)] = 10  # tokens
    layer: Annotated[int, Field(ge=0, le=1024)] | None = None  # None: round(10 / 32 x the model's blocks)
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 40
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 8  # rows a step
    prompt_learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.5
    gate_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3
    gate_pretraining_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 300
    gate_temper: Annotated[float, Field(ge=0, le=10)] = 0.3  # factor on the pre-trained gate's logits
    log_opening: Annotated[float, Field(ge=-30, le=30)] = -3.0  # where the log weight of every prompt begins
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the steps
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    def with_arm(self, arm: str) -> "PromptRecoveryModifier":
        """The same settings for the other arm: equal prompts in all, steps and data."""
        return changed(self, arm=arm)
