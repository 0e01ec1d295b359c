"""`prune --method structured`: from a dense folder to a folder of a smaller model that stock `from_pretrained` loads.

The model is in memory as a whole, and an interrupted run starts anew.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mopcompress.compress.sequential import linears_of
from mopcompress.compress.structured import StructuredRow, prune_structured
from mopcompress.entrypoints.compressed_folder import check_fallbacks, publish_model, request_metadata
from mopcompress.entrypoints.from_recipe import structured_config
from mopcompress.entrypoints.inputs import CalibrationSet, check_calibration
from mopcompress.environment import choose_device, peak_bytes, provenance
from mopcompress.errors import StorageError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, save_model, stored_dtype, weights_bytes
from mopcompress.models.resizing import write_config_sizes
from mopcompress.progress import Progress
from mopcompress.recipe import Recipe, StructuredPruningModifier


def compress_structured_into(
    target: Path,
    source: Path,
    modifier: StructuredPruningModifier,
    calibration: CalibrationSet,
    recipe: Recipe,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Remove channels and heads of the model in `source`, and write it to `target`; returns the manifest.

    Raises `QualityGateError`, and writes nothing, when too many matrices needed more damping than asked for.
    """
    device = choose_device(recipe.run.device)
    model = load_model(source, device=device)
    check_calibration(calibration, model)
    parameters, weights = model.network.num_parameters(), _count_weights(model)
    start = time.perf_counter()
    result = prune_structured(
        model, calibration.tokens.to(device), structured_config(modifier), progress=_block_progress(progress)
    )
    seconds = time.perf_counter() - start
    metadata: dict[str, Any] = {
        **request_metadata(source, [modifier], calibration, recipe),
        "weights": weights,
        "sparsity": 1 - _count_weights(model) / weights,
        "channels": _count_groups(result.rows, "channels", modifier.mlp_sparsity),
        "kv_groups": _count_groups(result.rows, "kv_groups", modifier.head_sparsity),
        "parameters": {"before": parameters, "after": model.network.num_parameters()},
        "base_bytes": weights_bytes(source),
        "fallbacks": check_fallbacks(result.rows, recipe.run.max_fallback_fraction),
        "compress_seconds": seconds,
        "peak_bytes": peak_bytes(),
        **provenance(device),
    }
    with publish_model(target, metadata, result.rows) as scratch:
        save_model(model, source, scratch)
        if result.sizes:
            write_config_sizes(scratch, result.sizes)
        _check_saved(scratch, model)
    return metadata


def _count_weights(model: LanguageModel) -> int:
    """Count the weights of all linears in the blocks."""
    blocks = range(len(model.blocks))
    return sum(linear.weight.numel() for index in blocks for linear in linears_of(model, index))


def _count_groups(rows: Sequence[StructuredRow], kind: str, sparsity: float) -> dict[str, Any] | None:
    """Count the channels or heads of a block before and after; None when none were to be removed."""
    counts = {(row.before, row.after) for row in rows if row.kind == kind}
    if not counts:
        return None
    [(before, after)] = counts  # equally many in every block
    return {"before": before, "after": after, "removed_share": 1 - after / before, "asked_share": sparsity}


def _block_progress(progress: Progress) -> Callable[[StructuredRow], None]:
    return lambda row: progress.update(
        "structured: calibrating and narrowing block by block", row.block + 1, row.blocks
    )


def _check_saved(folder: Path, model: LanguageModel) -> None:
    """Load the folder as any user would, and compare every weight with the one in memory."""
    dtype = stored_dtype(folder)
    loaded = load_model(folder, device=torch.device("cpu")).network.state_dict()
    for name, weight in model.network.state_dict().items():
        expected = weight.to(dtype).to(weight.dtype) if weight.is_floating_point() else weight
        if not torch.equal(loaded[name], expected.cpu()):
            raise StorageError(f"{folder}: {name} was not written as it is in memory; run again on another disk")
