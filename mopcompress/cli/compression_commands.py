"""Commands that compress models: `prune` and `quantize`.

Each checks all that is cheap, then prints its plan or does its work. Entrypoints are imported inside
the commands: torch takes seconds to load, and a wrong flag should not wait for it.
"""

from pathlib import Path
from typing import Annotated

import typer

from mopcompress.cli.app import app
from mopcompress.cli.command import Common, command
from mopcompress.cli.options import (
    BACKEND,
    CALIBRATION,
    DRY_RUN,
    MACHINE,
    MODEL,
    NOT_FOR_COMPRESSION,
    OUTPUT,
    TRAINING_DATA,
    VERBOSITY,
)
from mopcompress.cli.output import output_folder, print_plan, print_result
from mopcompress.entrypoints import preflight
from mopcompress.recipe import Recipe
from mopcompress.recipe.overrides import (
    compressing_modifiers,
    pruning_recipe,
    quantization_recipe,
)
from mopcompress.recipe.run_spec import OURS, PRUNING_METHODS

RepairRank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Rank of a matrix beside each compressed linear that repairs its outputs (default none)"
    ),
]
STRUCTURED_FACTS = ("channels", "kv_groups", "parameters")  # of structured pruning alone


@command(
    app,
    MODEL,
    BACKEND,
    MACHINE,
    CALIBRATION,
    TRAINING_DATA,
    OUTPUT,
    DRY_RUN,
    VERBOSITY,
    parts=("run", "pruning", "repair"),
    unused=NOT_FOR_COMPRESSION,
)
def prune(
    common: Common,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{', '.join(PRUNING_METHODS)} (default alps)")
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Weights removed (default 0.5); structured: MLP channels (0.25)"),
    ] = None,
    pattern: Annotated[str | None, typer.Option(metavar="N:M", help="N zeros in every M weights of a row")] = None,
    repair_rank: RepairRank = None,
) -> None:
    """Remove weights, block after block, into a normal Hugging Face folder."""
    recipe = pruning_recipe(
        common.load(),
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        repair_rank=repair_rank,
        settings=common.settings,
    )
    _compress(common, recipe, Path("runs/pruned"))


@command(
    app,
    MODEL,
    BACKEND,
    MACHINE,
    CALIBRATION,
    TRAINING_DATA,
    OUTPUT,
    DRY_RUN,
    VERBOSITY,
    parts=("run", "pruning", "quantization", "repair"),
    unused=NOT_FOR_COMPRESSION,
)
def quantize(
    common: Common,
    bits: Annotated[int | None, typer.Option(metavar="N", help="Bits of a weight: 2, 3, 4 (default) or 8")] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights that share a scale (default 64); -1: the whole row")
    ] = None,
    repair_rank: RepairRank = None,
) -> None:
    """Round weights with GPTQ, block after block, into a normal Hugging Face folder."""
    recipe = quantization_recipe(
        common.load(), bits=bits, group_size=group_size, repair_rank=repair_rank, settings=common.settings
    )
    _compress(common, recipe, Path("runs/quantized"))


def _compress(common: Common, recipe: Recipe, default: Path) -> None:
    target = output_folder(recipe, default)
    preflight.check_inputs(recipe.run, data=False, calibration=True)
    done = preflight.completed_by_same_recipe(target, recipe, common.resume)
    modifiers = compressing_modifiers(recipe)
    preflight.check_recipe_shapes(recipe, modifiers)
    if common.dry_run:
        model = preflight.model_facts(recipe.run.model)
        methods = "+".join(
            [modifier.method for modifier in modifiers] + ([recipe.repair.method] if recipe.repair else [])
        )
        print_plan(common, recipe, target, done, {"model": model, "methods": methods, "disk_bytes": model["bytes"]})
        return
    with common.working() as progress:
        if recipe.run.backend == OURS:
            from mopcompress.entrypoints.compress import compress
        else:
            from mopcompress.entrypoints.compress_external import compress_external as compress
        from mopcompress.entrypoints.unchanged_inputs import verify_finished

        facts = (
            verify_finished(target, recipe, progress)
            if done
            else compress(recipe, modifiers, target, progress=progress)
        )
    shown = (
        "method",
        "sparsity",
        "weights",
        *STRUCTURED_FACTS,
        "repair",
        "fallbacks",
        "compress_seconds",
        "model_bytes",
    )
    print_result(common, target, facts, shown)
