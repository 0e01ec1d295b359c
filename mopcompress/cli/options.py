"""The options that commands share, each defined once."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefined

from mopcompress.recipe import PromptRecoveryModifier, RunSpec
from mopcompress.recipe.arms import ARM_NAMES
from mopcompress.recipe.run_spec import BACKENDS, CELLS, PRUNING_METHODS
from mopcompress.recipe.validation_errors import field_name

Options = Mapping[str, Any]


class Resume(StrEnum):
    """Ways to treat an output that exists already, or does not."""

    auto = "auto"
    required = "required"
    never = "never"


def _run_fields(panel: str, **texts: tuple[str, str]) -> Options:
    """Return options for fields of `RunSpec`: (metavar, help) by flag. The recipe checks them, as text."""
    return {name: _option(str, panel, _with_default(RunSpec, name, text), meta) for name, (meta, text) in texts.items()}


def _recovery_fields(**texts: tuple[type, str]) -> Options:
    """Return options for fields of `PromptRecoveryModifier`: (type, help) by flag."""
    return {
        name: _option(kind, "Recovery", _with_default(PromptRecoveryModifier, name, text))
        for name, (kind, text) in texts.items()
    }


def _option(kind: type, panel: str, text: str, metavar: str | None = None) -> Any:
    option = typer.Option(metavar=metavar, help=text, rich_help_panel=panel, show_default=False)
    return Annotated[kind | None, option]


def _switch(*names: str, help: str) -> Any:
    return Annotated[bool, typer.Option(*names, help=help, rich_help_panel="Output")]


def _with_default(kind: type[RunSpec | PromptRecoveryModifier], flag: str, text: str) -> str:
    default = kind.model_fields[field_name(kind, flag)].default
    if default is None or default is False or default in ((), PydanticUndefined):
        return text
    values = default if isinstance(default, tuple) else (default,)
    return f"{text} (default {','.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"


def setting_option(parts: tuple[str, ...]) -> Any:
    """Return the `--set` option of a command that takes these parts of a recipe, such as `run` or `recovery`."""
    keys = ", ".join(f"{part}.FIELD" for part in parts)
    text = f"Set a field of the recipe, as often as needed; VALUE is YAML, KEY is {keys}"
    option = typer.Option("--set", metavar="KEY=VALUE", help=text, rich_help_panel="Recipe and machine")
    return Annotated[list[str] | None, option]


MODEL: Options = {
    "model": Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"Hugging Face folder, hub id, or {RunSpec().model} (the default)."),
    ]
}
RECIPE: Options = {"recipe": _option(Path, "Recipe and machine", "Recipe in YAML; flags and --set win over it", "FILE")}
MACHINE = _run_fields(
    "Recipe and machine",
    seed=("N", "Seed of rows, calibration text and recovery"),
    device=("DEVICE", "auto, cpu, cuda, cuda:N or mps"),
)
BATCH = _run_fields("Recipe and machine", batch_size=("ROWS", "Rows at once in evaluation and generation"))
TRAINING_DATA = _run_fields(
    "Data",
    data=("DATA", "JSONL, JSON, CSV or Parquet, or hub id"),
    columns=("COLUMN=FIELD", "Rename columns, with commas between several"),
    max_length=("TOKENS", "Longer rows are dropped and counted"),
    train_rows=("N", "Training rows"),
)
DATA = {**TRAINING_DATA, **_run_fields("Data", test_rows=("N", "Test rows"))}
GENERATION = _run_fields(
    "Data",
    max_new_tokens=("TOKENS", "Answer test rows too, in at most so many tokens"),
)
CALIBRATION = _run_fields(
    "Calibration",
    calibration=("TEXT", "Text file, hub id, data (its rows), or self (written by MODEL)"),
    num_calibration_samples=("N", "Windows of text"),
    max_seq_length=("TOKENS", "Tokens of a window"),
)
BACKEND = _run_fields(
    "Recipe and machine",
    backend=("NAME", f"Library that compresses: {', '.join(BACKENDS)}"),
    backend_python=("FILE", "Python of the environment that has that library"),
)
GRID = _run_fields(
    "Grid",
    ratios=("SHARES", "Shares of weights removed"),
    methods=("NAMES", f"{', '.join(PRUNING_METHODS)}"),
    bits=("LIST", "Bit widths to quantize to, such as 3,4"),
    arms=("NAMES", ", ".join(ARM_NAMES)),
    seeds=("LIST", "Seeds of the trained arms"),
)
STEPS = _recovery_fields(
    steps=(int, "Training steps"),
    sweep=(bool, "Find the best of several learning rates first"),
)
RECOVERY = {
    **STEPS,
    **_recovery_fields(
        learning_rate=(float, "Learning rate (default: the arm's own)"),
        rank=(int, "Rank of lora, masklora, eora (default: as big as mop)"),
        experts=(int, "Experts (default: one per task, 7 without tasks)"),
        distill=(float, "Share of the loss that follows the teacher"),
        teacher=(str, "Dense model to follow (default: MODEL's own)"),
    ),
}
OUTPUT: Options = {
    **_run_fields("Output", output_dir=("FOLDER", "Folder of the result; in runs/ if not given")),
    "resume": Annotated[
        Resume,
        typer.Option(
            metavar="HOW",
            help="auto (default): resume; required: fail if nothing is there; never: if something is",
            rich_help_panel="Output",
            show_default=False,
        ),
    ],
}
VERBOSITY: Options = {
    "json": _switch("--json", help="One JSON object on stdout"),
    "verbose": _switch("--verbose", "-v", help="Also what libraries warn of"),
    "quiet": _switch("--quiet", "-q", help="Errors only"),
}
DRY_RUN: Options = {"dry_run": _switch("--dry-run", help="Check, print the plan, and stop")}

# Fields of `run:` that commands do not use.
GRID_FIELDS = frozenset(
    {"group_size", *(name for name, field in RunSpec.model_fields.items() if CELLS in field.metadata)}
)
COMPRESSION_FIELDS = frozenset(
    {"calibration", "num_calibration_samples", "max_seq_length", "max_fallback_fraction", "backend", "backend_python"}
)
GENERATION_FIELDS = frozenset({"model", "device", "seed", "eval_batch_size"})
NOT_FOR_COMPRESSION = GRID_FIELDS | {"max_new_tokens", "eval_text", "eval_text_samples"}
NOT_FOR_ADAPTERS = GRID_FIELDS | COMPRESSION_FIELDS
NOT_FOR_GENERATION = frozenset(RunSpec.model_fields) - GENERATION_FIELDS
