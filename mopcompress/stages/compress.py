"""`prune` and `quantize`: a dense folder in, a compressed folder that stock `from_pretrained` loads out."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mopcompress import artifact
from mopcompress.compress.compression import Compression, Step
from mopcompress.compress.walk import LayerRow, compress_block, linears_of, planned
from mopcompress.errors import QualityGateError
from mopcompress.models.checkpoint import (
    check_folder,
    check_output,
    copy_other_files,
    load_tokenizer,
    resolve_model,
    weights_bytes,
    weights_hash,
)
from mopcompress.models.grid import FILE as GRID
from mopcompress.models.grid import write_grid
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.streaming import StreamedModel
from mopcompress.recipe import (
    ALPSModifier,
    GPTQModifier,
    Recipe,
    SparseGPTModifier,
    resolved,
)
from mopcompress.recipe.modifiers import Masking, Pruning, StructuredPruningModifier
from mopcompress.stages.calibration import calibration_tokens
from mopcompress.stages.fitting import check_fit
from mopcompress.stages.narrow import narrow_into
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.provenance import choose_device, peak_bytes, provenance
from mopcompress.stages.shares import with_shares
from mopcompress.stages.unfinished import Unfinished, unfinished

Compressing = Masking | GPTQModifier


def compress(
    recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Compress the recipe's model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `QualityGateError` when too many matrices needed more damping than asked for; then nothing is published.
    """
    source = resolve_model(recipe.run.model, progress=lambda line: progress(line, 0, 0))
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
) -> dict[str, Any]:
    """Compress a folder, block by block, into another; work that was stopped before goes on where it was.

    Structured pruning, which stands alone, makes matrices smaller, and begins anew.
    """
    device = choose_device(recipe.run.device)
    masking = [one for one in modifiers if not isinstance(one, StructuredPruningModifier)]
    for one in modifiers:
        if isinstance(one, StructuredPruningModifier):
            return narrow_into(target, source, one, tokens, calibration, recipe, progress=progress)
    streamed = StreamedModel(source, load_tokenizer(source), tokens, device=device)
    check_fit(_inputs_of(streamed.model), masking)
    compressions = [
        with_shares(compression_of(one), one, streamed.model, tokens.to(device), present=streamed.block)
        for one in masking
    ]
    steps = planned(streamed.model, compressions)
    method = "+".join(modifier.method for modifier in masking)
    base = {"folder": str(source), "sha256": weights_hash(source)}
    made_by = provenance(device)
    asked = {
        "model": base["sha256"],
        "calibration": calibration["sha256"],
        "compressions": {str(number): asdict(one) for number, one in enumerate(compressions, start=1)},
        "versions": made_by["versions"],
        "commit": made_by["commit"],
        "device": made_by["device"],
    }
    with unfinished(target, source, asked, streamed.places, lambda line: progress(line, 0, 0)) as job:
        _run(streamed, tokens.to(device), steps, job, _told(progress, method))
        facts: dict[str, Any] = {
            "kind": "compressed model",
            "method": method,
            "allocation": "+".join(one.allocation for one in compressions),
            "base": base,
            **_counts(job.rows, recipe.run.max_fallback),
            "compress_seconds": job.seconds,
            "peak_bytes": peak_bytes(),
            "calibration": calibration,
            "recipe": resolved(recipe),
            **made_by,
        }
        with artifact.publish(target, facts) as scratch:
            job.give(scratch)
            copy_other_files(source, scratch)
            _write_grid(scratch, job.scales, masking)
            lines = [json.dumps(asdict(row)) for row in job.rows]
            artifact.write_whole(scratch / "layers.jsonl", "\n".join(lines) + "\n")
            facts["model_bytes"] = weights_bytes(scratch)
            facts["sha256"] = weights_hash(scratch)
    return facts


def _run(
    streamed: StreamedModel,
    tokens: Int[Tensor, "samples length"],
    steps: Sequence[Step],
    job: Unfinished,
    told: Callable[[LayerRow], None],
) -> None:
    """Compress the blocks that are not finished yet."""
    for index in range(job.done, len(streamed.model.blocks)):
        start = time.perf_counter()
        with streamed.block(index):
            dtype = streamed.dtype_of(index)
            block = compress_block(streamed.model, tokens, job.hidden, index, steps, dtype=dtype)
            job.finish(index, block, streamed.stored(index), time.perf_counter() - start)
        for row in block.rows:
            told(row)


def _counts(rows: Sequence[LayerRow], max_fallback: float) -> dict[str, Any]:
    """What was counted over all compressed linears. Raises `QualityGateError` when too many are worse than asked."""
    fallbacks = sum(row.escalations > 0 for row in rows)
    if fallbacks > max_fallback * len(rows):
        raise QualityGateError(
            f"{fallbacks} of {len(rows)} matrices needed more damping than asked for, --max-fallback allows "
            f"{max_fallback:g} of them; calibrate on more tokens, or allow it: the work is kept"
        )
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    unreached = [row.name for row in rows if not row.methods]  # experts that are as they were
    return {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "fallbacks": fallbacks,
        "unreached": unreached,
    }


def compression_of(modifier: Compressing) -> Compression:
    """A modifier's settings in the words of the method's function."""
    options: dict[str, object]
    if isinstance(modifier, GPTQModifier):
        options = {
            "bits": modifier.bits,
            "group_size": modifier.group_size,
            "damping": modifier.dampening_frac,
            "block_size": modifier.block_size,
            "act_order": modifier.actorder == "static",
            "keep_zeros": True,  # of pruning before; a dense model has hardly any
            "sparsity": modifier.sparsity,
            "pattern": modifier.pattern,
        }
    else:
        options = {"sparsity": modifier.sparsity, "pattern": modifier.pattern}
    if isinstance(modifier, SparseGPTModifier):
        options |= {
            "block_size": modifier.block_size,
            "damping": modifier.dampening_frac,
            "keep_zeros": modifier.preserve_sparsity_mask,
        }
    if isinstance(modifier, ALPSModifier):
        options |= {
            "damping": modifier.dampening_frac,
            "steps": modifier.iterations,
            "refit_steps": modifier.refit_steps,
            "keep_zeros": modifier.preserve_sparsity_mask,
        }
    return Compression(
        method=modifier.method,
        options=options,
        targets=modifier.targets,
        ignore=modifier.ignore,
        match_dense=modifier.match_dense,
        refit_steps=0 if isinstance(modifier, GPTQModifier | ALPSModifier) else modifier.refit_steps,
    )


def _inputs_of(model: LanguageModel) -> dict[str, int]:
    every = [(name, linear) for index in range(len(model.blocks)) for linear, name in linears_of(model, index).items()]
    return {name: one.weight.shape[0 if isinstance(one, Conv1D) else 1] for name, one in every}


def _told(progress: Progress, method: str) -> Callable[[LayerRow], None]:
    what = f"{method}: calibrating and compressing block by block"
    return lambda row: progress(what, row.block + 1, row.blocks)


def _write_grid(folder: Path, scales: Mapping[str, Tensor], modifiers: Sequence[Compressing]) -> None:
    """One file holds one kind of grid: a model with two of them cannot be exported without rounding anew."""
    grids = {(one.bits, one.group_size) for one in modifiers if isinstance(one, GPTQModifier)}
    if len(grids) == 1 and scales:
        bits, group_size = grids.pop()
        write_grid(folder / GRID, scales, bits=bits, group_size=group_size)
