"""The folder that compression leaves, whoever did the work: one kind of manifest, layer rows and scales."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mopcompress.compress.sequential import LayerRow
from mopcompress.compress.structured import StructuredRow
from mopcompress.errors import QualityGateError
from mopcompress.models.model_loading import weights_bytes, weights_hash
from mopcompress.models.quantization_grid import FILE, write_grid
from mopcompress.models.repair import RepairsByName, read_repairs, write_repairs
from mopcompress.models.weight_files import REPAIR
from mopcompress.recipe import GPTQModifier, LowRankRepairModifier, Recipe, recipe_to_dict
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.storage import artifacts


def request_facts(
    source: Path,
    modifiers: Sequence[Pruning | GPTQModifier | LowRankRepairModifier],
    calibration: Mapping[str, Any],
    recipe: Recipe,
) -> dict[str, Any]:
    """What a manifest says of what was asked for."""
    return {
        "kind": "compressed model",
        "method": "+".join(modifier.method for modifier in modifiers),
        "base": {"folder": str(source), "sha256": weights_hash(source)},
        "calibration": calibration,
        "recipe": recipe_to_dict(recipe),
    }


def mask_facts(rows: Sequence[LayerRow]) -> dict[str, Any]:
    """What was counted over all compressed linears."""
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}


def check_fallbacks(rows: Sequence[LayerRow | StructuredRow], allowed: float, hint: str = "") -> int:
    """How many matrices needed more damping than asked for.

    Raises `QualityGateError` when that is more than this share of them; `hint` says what became of the work.
    """
    fallbacks = sum(row.escalations > 0 for row in rows)
    if fallbacks > allowed * len(rows):
        raise QualityGateError(
            f"{fallbacks} of {len(rows)} matrices needed more damping than asked for, --max-fallback allows "
            f"{allowed:g} of them; calibrate on more tokens, or allow it{hint}"
        )
    return fallbacks


@contextmanager
def published(target: Path, facts: dict[str, Any], rows: Sequence[LayerRow | StructuredRow]) -> Iterator[Path]:
    """Yield a scratch folder for the model's files, which becomes `target`; rows, bytes and hash are added."""
    with artifacts.publish(target, facts) as scratch:
        yield scratch
        artifacts.write_atomically(scratch / "layers.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        facts["model_bytes"] = weights_bytes(scratch)
        facts["sha256"] = weights_hash(scratch)


def write_scales(folder: Path, scales: Mapping[str, Tensor], grids: Sequence[tuple[int, int | None]]) -> None:
    """Write the scales of what was rounded, unless to several grids: such a model cannot be exported as it is.

    `grids` are the bits and group sizes that were asked for.
    """
    if len(set(grids)) == 1 and scales:
        bits, group_size = grids[0]
        write_grid(folder / FILE, scales, bits=bits, group_size=group_size)


def write_repair_file(folder: Path, repairs: RepairsByName) -> dict[str, Any] | None:
    """Write the repairs, if there are any; what is counted in the file as it is read again."""
    if not repairs:
        return None
    write_repairs(folder / REPAIR, repairs)
    written = read_repairs(folder)
    return {
        "rank": max(one.rank for one in written.values()),
        "linears": len(written),
        "parameters": sum(one.parameters_stored for one in written.values()),
        "bytes": (folder / REPAIR).stat().st_size,
    }
