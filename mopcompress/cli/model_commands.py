"""The commands that make and measure models. Each checks all that is cheap, then tells its plan or runs one stage.

Stages are imported inside the commands: torch takes seconds to load, and a wrong flag should not wait for it.
"""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mopcompress.cli.command import Common, command
from mopcompress.cli.options import (
    BACKEND,
    BATCH,
    CALIBRATION,
    DATA,
    DRY_RUN,
    GENERATION,
    GRID,
    MACHINE,
    MODEL,
    OUTPUT,
    RECOVERY,
    STEPS,
    TRAINING_DATA,
    VERBOSITY,
)
from mopcompress.cli.output import print_bench, print_facts, print_harness, print_json, print_scores
from mopcompress.entrypoints import preflight
from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe import GPTQModifier, Recipe, RunSpec, recipe_to_dict
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.overrides import bench_recipe, pruning_recipe, quantization_recipe, recovery_recipe
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.recipe.run_spec import OURS, PRUNING_METHODS
from mopcompress.recipe.settings import PARTS
from mopcompress.recipe.validation_errors import field_name

app = typer.Typer(
    name="mopcompress",
    help="Compress a causal language model, then win back what it lost with a Mixture of Prompts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it would show the values of variables, and those can hold tokens
    context_settings={"help_option_names": ["-h", "--help"]},
)
RepairRank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Rank of a matrix beside each compressed linear that repairs its outputs (default none)"
    ),
]
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
NARROWED = ("channels", "kv_groups", "parameters")  # what structured pruning counts besides
Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Adapter that `recover` wrote for this model.")]


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
    target = _target(recipe, default)
    preflight.check_inputs(recipe.run, data=False, calibration=True)
    done = preflight.completed_by_same_recipe(target, recipe, common.resume)
    modifiers = [one for one in recipe.modifiers(Spec) if isinstance(one, Pruning | GPTQModifier)]
    preflight.check_recipe_shapes(recipe, modifiers)
    if common.dry_run:
        model = preflight.model_facts(recipe.run.model)
        methods = "+".join([one.method for one in modifiers] + ([recipe.repair.method] if recipe.repair else []))
        print_plan(common, recipe, target, done, {"model": model, "methods": methods, "disk_bytes": model["bytes"]})
        return
    with common.working() as progress:
        if recipe.run.backend == OURS:
            from mopcompress.entrypoints.compress import compress
        else:
            from mopcompress.entrypoints.compress_external import compress_external as compress
        from mopcompress.entrypoints.finished_inputs import verify_finished

        facts = (
            verify_finished(target, recipe, progress)
            if done
            else compress(recipe, modifiers, target, progress=progress)
        )
    shown = ("method", "sparsity", "weights", *NARROWED, "repair", "fallbacks", "compress_seconds", "model_bytes")
    _print_result(common, target, facts, shown)


@command(app, MODEL, MACHINE, BATCH, RECOVERY, TRAINING_DATA, OUTPUT, DRY_RUN, VERBOSITY, parts=("run", "recovery"))
def recover(
    common: Common,
    arm: Annotated[str | None, typer.Option(metavar="NAME", help=f"{', '.join(ARM_DEFAULTS)} (default mop)")] = None,
) -> None:
    """Train an adapter (a Mixture of Prompts, or another arm) for a compressed model, which stays."""
    flags = {"arm": arm, **common.recovery}
    recipe = recovery_recipe(common.load(), flags, common.settings.get("recovery", {}))
    target = _target(recipe, Path("runs/recovered"))
    preflight.check_inputs(recipe.run, data=True, calibration=False)
    done = preflight.completed_by_same_recipe(target, recipe, common.resume)
    if common.dry_run:
        run = {"model": preflight.model_facts(recipe.run.model), "data": recipe.run.data, "arm": recipe.recovery.arm}
        print_plan(common, recipe, target, done, {**run, "steps": recipe.recovery.least_steps})
        return
    with common.working() as progress:
        from mopcompress.entrypoints.finished_inputs import verify_finished
        from mopcompress.entrypoints.recover import recover as train

        facts = (
            verify_finished(target, recipe, progress)
            if done
            else train(recipe, target, seed=recipe.run.seed, progress=progress)
        )
    if int(os.environ.get("RANK", "0")):
        return  # of several processes the first one speaks
    shown = ("arm", "trained_parameters", "train_steps", "train_seconds", "final_nats", "adapter_bytes")
    _print_result(common, target, facts, shown)


@command(app, MODEL, MACHINE, BATCH, DATA, GENERATION, DRY_RUN, VERBOSITY, parts=("run",))
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
    folder = _target(recipe, Path("runs/bench"))
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


def _target(recipe: Recipe, default: Path) -> Path:
    return Path(recipe.run.output_dir).expanduser() if recipe.run.output_dir else default


def print_plan(common: Common, recipe: Recipe, target: Path | None, done: bool, facts: dict[str, Any]) -> None:
    """Print the plan; the resolved recipe only in JSON."""
    state = None if target is None else f"{target}, done already" if done else str(target)
    if common.json:
        output = {"output": str(target) if target else None, "done": done, "recipe": recipe_to_dict(recipe)}
        print_json({**facts, **output})
    else:
        print_facts({**facts, "output": state})


def _print_result(common: Common, target: Path, facts: dict[str, Any], shown: tuple[str, ...]) -> None:
    if common.json:
        print_json({"output": str(target), **facts})
    else:
        print_facts({**{name: facts.get(name) for name in shown}, "output": str(target)})
