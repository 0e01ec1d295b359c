"""`prune --method structured`: a dense folder in, a folder of a smaller model out, which stock `from_pretrained` loads.

The model is in memory as a whole, and a stopped run begins anew.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mopcompress.compress.sequential import linears_of
from mopcompress.compress.structured import StructuredRow, prune_structured
from mopcompress.entrypoints.compressed_folder import check_fallbacks, published, request_facts
from mopcompress.entrypoints.from_recipe import structured_config
from mopcompress.entrypoints.inputs import check_calibration
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
    tokens: Int[Tensor, "samples length"],
    calibration: dict[str, Any],
    recipe: Recipe,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Narrow a folder's model into another folder; returns the manifest.

    Raises `QualityGateError` when too many matrices needed more damping than asked for; then nothing is written.
    """
    device = choose_device(recipe.run.device)
    model = load_model(source, device=device)
    check_calibration(tokens, model)
    parameters, weights = model.network.num_parameters(), _weights(model)
    start = time.perf_counter()
    done = prune_structured(model, tokens.to(device), structured_config(modifier), progress=_block_progress(progress))
    seconds = time.perf_counter() - start
    facts: dict[str, Any] = {
        **request_facts(source, [modifier], calibration, recipe),
        "weights": weights,
        "sparsity": 1 - _weights(model) / weights,
        "channels": _counted(done.rows, "channels", modifier.mlp_sparsity),
        "kv_groups": _counted(done.rows, "kv_groups", modifier.head_sparsity),
        "parameters": {"before": parameters, "after": model.network.num_parameters()},
        "base_bytes": weights_bytes(source),
        "fallbacks": check_fallbacks(done.rows, recipe.run.max_fallback_fraction),
        "compress_seconds": seconds,
        "peak_bytes": peak_bytes(),
        **provenance(device),
    }
    with published(target, facts, done.rows) as scratch:
        save_model(model, source, scratch)
        if done.sizes:
            write_config_sizes(scratch, done.sizes)
        _check_written(scratch, model)
    return facts


def _weights(model: LanguageModel) -> int:
    """Weights of all linears in the blocks."""
    blocks = range(len(model.blocks))
    return sum(linear.weight.numel() for index in blocks for linear in linears_of(model, index))


def _counted(rows: Sequence[StructuredRow], kind: str, share: float) -> dict[str, Any] | None:
    """How many a block had and has, and the share that was asked for; None when none were to go."""
    counts = {(row.before, row.after) for row in rows if row.kind == kind}
    if not counts:
        return None
    [(before, after)] = counts  # equally many in every block
    return {"before": before, "after": after, "removed_share": 1 - after / before, "asked_share": share}


def _block_progress(progress: Progress) -> Callable[[StructuredRow], None]:
    return lambda row: progress.update(
        "structured: calibrating and narrowing block by block", row.block + 1, row.blocks
    )


def _check_written(folder: Path, model: LanguageModel) -> None:
    """Load what was written as anybody would, and compare every weight with the one in memory."""
    dtype = stored_dtype(folder)
    read = load_model(folder, device=torch.device("cpu")).network.state_dict()
    for name, weight in model.network.state_dict().items():
        wanted = weight.to(dtype).to(weight.dtype) if weight.is_floating_point() else weight
        if not torch.equal(read[name], wanted.cpu()):
            raise StorageError(f"{folder}: {name} was not written as it is in memory; run again on another disk")
