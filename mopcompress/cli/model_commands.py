"""Commands that recover and measure models: `recover`, `evaluate` and `bench`.

Each checks all that is cheap, then prints its plan or does its work. Entrypoints are imported inside
the commands: torch takes seconds to load, and a wrong flag should not wait for it.
"""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mopcompress.cli.app import app
from mopcompress.cli.command import Common, command
from mopcompress.cli.options import (
    BATCH,
    CALIBRATION,
    DATA,
    DRY_RUN,
    GENERATION,
    GRID,
    MACHINE,
    MODEL,
    NOT_FOR_ADAPTERS,
    OUTPUT,
    RECOVERY,
    STEPS,
    TRAINING_DATA,
    VERBOSITY,
)
from mopcompress.cli.output import (
    output_folder,
    print_bench,
    print_harness,
    print_json,
    print_plan,
    print_result,
    print_scores,
)
from mopcompress.entrypoints import preflight
from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe import RunSpec
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.overrides import (
    bench_recipe,
    recovery_recipe,
)
from mopcompress.recipe.run_spec import OURS
from mopcompress.recipe.settings import PARTS
from mopcompress.recipe.validation_errors import field_name

Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Adapter that `recover` wrote for this model.")]
ROW_FIELDS = {  # that only matter where rows of the data are scored
    *DATA,
    *GENERATION,
    "validation_rows",
    "skip_rows_longer_than",
    "eval_text",
    "eval_text_samples",
    "train_text",
    "train_text_samples",
}


@command(
    app,
    MODEL,
    MACHINE,
    BATCH,
    RECOVERY,
    TRAINING_DATA,
    OUTPUT,
    DRY_RUN,
    VERBOSITY,
    parts=("run", "recovery"),
    unused=NOT_FOR_ADAPTERS,
)
def recover(
    common: Common,
    arm: Annotated[str | None, typer.Option(metavar="NAME", help=f"{', '.join(ARM_DEFAULTS)} (default mop)")] = None,
) -> None:
    """Train an adapter (a Mixture of Prompts, or another arm) for a compressed model, which stays."""
    flags = {"arm": arm, **common.recovery}
    recipe = recovery_recipe(common.load(), flags, common.settings.get("recovery", {}))
    target = output_folder(recipe, Path("runs/recovered"))
    preflight.check_inputs(recipe.run, data=True, calibration=False)
    done = preflight.completed_by_same_recipe(target, recipe, common.resume)
    if common.dry_run:
        run = {"model": preflight.model_facts(recipe.run.model), "data": recipe.run.data, "arm": recipe.recovery.arm}
        print_plan(common, recipe, target, done, {**run, "steps": recipe.recovery.least_steps})
        return
    with common.working() as progress:
        from mopcompress.entrypoints.recover import recover as train
        from mopcompress.entrypoints.unchanged_inputs import verify_finished

        facts = (
            verify_finished(target, recipe, progress)
            if done
            else train(recipe, target, seed=recipe.run.seed, progress=progress)
        )
    if int(os.environ.get("RANK", "0")):
        return  # of several processes the first one prints
    shown = ("arm", "trained_parameters", "train_steps", "train_seconds", "final_nats", "adapter_bytes")
    print_result(common, target, facts, shown)


@command(app, MODEL, MACHINE, BATCH, DATA, GENERATION, DRY_RUN, VERBOSITY, parts=("run",), unused=NOT_FOR_ADAPTERS)
def evaluate(
    common: Common,
    adapter: Adapter = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of the lm-evaluation-harness, in place of the test rows.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own, as the harness defines them.")
    ] = None,
) -> None:
    """Score a model on the test rows, with or without an adapter: perplexity, exact match, and written answers."""
    if lm_eval_path and lm_eval is None:
        raise UsageError("--lm-eval-path: has no effect without --lm-eval; name its tasks, or leave it out")
    of_rows = [f"--{name.replace('_', '-')}" for name in (*DATA, *GENERATION) if common.run.get(name) is not None]
    of_rows += [
        f"--set run.{name}" for name in common.settings.get("run", {}) if field_name(RunSpec, name) in ROW_FIELDS
    ]
    if lm_eval and of_rows:
        raise UsageError(
            f"{of_rows[0]}: has no effect with --lm-eval, whose tasks have rows of their own; leave it out"
        )
    recipe = common.load()
    preflight.check_inputs(recipe.run, data=lm_eval is None, calibration=False)
    if common.dry_run:
        run = {"model": preflight.model_facts(recipe.run.model), "data": recipe.run.data}
        print_plan(common, recipe, None, False, {**run, "adapter": str(adapter) if adapter else None})
        return
    with common.working() as progress:
        if lm_eval is None:
            from mopcompress.entrypoints.evaluate import evaluate_folder

            summary = evaluate_folder(recipe, adapter, progress=progress)
        else:
            from mopcompress.entrypoints.evaluate_lm_eval import evaluate_tasks

            summary = evaluate_tasks(recipe, adapter, lm_eval.split(","), lm_eval_path, progress=progress)
    if common.json:
        print_json(summary)
    elif lm_eval is None:
        print_scores(summary)
    else:
        print_harness(summary)


@command(
    app,
    MODEL,
    MACHINE,
    BATCH,
    GRID,
    STEPS,
    DATA,
    GENERATION,
    CALIBRATION,
    OUTPUT,
    DRY_RUN,
    VERBOSITY,
    parts=tuple(PARTS),
)
def bench(common: Common) -> None:
    """Run the grid setting x arm x seed, and report. Run it again to resume it, or with a larger grid."""
    recipe = bench_recipe(common.load(), common.recovery, common.settings)
    if recipe.run.backend != OURS:
        raise RecipeError(f"run.backend: bench has no {recipe.run.backend}; prune with it, then evaluate its folder")
    folder = output_folder(recipe, Path("runs/bench"))
    preflight.check_inputs(recipe.run, data=True, calibration=True)
    preflight.check_bench_folder(folder, recipe, common.resume)
    preflight.check_grid(recipe)
    if common.dry_run:
        run = {"model": preflight.model_facts(recipe.run.model), "data": recipe.run.data}
        print_plan(common, recipe, folder, False, {**run, **preflight.bench_facts(recipe, folder)})
        return
    with common.working() as progress:
        from mopcompress.entrypoints.bench.runner import bench as run_grid

        rows = run_grid(recipe, folder, command=shlex.join(["mopcompress", *sys.argv[1:]]), progress=progress)
    report = folder / "report.html"
    if common.json:
        print_json({"rows": [asdict(row) for row in rows], "report": str(report)})
    else:
        print_bench(rows)
        typer.echo(report)
