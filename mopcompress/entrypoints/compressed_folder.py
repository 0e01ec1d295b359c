"""The folder that compression writes, with our methods or another library's: manifest, layer rows, scales, repair."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mopcompress.compress.sequential import LayerRow
from mopcompress.compress.structured import StructuredRow
from mopcompress.entrypoints.inputs import CalibrationSet
from mopcompress.errors import QualityGateError
from mopcompress.models.model_loading import weights_bytes, weights_hash
from mopcompress.models.quantization_grid import FILE, write_grid
from mopcompress.models.repair import RepairsByName, read_repairs, write_repairs
from mopcompress.models.weight_files import REPAIR
from mopcompress.recipe import GPTQModifier, LowRankRepairModifier, Recipe, recipe_to_dict
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.storage import artifacts


def request_metadata(
    source: Path,
    modifiers: Sequence[Pruning | GPTQModifier | LowRankRepairModifier],
    calibration: CalibrationSet,
    recipe: Recipe,
) -> dict[str, Any]:
    """Return the manifest's entries for what was asked for."""
    return {
        "kind": "compressed model",
        "method": "+".join(modifier.method for modifier in modifiers),
        "base": {"folder": str(source), "sha256": weights_hash(source)},
        "calibration": calibration.metadata,
        "recipe": recipe_to_dict(recipe),
    }


def count_zeros(rows: Sequence[LayerRow]) -> dict[str, Any]:
    """Count the weights of all compressed linears, the zeros among them, and their fraction."""
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}


def check_fallbacks(rows: Sequence[LayerRow | StructuredRow], allowed: float, hint: str = "") -> int:
    """Count the matrices that needed more damping than asked for.

    Raises `QualityGateError` when they are more than the `allowed` fraction; `hint` says what became of the work.
    """
    fallbacks = sum(row.escalations > 0 for row in rows)
    if fallbacks > allowed * len(rows):
        raise QualityGateError(
            f"{fallbacks} of {len(rows)} matrices needed more damping than asked for, run.max_fallback_fraction allows "
            f"{allowed:g} of them; calibrate on more tokens, or allow it{hint}"
        )
    return fallbacks


@contextmanager
def publish_model(target: Path, metadata: dict[str, Any], rows: Sequence[LayerRow | StructuredRow]) -> Iterator[Path]:
    """Yield a scratch folder for the model's files, which becomes `target`.

    Layer rows are written beside them; bytes and hash of the weights are added to `metadata`, in place.
    """
    with artifacts.publish(target, metadata) as scratch:
        yield scratch
        artifacts.write_atomically(scratch / "layers.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        metadata["model_bytes"] = weights_bytes(scratch)
        metadata["sha256"] = weights_hash(scratch)


def write_scales(folder: Path, scales: Mapping[str, Tensor], modifiers: Sequence[Pruning | GPTQModifier]) -> None:
    """Write the scales of quantized weights; a model on several grids (bits, group size) gets none, nor an export."""
    grids = {(modifier.bits, modifier.group_size) for modifier in modifiers if isinstance(modifier, GPTQModifier)}
    if len(grids) == 1 and scales:
        [(bits, group_size)] = grids
        write_grid(folder / FILE, scales, bits=bits, group_size=group_size)


def write_repair_file(folder: Path, repairs: RepairsByName) -> dict[str, Any] | None:
    """Write the repairs, if there are any; return the manifest's entry, counted in the file as it is read back."""
    if not repairs:
        return None
    write_repairs(folder / REPAIR, repairs)
    stored = read_repairs(folder).values()
    return {
        "rank": max(repair.rank for repair in stored),
        "linears": len(stored),
        "parameters": sum(repair.parameters_stored for repair in stored),
        "bytes": (folder / REPAIR).stat().st_size,
    }
