"""The prompt-recovery modifier; `ConstantPruningModifier` is accepted without effect, since weights stay frozen."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mopcompress.errors import UsageError
from mopcompress.recipe.arms import ARM_DEFAULTS, trained_arm
from mopcompress.recipe.field_types import FilePath, IgnoredTime, Spec, Targets
from mopcompress.recipe.pruning_modifiers import replace_checked

TrainedArm = Annotated[str, AfterValidator(trained_arm)]
UNLABELLED = 7  # experts for rows that name no task, as in Dun et al. (2310.02842)
Rate = Annotated[float, Field(gt=0, le=1000)]
SWEPT = (-1, 0, 1)  # rates that a sweep tries first: powers of a factor on the recipe's rate


class ConstantPruningModifier(Spec):
    """Keep zeros while training, as recovery always does: it never changes a weight."""

    targets: Targets = ("__ALL__",)
    start: IgnoredTime = None
    end: IgnoredTime = None
    update: IgnoredTime = None


class PromptRecoveryModifier(Spec):
    """Train an adapter on a frozen compressed model: a prompt, a mixture of prompts with a gate, or another arm."""

    arm: TrainedArm = "mop"
    experts: Annotated[int, Field(ge=1, le=1024)] | None = None  # None: one per task of the data, or 7 found by k-means
    prompts_per_expert: Annotated[int, Field(ge=1, le=1024)] = 10  # tokens
    layer: Annotated[int, Field(ge=0, le=1024)] | None = None  # None: round(10 / 32 x the model's blocks)
    per_layer_prompts: bool = (
        False  # single, mop and its controls: train keys and values in every layer from `layer` up
    )
    rank: Annotated[int, Field(ge=1, le=65536)] | None = (
        None  # of lora, masklora, eora; None: no more parameters than mop
    )
    adapter_targets: Targets | None = None  # ends of linears' names; None: o_proj, down_proj and their like
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 40
    train_batch_size: Annotated[int, Field(ge=1, le=65536)] = 8  # rows per step
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 1  # parts of a step's rows, to save memory
    learning_rate: Rate | None = None  # of all but the gate; None: the arm's own
    learning_rates: dict[TrainedArm, Rate] = Field(default_factory=dict)  # of arms by name: wins over learning_rate
    gate_learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-3  # 0: frozen
    gate_pretraining_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 300
    gate_logit_scale: Annotated[float, Field(ge=0, le=10)] = 0.3  # factor on the pre-trained gate's logits
    gate_labels: Literal["tasks", "clusters"] = "tasks"  # experts' domains: the rows' tasks, or k-means on instructions
    gate_clipping: Literal["apart", "together"] = (
        "apart"  # clip the gradients of the gate and of all else apart, or by one norm
    )
    gate_mode: Literal["renormalised", "values", "separate"] = (
        "renormalised"  # what an expert's weight does in attention
    )
    shared_expert: bool = (
        False  # one more group of prompts, of weight 1 for every row; in idp and smop a further choice
    )
    top_k: Annotated[int, Field(ge=1, le=1024)] | None = None  # experts that are active in inference; None: all
    prompt_log_weight: Annotated[float, Field(ge=-30, le=30)] = -3.0  # initial log weight of every prompt
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the steps
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    # clip to this percentile of the non-zero gradient norms so far too (AutoClip), where it is less; 100 disables it
    grad_clip_percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    distill: Annotated[float, Field(ge=0, le=1)] = (
        0.0  # share of the loss that follows the dense model's distributions, not the text
    )
    distill_temperature: Annotated[float, Field(gt=0, le=100)] = 1.0  # of both distributions
    squarehead: Annotated[float, Field(ge=0, le=1000)] = 0.0  # weight of a loss on hidden states, the dense model's
    teacher: FilePath | None = None  # None: the dense model that the compressed one was made from
    sweep: bool = (
        False  # first try a third, one and three times the learning rate, and on past an edge; the best trains
    )
    sweep_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None  # of each trial; None: as many as steps

    @property
    def rate(self) -> float | None:
        """Learning rate: the recipe's, or the arm's own; None where the arm takes no steps."""
        settings = ARM_DEFAULTS[self.arm]
        if settings.learning_rate is None:
            return None
        recipe_rate = self.learning_rates.get(self.arm, self.learning_rate)
        if recipe_rate is not None:
            return recipe_rate
        return (
            settings.deep_learning_rate
            if self.per_layer_prompts and settings.deep_learning_rate
            else settings.learning_rate
        )

    @property
    def sweeps(self) -> bool:
        """True when a sweep is requested and there is a rate to find."""
        return self.sweep and self.rate is not None

    @property
    def least_steps(self) -> int:
        """Optimizer steps of the training and of the first trials of its sweep.

        If a trial is as long as the training, the best trial is the training.
        """
        if not self.sweeps:
            return 0 if self.rate is None else self.steps
        trial = self.sweep_steps or self.steps
        return len(SWEPT) * trial + (0 if trial == self.steps else self.steps)

    def domains(self, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Return the task of each expert; nothing when k-means finds the experts, or when they have no domains."""
        settings = ARM_DEFAULTS[self.arm]
        labelled = settings.needs_tasks or ("gate_labels" in settings.relevant_fields and self.gate_labels == "tasks")
        return tasks if labelled and self.experts in (None, len(tasks)) else ()

    def count_experts(self, tasks: tuple[str, ...]) -> int:
        """Return the number of experts: one per task by default. Raises `UsageError` when `top_k` is more."""
        experts = self.experts or len(tasks) or UNLABELLED
        if self.top_k is not None and self.top_k > experts:
            raise UsageError(
                f"recovery.top_k: {self.top_k} of {experts} experts cannot be active; give at most {experts}"
            )
        return experts

    def at_rate(self, rate: float) -> "PromptRecoveryModifier":
        """Return a copy with a rate that a sweep tries or found: it may lie beyond the limits of a recipe."""
        return self.model_copy(update={"learning_rate": rate, "learning_rates": {}})

    def with_arm(self, arm: str) -> "PromptRecoveryModifier":
        """Return a copy for another arm, with equal prompts in total, steps and data."""
        return replace_checked(self, arm=arm)
