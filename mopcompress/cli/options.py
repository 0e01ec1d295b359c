"""The options that commands share, each defined once."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefined

from mopcompress.recipe import PromptRecoveryModifier, RunSpec
from mopcompress.recipe.arms import ARM_NAMES

Options = Mapping[str, Any]


class Resume(StrEnum):
    """What to do when the output is there already, or is not."""

    auto = "auto"
    required = "required"
    never = "never"


def _run_fields(panel: str, **texts: tuple[str, str]) -> Options:
    """Fields of `RunSpec` as text: the recipe checks them, with the same words for a flag as for a file."""
    fields = RunSpec.model_fields
    return {
        name: _option(str, panel, f"{text} {_shown(fields[name].default)}", metavar)
        for name, (metavar, text) in texts.items()
    }


def _recovery_fields(**texts: tuple[str, type, str]) -> Options:
    """Fields of `PromptRecoveryModifier`: (field, type, help) by flag."""
    fields = PromptRecoveryModifier.model_fields
    return {
        name: _option(kind, "Recovery", f"{text} {_shown(fields[field].default)}")
        for name, (field, kind, text) in texts.items()
    }


def _option(kind: type, panel: str, text: str, metavar: str | None = None) -> Any:
    option = typer.Option(metavar=metavar, help=text.strip(), rich_help_panel=panel, show_default=False)
    return Annotated[kind | None, option]


def _switch(*names: str, help: str) -> Any:
    return Annotated[bool, typer.Option(*names, help=help, rich_help_panel="Output")]


def _shown(default: object) -> str:
    if default is None or default == () or default is PydanticUndefined:
        return ""
    return f"(default {','.join(map(str, default)) if isinstance(default, tuple) else default})"


MODEL: Options = {
    "model_folder": Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")],
    **_run_fields("Model and machine", model=("MODEL", "Hugging Face folder, hub id, or smollm2")),
}
MACHINE: Options = {
    "recipe": _option(Path, "Model and machine", "Recipe in YAML; a flag wins over it.", "FILE"),
    **_run_fields(
        "Model and machine",
        seed=("N", "Seed of rows, calibration text and `recover`; a bench trains with --seeds"),
        device=("DEVICE", "auto, cpu, cuda, cuda:N or mps"),
        eval_batch_size=("ROWS", "Rows at once in evaluation and generation"),
    ),
}
DATA = _run_fields(
    "Data",
    data=("DATA", "JSONL, JSON, CSV or Parquet file or folder, hub id, or skills"),
    columns=("COLUMN=FIELD,...", "Rename columns, for example question=instruction"),
    train_rows=("N", "Training rows"),
    validation_rows=("N", "Validation rows"),
    test_rows=("N", "Test rows"),
    max_length=("TOKENS", "Longer rows are dropped and counted"),
    skip_rows_longer_than=("TOKENS", "Use only rows of at most so many tokens"),
    eval_text=("TEXT", "Plain text that no arm is trained on, to be scored too"),
    eval_text_samples=("N", "Windows of it"),
    train_text=("TEXT", "Plain text to be trained on too, as a task of its own"),
    train_text_samples=("N", "Windows of it"),
)
WRITING = _run_fields(
    "Data",
    max_new_tokens=("TOKENS", "Also answer the test rows, in at most so many tokens, and score that (ROUGE-L)"),
)
CALIBRATION = _run_fields(
    "Calibration",
    calibration=("TEXT", "Text file, hub id, data (the training rows), or self (text the model writes)"),
    num_calibration_samples=("N", "Windows of text"),
    max_seq_length=("TOKENS", "Tokens of a window"),
    max_fallback_fraction=("SHARE", "Share of matrices that may need more damping than asked for"),
)
BACKEND = _run_fields(
    "Backend",
    backend=("NAME", "Who compresses: mopcompress, or llmcompressor or gptqmodel in a process of its own"),
    backend_python=("FILE", "The python of the environment that has that library; this one if not given"),
)
GRID = _run_fields(
    "Grid",
    ratios=("SHARES", "Shares of weights removed"),
    methods=("NAMES", "sparsegpt, alps, wanda, magnitude, structured"),
    bits=("LIST", "Bit widths to quantize to, such as 3,4"),
    group_size=("N", "Weights that share a scale, with --bits; -1: the whole row"),
    arms=("NAMES", ", ".join(ARM_NAMES)),
    dense_arms=("NAMES", "Arms of the dense model, which is always scored"),
    seeds=("LIST", "Seeds of the trained arms"),
)
JOINT: Options = {
    "prune_then_quantize": Annotated[
        bool | None,
        typer.Option(
            "--joint/--no-joint",
            help="With --bits: round what pruning left, not the dense model (default: as the recipe does).",
            rich_help_panel="Grid",
            show_default=False,
        ),
    ]
}
RECOVERY = _recovery_fields(
    steps=("steps", int, "Training steps"),
    experts=("experts", int, "Experts; one a task if not given, 7 found by k-means if rows name no tasks"),
    prompts_per_expert=("prompts_per_expert", int, "Prompt tokens of an expert"),
    layer=("layer", int, "First block that the arm acts in; 10/32 of the depth if not given"),
    deep=(
        "per_layer_prompts",
        bool,
        "single, mop and its controls: train keys and values in every layer; many more parameters",
    ),
    rank=("rank", int, "lora, masklora, eora: rank; the largest that trains no more than mop if not given"),
    rows_per_step=("train_batch_size", int, "Rows of a training step"),
    gradient_accumulation_steps=(
        "gradient_accumulation_steps",
        int,
        "Parts that a step's rows run in, one after the other, to save memory",
    ),
    learning_rate=("learning_rate", float, "Learning rate of all but the gate; the arm's own if not given"),
    gate_learning_rate=("gate_learning_rate", float, "Learning rate of the gate, 0 to freeze it"),
    gate_clipping=("gate_clipping", str, "Its gradient is clipped apart from that of what it weighs, or together"),
    grad_clip_percentile=(
        "grad_clip_percentile",
        float,
        "Clip gradients to this percentile of their norms so far, at most 1; 100: to 1",
    ),
    gate_pretraining_steps=("gate_pretraining_steps", int, "Steps that teach the gate the tasks"),
    gate_logit_scale=("gate_logit_scale", float, "Factor on the pre-trained gate's logits"),
    gate_labels=("gate_labels", str, "Experts' domains: tasks, or clusters of instructions"),
    gate_mode=("gate_mode", str, "What a gate's weight does: renormalised, values or separate"),
    shared_expert=("shared_expert", bool, "One more group of prompts: always on; in idp and smop one more to choose"),
    top_k=("top_k", int, "Experts that act in inference; all if not given"),
    prompt_log_weight=("prompt_log_weight", float, "Log weight that prompts begin with"),
    distill=("distill", float, "Share of the loss that follows the dense model's distributions, not the text"),
    distill_temperature=("distill_temperature", float, "Temperature of those distributions"),
    teacher=("teacher", str, "Dense model to distil or repair from; the one that the model was made from if not given"),
    squarehead=("squarehead", float, "Weight of a loss that draws hidden states to the dense model's"),
    sweep=("sweep", bool, "Try a third, one and three times the learning rate, and on past an edge that is best"),
    sweep_steps=("sweep_steps", int, "Training steps of each rate tried; as many as --steps if not given"),
)
OUTPUT: Options = {
    **_run_fields("Output", output_dir=("FOLDER", "Where the result goes; in runs/ if not given")),
    "resume": Annotated[
        Resume,
        typer.Option(
            help="auto: go on, or say it is done; required: fail if nothing is there; never: fail if something is.",
            rich_help_panel="Output",
        ),
    ],
}
SPEECH: Options = {
    "json": _switch("--json", help="One JSON object on stdout."),
    "verbose": _switch("--verbose", "-v", help="Also what libraries warn of."),
    "quiet": _switch("--quiet", "-q", help="Errors only."),
}
DRY_RUN: Options = {"dry_run": _switch("--dry-run", help="Check, print the plan, and stop.")}
