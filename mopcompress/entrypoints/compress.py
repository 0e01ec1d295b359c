"""`prune` and `quantize`: a dense folder in, a compressed folder that stock `from_pretrained` loads out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mopcompress.compress.checkpoint import CompressionCheckpoint, resumable_compression
from mopcompress.compress.plan import PlannedMethod
from mopcompress.compress.sequential import LayerRow, compress_block, linears_of, plan_methods
from mopcompress.entrypoints.allocate_sparsity import allocate_sparsity
from mopcompress.entrypoints.compress_structured import compress_structured_into
from mopcompress.entrypoints.compressed_folder import (
    check_fallbacks,
    mask_facts,
    published,
    request_facts,
    write_repair_file,
    write_scales,
)
from mopcompress.entrypoints.from_recipe import method_config, repair_config
from mopcompress.entrypoints.inputs import calibration_tokens, check_calibration
from mopcompress.entrypoints.shape_checks import check_not_repaired, check_shapes
from mopcompress.environment import choose_device, peak_bytes, provenance
from mopcompress.errors import RecipeError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import (
    check_folder,
    check_output,
    copy_other_files,
    load_tokenizer,
    resolve_model,
    weights_hash,
)
from mopcompress.models.modules import weight_of
from mopcompress.models.streaming import StreamedModel
from mopcompress.progress import Progress, silent
from mopcompress.recipe import (
    GPTQModifier,
    Recipe,
)
from mopcompress.recipe.pruning_modifiers import Pruning, StructuredPruningModifier


def compress(
    recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Compress the recipe's model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `QualityGateError` when too many matrices needed more damping than asked for; then nothing is published.
    """
    source = resolve_model(recipe.run.model, progress=progress.message)
    check_output(target, source)
    check_folder(source)
    tokens, calibration = calibration_tokens(recipe.run, source, weights_hash(source), progress)
    return compress_into(target, source, modifiers, tokens, calibration, recipe, progress=progress)


def compress_into(
    target: Path,
    source: Path,
    modifiers: Sequence[Pruning | GPTQModifier],
    tokens: Int[Tensor, "samples length"],
    calibration: dict[str, Any],
    recipe: Recipe,
    *,
    progress: Progress,
    restart_on_mismatch: bool = False,
) -> dict[str, Any]:
    """Compress a folder, block by block, into another; work that was stopped before goes on where it was.

    Work of another job, such as of other code, is refused, or removed with `restart_on_mismatch`.
    Structured pruning, which stands alone, makes matrices smaller, and begins anew.
    """
    check_not_repaired(source)
    structured = next((one for one in modifiers if isinstance(one, StructuredPruningModifier)), None)
    repair = [] if recipe.repair is None else [recipe.repair]
    if structured and repair:
        raise RecipeError("LowRankRepairModifier: structured pruning makes no repair; leave one of them out")
    if structured:
        return compress_structured_into(target, source, structured, tokens, calibration, recipe, progress=progress)
    device = choose_device(recipe.run.device)
    masking = [one for one in modifiers if not isinstance(one, StructuredPruningModifier)]
    streamed = StreamedModel(source, load_tokenizer(source), tokens, device=device)
    check_calibration(tokens, streamed.model)
    check_shapes(_shapes_of(streamed.model), masking, recipe.repair)
    compressions = [
        allocate_sparsity(method_config(one), one, streamed.model, tokens.to(device), present=streamed.block)
        for one in masking
    ]
    steps = plan_methods(streamed.model, [*compressions, *map(repair_config, repair)])
    requested, made_by = request_facts(source, [*modifiers, *repair], calibration, recipe), provenance(device)
    asked = _job(requested, made_by, steps)
    with resumable_compression(
        target, source, asked, streamed.locations, progress.message, restart_on_mismatch=restart_on_mismatch
    ) as job:
        _run(streamed, tokens.to(device), steps, job, _block_progress(progress, requested["method"]))
        facts: dict[str, Any] = {
            **requested,
            "allocation": "+".join(one.allocation for one in compressions),
            **mask_facts(job.rows),
            "fallbacks": check_fallbacks(job.rows, recipe.run.max_fallback_fraction, ": the work is kept"),
            "unreached": [row.name for row in job.rows if not row.methods],  # experts that are as they were
            "compress_seconds": job.seconds,
            "peak_bytes": peak_bytes(),
            **made_by,
        }
        with published(target, facts, job.rows) as scratch:
            job.give(scratch)
            copy_other_files(source, scratch)
            write_scales(
                scratch, job.scales, [(one.bits, one.group_size) for one in masking if isinstance(one, GPTQModifier)]
            )
            facts["repair"] = write_repair_file(scratch, job.repairs)
    return facts


def _job(requested: dict[str, Any], made_by: dict[str, Any], steps: Sequence[PlannedMethod]) -> dict[str, Any]:
    """All that a block's result depends on: work that was stopped goes on only where this is the same."""
    return {
        "model": requested["base"]["sha256"],
        "calibration": requested["calibration"]["sha256"],
        "compressions": {
            str(number): asdict(one) for number, one in enumerate([step.compression for step in steps], start=1)
        },
        **{name: made_by[name] for name in ("versions", "commit", "device")},
    }


def _run(
    streamed: StreamedModel,
    tokens: Int[Tensor, "samples length"],
    steps: Sequence[PlannedMethod],
    job: CompressionCheckpoint,
    told: Callable[[LayerRow], None],
) -> None:
    """Compress the blocks that are not finished yet."""
    for index in range(job.done, len(streamed.model.blocks)):
        start = time.perf_counter()
        with streamed.block(index):
            dtype = streamed.stored_dtype(index)
            block = compress_block(streamed.model, tokens, job.hidden, index, steps, dtype=dtype)
            job.finish(index, block, streamed.weights_to_store(index), time.perf_counter() - start)
        for row in block.rows:
            told(row)


def _shapes_of(model: LanguageModel) -> dict[str, tuple[int, int]]:
    every = [(name, linear) for index in range(len(model.blocks)) for linear, name in linears_of(model, index).items()]
    return {name: (weight_of(one).shape[0], weight_of(one).shape[1]) for name, one in every}


def _block_progress(progress: Progress, method: str) -> Callable[[LayerRow], None]:
    what = f"{method}: calibrating and compressing block by block"
    return lambda row: progress.update(what, row.block + 1, row.blocks)
