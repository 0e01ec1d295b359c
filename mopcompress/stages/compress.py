"""`prune` and `quantize`: a dense folder in, a compressed folder that stock `from_pretrained` loads out."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mopcompress import artifact
from mopcompress.compress.compression import Compression
from mopcompress.compress.walk import LayerRow, compress_model, linears_of
from mopcompress.errors import DataError, QualityGateError, StorageError
from mopcompress.models.checkpoint import (
    check_output,
    load_model,
    resolve_model,
    save_model,
    weights_bytes,
    weights_hash,
)
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.weight_files import weight_files
from mopcompress.recipe import (
    ALPSModifier,
    GPTQModifier,
    Recipe,
    SparseGPTModifier,
    resolved,
)
from mopcompress.recipe.modifiers import Pruning
from mopcompress.stages.calibration import calibration_tokens
from mopcompress.stages.fitting import check_fit
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.provenance import choose_device, provenance
from mopcompress.stages.shares import with_shares

Compressing = Pruning | GPTQModifier


def compress(
    recipe: Recipe, modifiers: Sequence[Compressing], target: Path, *, progress: Progress = silent
) -> dict[str, Any]:
    """Compress the recipe's model by `modifiers`, in order, into `target`; returns the manifest.

    Raises `QualityGateError` when too many matrices needed more damping than asked for; then nothing is written.
    """
    source = resolve_model(recipe.run.model, progress=lambda line: progress(line, 0, 0))
    check_output(target, source)
    model = load_model(source, device=choose_device(recipe.run.device))
    tokens, calibration = calibration_tokens(recipe.run, model, weights_hash(source), progress)
    return compress_into(target, model, source, modifiers, tokens, calibration, recipe, progress=progress)


def compress_into(
    target: Path,
    model: LanguageModel,
    source: Path,
    modifiers: Sequence[Compressing],
    tokens: Int[Tensor, "samples length"],
    calibration: dict[str, Any],
    recipe: Recipe,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Compress a loaded model, in place, and publish it as a folder."""
    check_fit(_inputs_of(model), modifiers)
    start = time.perf_counter()
    method = "+".join(modifier.method for modifier in modifiers)
    compressions = [with_shares(compression_of(one), one, model, tokens) for one in modifiers]
    rows = compress_model(model, tokens, compressions, progress=_told(progress, method))
    seconds = time.perf_counter() - start
    fallbacks = sum(row.escalations > 0 for row in rows)
    if fallbacks > recipe.run.max_fallback * len(rows):
        raise QualityGateError(
            f"{fallbacks} of {len(rows)} matrices needed more damping than asked for, --max-fallback allows "
            f"{recipe.run.max_fallback:g} of them; calibrate on more tokens, or allow it"
        )
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    facts: dict[str, Any] = {
        "kind": "compressed model",
        "method": method,
        "base": {"folder": str(source), "sha256": weights_hash(source)},
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "fallbacks": fallbacks,
        "compress_seconds": seconds,
        "calibration": calibration,
        "recipe": resolved(recipe),
        **provenance(model.device),
    }
    with artifact.publish(target, facts) as scratch:
        save_model(model, source, scratch)
        _check_written(scratch, model, rows)
        lines = [json.dumps(asdict(row)) for row in rows]
        artifact.write_whole(scratch / "layers.jsonl", "\n".join(lines) + "\n")
        facts["model_bytes"] = weights_bytes(scratch)
        facts["sha256"] = weights_hash(scratch)
    return facts


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


def _check_written(folder: Path, model: LanguageModel, rows: Sequence[LayerRow]) -> None:
    """Re-open what was written and compare it with the weights in memory, so that success is not just assumed."""
    weights = dict(model.network.state_dict())
    seen = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                written = file.get_tensor(name)
                if name in weights and not torch.equal(written, weights[name].to(written.dtype).cpu()):
                    raise StorageError(f"{path}: {name} was not written as it is in memory; run again on another disk")
                seen.add(name)
    missing = {f"{row.name}.weight" for row in rows} - seen
    if missing:
        raise DataError(f"{folder}: {min(missing)} was not written; this model's weights cannot be stored as they are")
