"""`export`: the same weights in another format. Nothing is rounded; all is read back before it is published.

A low-rank repair goes along unchanged, so that a dense folder made of any export is the model that was measured.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mopcompress.environment import provenance
from mopcompress.errors import DataError, InputNotFoundError, OutputError, StorageError
from mopcompress.formats import LAYOUTS
from mopcompress.formats.model_reader import ByteCounts, ModelReader, open_model, tensor_hashes, write_file
from mopcompress.models.meta_model import load_meta_model
from mopcompress.models.model_loading import check_output, copy_other_files, resolve_model
from mopcompress.models.quantization_grid import FILE, QuantizationGrid, write_grid
from mopcompress.models.repair import read_repairs
from mopcompress.models.weight_files import INDEX, REPAIR, SINGLE
from mopcompress.progress import Progress, silent
from mopcompress.storage import artifacts

KIND = "exported model"
_CONFIG, _SETTINGS, _QUANTIZE_CONFIG = "config.json", "quantization_config", "quantize_config.json"


def export(
    model: str, format: str, target: Path, *, resume: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Write a folder's weights, in whatever format of ours they are, as `format` into `target`; returns the manifest.

    Raises `DataError` when the format cannot hold them, `StorageError` when they do not read back as they were.
    """
    folder = resolve_model(model, progress=progress.message)
    source, origin = open_model(folder), _origin(folder)
    if target.exists() or resume == "required":
        return _finished(target, format, origin, resume, progress)
    check_output(target, folder)
    grid, settings = _fitted(folder, source, format)
    facts: dict[str, Any] = {"kind": KIND, "format": format, **origin, **provenance(torch.device("cpu"))}
    with artifacts.publish(target, facts) as scratch:
        copy_other_files(folder, scratch)
        facts["repair"] = _carry_repair(folder, scratch, progress)
        _write_config(scratch, settings, source.format)
        sizes = ByteCounts()
        weight_map: dict[str, str] = {}
        for number, path in enumerate(source.files):
            progress.update(f"writing {format}", number, len(source.files))
            file = scratch / f"{LAYOUTS[format].prefix}{source.dense_name(path)}"
            names = write_file(file, source.tensors(path), format, grid, sizes)
            weight_map |= dict.fromkeys(names, file.name)
        if not LAYOUTS[format].prefix and not (scratch / SINGLE).exists():
            _write_index(scratch, weight_map)
        if format == "dense" and grid is not None:
            write_grid(scratch / FILE, grid.scales, bits=grid.bits, group_size=grid.group_size)
        facts["tensors"] = _compared(source, scratch, progress)
        facts |= {"source_bytes": source.bytes, "model_bytes": open_model(scratch).bytes, **sizes.facts()}
    return facts


def _origin(folder: Path) -> dict[str, Any]:
    """What an export says of its source. `dense_sha256` is of the dense files, whatever the format since then."""
    manifest = artifacts.read_manifest(folder)
    if manifest is not None:
        artifacts.verify(folder)
    stored = open_model(folder)
    sha256 = artifacts.fingerprint(
        {path.name: artifacts.sha256_file(path) for path in (*stored.files, *folder.glob(REPAIR))}
    )
    made = {name: value for name, value in (manifest or {}).items() if name not in ("files", "tensors")}
    dense = sha256 if stored.format == "dense" else made.get("dense_sha256")
    return {"source": {"folder": str(folder), "sha256": sha256, "manifest": made or None}, "dense_sha256": dense}


def _finished(target: Path, format: str, origin: Mapping[str, Any], resume: str, progress: Progress) -> dict[str, Any]:
    """The manifest of `target` if it is this very export. Raises `OutputError` when it is something else."""
    manifest = artifacts.read_manifest(target) if target.is_dir() else None
    if not target.exists():
        raise InputNotFoundError(f"--resume required: nothing finished in {target}; name its folder, or use auto")
    if resume == "never":
        raise OutputError(f"output {target} exists already and --resume is never; remove it or name another")
    made = (manifest or {}).get("format"), (manifest or {}).get("source", {}).get("sha256")
    if manifest is None or made != (format, origin["source"]["sha256"]):
        raise OutputError(f"output {target} exists already and is another thing; name another --output-dir")
    artifacts.verify(target)
    progress.message(f"done already: {target}")
    return manifest


def _fitted(folder: Path, source: ModelReader, format: str) -> tuple[QuantizationGrid | None, dict[str, Any]]:
    layout = LAYOUTS[format]
    if source.grid is None:
        if layout.needs_grid:
            raise DataError(
                f"--format {format} holds quantised weights, and those of {folder} are on no grid; run `mopcompress "
                "quantize` first (it keeps the zeros of a pruned folder), or choose --format sparse"
            )
        return None, {}
    skeleton = load_meta_model(folder)
    grid = layout.fit(source.grid, skeleton)
    return grid, layout.settings(grid, skeleton)


def _write_config(scratch: Path, settings: dict[str, Any], source_format: str) -> None:
    """Put our keys into config.json, or take them out; without any, the file stays as its author wrote it."""
    path = scratch / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = {name: value for name, value in config.items() if name != _SETTINGS} | settings
    if changed != config:
        path.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    if source_format == "gptq":
        (scratch / _QUANTIZE_CONFIG).unlink(missing_ok=True)
    if settings.get(_SETTINGS, {}).get("quant_method") == "gptq":  # GPTQModel and vLLM also look here
        (scratch / _QUANTIZE_CONFIG).write_text(json.dumps(settings[_SETTINGS], indent=2) + "\n", encoding="utf-8")
    AutoConfig.from_pretrained(scratch, local_files_only=True)


def _write_index(scratch: Path, weight_map: Mapping[str, str]) -> None:
    size = sum((scratch / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (scratch / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _carry_repair(folder: Path, scratch: Path, progress: Progress) -> dict[str, Any] | None:
    """Copy the repair, byte for byte; what a manifest says of it."""
    repairs = read_repairs(folder)
    if not repairs:
        return None
    shutil.copyfile(folder / REPAIR, scratch / REPAIR)
    progress.message(f"{REPAIR} goes along: other tools load the model without it")
    return {"linears": len(repairs), "bytes": (scratch / REPAIR).stat().st_size}


def _compared(source: ModelReader, scratch: Path, progress: Progress) -> dict[str, str]:
    """Read both folders and compare them tensor by tensor; the hashes of the tensors."""
    written = open_model(scratch)
    hashes: dict[str, str] = {}
    for number, (before, after) in enumerate(zip(source.files, written.files, strict=True)):
        progress.update("reading it back", number, len(source.files))
        was, now = tensor_hashes(source.tensors(before)), tensor_hashes(written.tensors(after))
        wrong = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        if wrong:
            raise StorageError(f"{after}: {wrong[0]} does not read back as it was; run again, or choose another format")
        hashes |= now
    return hashes
