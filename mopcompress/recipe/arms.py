"""Arms that a recipe can name, each with what a fair comparison needs: a learning rate of its own.

A shared rate for all would choose the winner by accident. How each was found: benchmarks/README.md.
"""

from dataclasses import dataclass

from mopcompress.recipe.field_types import fault
from mopcompress.recipe.validation_errors import nearest_name

BUDGET = frozenset({"experts", "prompts_per_expert", "shared_expert"})  # of a `mop` without per-layer prompts
OPENED = BUDGET | {
    "layer",
    "prompt_log_weight",
    "gate_labels",
}  # prompts in the middle: experts are initialized in their own domains
MIXED = OPENED | {"per_layer_prompts"}
GATE = frozenset({"gate_learning_rate", "gate_clipping", "gate_pretraining_steps", "gate_logit_scale", "gate_labels"})
RATES = frozenset({"learning_rate", "learning_rates", "sweep", "sweep_steps"})
STEPS = frozenset(
    {
        "steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "warmup_fraction",
        "max_grad_norm",
        "grad_clip_percentile",
    }
)
TRAINING = STEPS | RATES | {"distill", "distill_temperature", "squarehead"}  # of all arms that take steps
LOW_RANK = BUDGET | {"layer", "rank", "adapter_targets"}


@dataclass(frozen=True, kw_only=True)
class ArmDefaults:
    """Settings that differ from arm to arm by default."""

    summary: str  # one phrase for reports
    learning_rate: float | None  # None: found in closed form, without a step
    relevant_fields: frozenset[str] = frozenset()  # of a recovery; those of all steps apart
    at_input: bool = False  # changes the network from its embeddings on, not from the middle
    needs_tasks: bool = False  # uses the true task of every example: text without one cannot be scored
    deep_learning_rate: float | None = None  # with `per_layer_prompts`; None: it has no such form
    whole: bool = False  # may change the network from block 0 on
    revision: int = 1  # raised whenever the arm's default behaviour changes, so that old and new rows are never mixed


ARM_DEFAULTS = {
    "single": ArmDefaults(
        summary="one prompt in the middle of the network, with as many tokens as all experts of mop together",
        learning_rate=0.5,
        relevant_fields=MIXED,
        deep_learning_rate=3e-2,
    ),
    "mop": ArmDefaults(
        summary="the Mixture of Prompts: groups of prompts (experts) in the middle of the network, weighed by a gate",
        learning_rate=0.5,
        relevant_fields=MIXED | GATE | {"gate_mode", "top_k"},
        deep_learning_rate=3e-2,
    ),
    "uniform": ArmDefaults(
        summary="mop without a gate: every expert has weight 1",
        learning_rate=0.5,
        relevant_fields=MIXED | {"gate_mode"},
        deep_learning_rate=3e-2,
    ),
    "oracle": ArmDefaults(
        summary="mop with all weight on the expert of the row's true task",
        learning_rate=0.5,
        relevant_fields=MIXED - {"gate_labels"} | {"gate_mode"},
        needs_tasks=True,
        deep_learning_rate=3e-2,
    ),
    "shuffled": ArmDefaults(
        summary="mop whose gate reads the instruction of another row",
        learning_rate=0.5,
        relevant_fields=MIXED | GATE | {"gate_mode", "top_k"},
        deep_learning_rate=3e-2,
    ),
    "idp": ArmDefaults(
        summary="experts as in mop; the instruction's attention chooses one of them",
        learning_rate=0.5,
        relevant_fields=OPENED,
    ),
    # not swept: AdamW's rate for prompt and prefix tuning in PEFT's own guide to prompt-based methods, which deep
    # prompts are too; Xu et al. take 1e-3 after 500 warm-up steps, more than ours are in all
    "input": ArmDefaults(
        summary="one prompt before the text, at the input of the network (prompt tuning)",
        learning_rate=3e-2,
        relevant_fields=BUDGET,
        at_input=True,
    ),
    "smop": ArmDefaults(
        summary="short prompts before the text, of which a router chooses one",
        learning_rate=3e-2,
        relevant_fields=BUDGET | {"gate_learning_rate", "gate_clipping"},
        at_input=True,
    ),
    "prefix": ArmDefaults(
        summary="trained keys and values in every layer (prefix tuning)",
        learning_rate=3e-2,
        relevant_fields=BUDGET,
        at_input=True,
    ),
    "lora": ArmDefaults(
        summary="trained low-rank updates of linears",
        learning_rate=1e-2,
        relevant_fields=LOW_RANK,
        whole=True,
        revision=2,
    ),
    "masklora": ArmDefaults(
        summary="lora that keeps pruned weights at zero",
        learning_rate=1e-2,
        relevant_fields=LOW_RANK,
        whole=True,
        revision=2,
    ),
    "eora": ArmDefaults(
        summary="a low-rank repair from calibration inputs, computed without training",
        learning_rate=None,
        relevant_fields=LOW_RANK,
        whole=True,
    ),
    "ia3": ArmDefaults(
        summary="trained scales of keys, values and MLP neurons",
        learning_rate=3e-2,
        relevant_fields=frozenset({"layer"}),
        whole=True,
    ),
    "norms": ArmDefaults(
        summary="the model's own norms, trained", learning_rate=1e-2, relevant_fields=frozenset({"layer"}), whole=True
    ),
    "mop+": ArmDefaults(
        summary="trained norms and neuron scales, and low-rank updates weighed by a gate",
        learning_rate=3e-3,
        relevant_fields=BUDGET | GATE | {"layer"},
        revision=2,
    ),
}
# `none` changes nothing from any block on
NO_ADAPTER = ArmDefaults(summary="the compressed model without an adapter", learning_rate=None, whole=True)
ARM_NAMES = ("none", *ARM_DEFAULTS)


def revision_of(arm: str) -> int:
    """Return the revision of an arm's default behaviour."""
    return ARM_DEFAULTS[arm].revision if arm in ARM_DEFAULTS else 1


def arms_using(field: str) -> tuple[str, ...]:
    """Return the arms on which a field of a recovery has an effect."""
    return tuple(
        arm
        for arm, settings in ARM_DEFAULTS.items()
        if field in settings.relevant_fields
        or field in {"arm", "teacher"}
        or (field in TRAINING and settings.learning_rate is not None)
    )


def known_arm(name: str) -> str:
    """Return the name; raises a fault when a bench cannot have it."""
    names = ("none", *ARM_DEFAULTS)  # not ARM_NAMES: a program can add an arm of its own
    if name not in names:
        raise fault(f"not one of {', '.join(names)}", nearest_name(name, names))
    return name


def trained_arm(name: str) -> str:
    """Return the name; raises a fault when there is nothing to train."""
    if name not in ARM_DEFAULTS:
        raise fault(f"not one of {', '.join(ARM_DEFAULTS)}", nearest_name(name, tuple(ARM_DEFAULTS)))
    return name
