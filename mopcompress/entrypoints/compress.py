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
    count_zeros,
    publish_model,
    request_metadata,
    write_repair_file,
    write_scales,
)
from mopcompress.entrypoints.from_recipe import method_config, repair_config
from mopcompress.entrypoints.inputs import CalibrationSet, check_calibration, load_calibration
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
from mopcompress.recipe import GPTQModifier, Recipe
from mopcompress.recipe.pruning_modifiers import Pruning, StructuredPruningModifier


def compress(
    recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Compress the recipe's model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `QualityGateError`, and publishes nothing, when too many matrices needed more damping than asked for.
    """
    source = resolve_model(recipe.run.model, progress=progress.message)
    check_output(target, source)
    check_folder(source)
    calibration = load_calibration(recipe.run, source, weights_hash(source), progress)
    return compress_into(target, source, modifiers, calibration, recipe, progress=progress)


def compress_into(
    target: Path,
    source: Path,
    modifiers: Sequence[Pruning | GPTQModifier],
    calibration: CalibrationSet,
    recipe: Recipe,
    *,
    progress: Progress,
    restart_on_mismatch: bool = False,
) -> dict[str, Any]:
    """Compress the model in `source`, block by block, into `target`; an interrupted run of the same job is resumed.

    Work of another job, such as of other code, raises `OutputError`; `restart_on_mismatch` deletes it instead.
    Structured pruning works on the whole model, in one go.
    """
    check_not_repaired(source)
    structured = next((modifier for modifier in modifiers if isinstance(modifier, StructuredPruningModifier)), None)
    if structured and recipe.repair:
        raise RecipeError("LowRankRepairModifier: structured pruning makes no repair; leave one of them out")
    if structured:
        return compress_structured_into(target, source, structured, calibration, recipe, progress=progress)
    device = choose_device(recipe.run.device)
    masking = [modifier for modifier in modifiers if not isinstance(modifier, StructuredPruningModifier)]
    repair = [] if recipe.repair is None else [recipe.repair]
    tokens = calibration.tokens.to(device)
    streamed = StreamedModel(source, load_tokenizer(source), calibration.tokens, device=device)
    check_calibration(calibration, streamed.model)
    check_shapes(_linear_shapes(streamed.model), masking, recipe.repair)
    configs = [
        allocate_sparsity(method_config(modifier), modifier, streamed.model, tokens, present=streamed.block)
        for modifier in masking
    ]
    methods = plan_methods(streamed.model, [*configs, *map(repair_config, repair)])
    request = request_metadata(source, [*modifiers, *repair], calibration, recipe)
    origin = provenance(device)
    with resumable_compression(
        target,
        source,
        _job(request, origin, methods),
        streamed.locations,
        progress.message,
        restart_on_mismatch=restart_on_mismatch,
    ) as checkpoint:
        _compress_blocks(streamed, tokens, methods, checkpoint, _block_progress(progress, request["method"]))
        metadata: dict[str, Any] = {
            **request,
            "allocation": "+".join(config.allocation for config in configs),
            **count_zeros(checkpoint.rows),
            "fallbacks": check_fallbacks(checkpoint.rows, recipe.run.max_fallback_fraction, ": the work is kept"),
            "unreached": [row.name for row in checkpoint.rows if not row.methods],  # experts that no token reached
            "compress_seconds": checkpoint.seconds,
            "peak_bytes": peak_bytes(),
            **origin,
        }
        with publish_model(target, metadata, checkpoint.rows) as scratch:
            checkpoint.publish_weights(scratch)
            copy_other_files(source, scratch)
            write_scales(scratch, checkpoint.scales, masking)
            metadata["repair"] = write_repair_file(scratch, checkpoint.repairs)
    return metadata


def _job(request: dict[str, Any], origin: dict[str, Any], methods: Sequence[PlannedMethod]) -> dict[str, Any]:
    """Return all that the result of a block depends on: interrupted work is only resumed by an equal job."""
    configs = [method.config for method in methods]
    return {
        "model": request["base"]["sha256"],
        "calibration": request["calibration"]["sha256"],
        "compressions": {str(number): asdict(config) for number, config in enumerate(configs, start=1)},
        **{name: origin[name] for name in ("versions", "commit", "device")},
    }


def _compress_blocks(
    streamed: StreamedModel,
    tokens: Int[Tensor, "samples length"],
    methods: Sequence[PlannedMethod],
    checkpoint: CompressionCheckpoint,
    on_row: Callable[[LayerRow], None],
) -> None:
    """Compress the blocks that the checkpoint does not have yet."""
    for index in range(checkpoint.blocks_done, len(streamed.model.blocks)):
        start = time.perf_counter()
        with streamed.block(index):
            dtype = streamed.stored_dtype(index)
            block = compress_block(streamed.model, tokens, checkpoint.hidden, index, methods, dtype=dtype)
            checkpoint.save_block(index, block, streamed.weights_to_store(index), time.perf_counter() - start)
        for row in block.rows:
            on_row(row)


def _linear_shapes(model: LanguageModel) -> dict[str, tuple[int, int]]:
    """Return `(out, in)` of every linear in the blocks, by name."""
    named = [(name, linear) for index in range(len(model.blocks)) for linear, name in linears_of(model, index).items()]
    return {name: (weight_of(linear).shape[0], weight_of(linear).shape[1]) for name, linear in named}


def _block_progress(progress: Progress, method: str) -> Callable[[LayerRow], None]:
    label = f"{method}: calibrating and compressing block by block"
    return lambda row: progress.update(label, row.block + 1, row.blocks)
