"""Bytes on disk of our sparse container, against the dense folder in fp16.

    python benchmarks/disk_size.py [FOLDER...]

FOLDERs are models that `prune` and `quantize` made. Without any, SmolLM2's linears are pruned by magnitude, each
matrix to 50, 85 and 95 %, and stored in fp16 or rounded to 4 bits with a scale for every 64, 96 or 192 inputs (128 does
not divide its 576): real masks, no calibration, useless models. Sizes are those of files and tensors that were
written, read back and compared. A bitmask's size is the same for every mask of a ratio; gaps take less where zeros
lie in runs, so methods that empty whole inputs come out smaller. Prints one JSON object and, on stderr, a table.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopcompress.entrypoints.export import export
from mopcompress.environment import provenance
from mopcompress.formats.model_reader import open_model, read_header
from mopcompress.models.meta_model import load_meta_model
from mopcompress.models.model_loading import copy_other_files, resolve_model
from mopcompress.models.quantization_grid import FILE, read_grid, write_grid
from mopcompress.models.weight_files import SINGLE

RATIOS = (0.5, 0.85, 0.95)
GROUPS = (64, 96, 192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    folders = parser.parse_args().folders
    with tempfile.TemporaryDirectory() as scratch:
        rows = (
            [measure_folder(folder, Path(scratch)) for folder in folders] if folders else measure_pruned(Path(scratch))
        )
    print(json.dumps({"rows": rows, **provenance(torch.device("cpu"))}, indent=1))
    for row in rows:
        line = f"{row['name']:32} linears {row['linears_ratio']:6.2f} x   folder {row['folder_ratio']:5.2f} x"
        print(line, row["places"], file=sys.stderr)


def measure_pruned(scratch: Path) -> list[dict[str, Any]]:
    source = resolve_model("smollm2")
    linears = [name for name in load_meta_model(source).linears if name != "lm_head"]
    rows = []
    for ratio in RATIOS:
        for group_size in (None, *GROUPS):
            name = f"magnitude {100 * ratio:g} % {'fp16' if group_size is None else f'int4 g{group_size}'}"
            folder = scratch / name
            write_compressed(source, folder, linears, ratio, group_size)
            rows.append(measure_folder(folder, scratch))
            shutil.rmtree(folder)
    return rows


def write_compressed(source: Path, folder: Path, linears: list[str], ratio: float, group_size: int | None) -> None:
    folder.mkdir()
    copy_other_files(source, folder)
    weights, scales = load_file(source / SINGLE), {}
    for name in linears:
        weight = weights[f"{name}.weight"].float()
        weight.view(-1)[weight.abs().flatten().argsort(stable=True)[: round(ratio * weight.numel())]] = 0.0
        if group_size is not None:
            weight, scales[name] = round_weight(weight, group_size)
        weights[f"{name}.weight"] = weight.half()
    save_file(weights, folder / SINGLE, {"format": "pt"})
    if scales:
        write_grid(folder / FILE, scales, bits=4, group_size=group_size)


def round_weight(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round to the nearest of 16 levels; the scale just reaches the largest weight of the group."""
    groups = weight.view(len(weight), -1, group_size)
    scales = (groups.abs().amax(-1) / 7.5).half().clamp_min(2.0**-24)
    spread = scales.float()[..., None]
    return ((groups / spread).round().clamp(-8, 7).to(torch.int8) * spread).view_as(weight), scales


def measure_folder(folder: Path, scratch: Path) -> dict[str, Any]:
    target = scratch / "exported"
    facts = export(str(folder), "sparse", target)
    stored = open_model(target)
    headers = [json.loads(text) for path in stored.files for name, text in read_header(path).items() if "." in name]
    grid = read_grid(folder)
    shutil.rmtree(target)
    return {
        "name": folder.name,
        "bits": grid.bits if grid else None,
        "group_size": grid.group_size if grid else None,
        "linears_dense_bytes": facts["matrices_dense_bytes"],
        "linears_bytes": facts["matrices_bytes"],
        "linears_ratio": facts["matrices_dense_bytes"] / facts["matrices_bytes"],
        "folder_ratio": facts["source_bytes"] / facts["model_bytes"],
        "places": dict(Counter(f"{header['places']} {header.get('gap_bits', '')}".strip() for header in headers)),
    }


if __name__ == "__main__":
    main()
