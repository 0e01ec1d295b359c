"""`export` and `export-adapter`: the same weights in the format of another tool.

Nothing is rounded. A model is read back and compared before it is published. A low-rank repair is copied unchanged, so
that a dense folder made from any export is the model that was measured.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mopcompress.entrypoints.resume_policy import confirm_finished, read_finished
from mopcompress.environment import provenance
from mopcompress.errors import DataError, InputNotFoundError, StorageError, UsageError
from mopcompress.formats import FORMATS
from mopcompress.formats.model_reader import ByteCounts, ModelReader, open_model, tensor_hashes, write_file
from mopcompress.models import model_loading
from mopcompress.models.meta_model import load_meta_model
from mopcompress.models.model_loading import check_output, copy_other_files, resolve_model, weights_hash
from mopcompress.models.quantization_grid import FILE, QuantizationGrid, write_grid
from mopcompress.models.repair import read_repairs
from mopcompress.models.weight_files import INDEX, REPAIR, SINGLE
from mopcompress.progress import Progress, silent
from mopcompress.recover.peft_export import check_arm, write_peft
from mopcompress.recover.save_and_load import load_adapter, read_config
from mopcompress.storage import artifacts

MODEL_KIND, ADAPTER_KIND = "exported model", "PEFT adapter"
CPU = torch.device("cpu")
_CONFIG, _SETTINGS, _QUANTIZE_CONFIG = "config.json", "quantization_config", "quantize_config.json"


def export(
    model: str, format: str, target: Path, *, resume: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Write a model folder's weights, whatever their format, as `format` into `target`; returns the manifest.

    Raises `DataError` when the format cannot hold them, `StorageError` when they do not read back as they were.
    """
    folder = resolve_model(model, progress=progress.message)
    source, origin = open_model(folder), _describe_source(folder)
    finished = read_finished(target, resume, resumable=False)
    if finished is not None:
        made = finished.get("format"), finished.get("source", {}).get("sha256")
        confirm_finished(target, progress.message, same=made == (format, origin["source"]["sha256"]))
        return finished
    check_output(target, folder)
    grid, settings = _fit_grid(folder, source, format)
    metadata: dict[str, Any] = {"kind": MODEL_KIND, "format": format, **origin, **provenance(CPU)}
    with artifacts.publish(target, metadata) as scratch:
        copy_other_files(folder, scratch)
        metadata["repair"] = _copy_repair(folder, scratch, progress)
        _write_config(scratch, settings, source.format)
        sizes = ByteCounts()
        weight_map: dict[str, str] = {}
        for number, path in enumerate(source.files):
            progress.update(f"writing {format}", number, len(source.files))
            file = scratch / f"{FORMATS[format].prefix}{source.dense_name(path)}"
            names = write_file(file, source.tensors(path), format, grid, sizes)
            weight_map |= dict.fromkeys(names, file.name)
        if not FORMATS[format].prefix and not (scratch / SINGLE).exists():
            _write_index(scratch, weight_map)
        if format == "dense" and grid is not None:
            write_grid(scratch / FILE, grid.scales, bits=grid.bits, group_size=grid.group_size)
        metadata["tensors"] = _compare(source, scratch, progress)
        metadata |= {"source_bytes": source.bytes, "model_bytes": open_model(scratch).bytes, **sizes.facts()}
    return metadata


def export_adapter(
    adapter: Path, model: str | None, target: Path, *, resume: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Write `adapter` in PEFT's format into `target`; returns the manifest.

    Without `model`, the adapter's manifest names its model. Raises `DataError` when the adapter is damaged, belongs to
    another model, or is of an arm that PEFT does not have.
    """
    made = artifacts.read_manifest(adapter)
    if made is None:
        raise InputNotFoundError(f"adapter {adapter}: not finished; name a folder that `mopcompress recover` wrote")
    check_arm(str(made.get("arm")))
    artifacts.verify(adapter)
    source = {"folder": str(adapter), "sha256": artifacts.fingerprint(made["files"])}
    finished = read_finished(target, resume, resumable=False)
    if finished is not None:
        if model is not None:  # a finished export of this adapter says nothing of the model that is named now
            read_config(adapter, base_sha256=weights_hash(resolve_model(model)))
        same = (finished.get("kind"), finished.get("source", {}).get("sha256")) == (ADAPTER_KIND, source["sha256"])
        confirm_finished(target, progress.message, same=same)
        return finished
    name = model or made.get("base", {}).get("folder")
    if name is None:
        raise UsageError(f"--model: not given, and {adapter} does not say which it was trained on; name its folder")
    base = model_loading.open_model(name, device=CPU, log=progress.message)
    loaded, config = load_adapter(adapter, base.model, base_sha256=base.sha256)
    metadata = {
        "kind": ADAPTER_KIND,
        "arm": config.arm,
        "source": source,
        "base": str(base.folder),
        **provenance(CPU),
    }
    with artifacts.publish(target, metadata) as scratch:
        write_peft(loaded, config, base.model, str(base.folder), scratch)
    return metadata


def _describe_source(folder: Path) -> dict[str, Any]:
    """Return the manifest's entries for the source; `dense_sha256` is of the dense files that it once came from."""
    manifest = artifacts.read_manifest(folder)
    if manifest is not None:
        artifacts.verify(folder)
    reader = open_model(folder)
    sha256 = artifacts.fingerprint(
        {path.name: artifacts.sha256_file(path) for path in (*reader.files, *folder.glob(REPAIR))}
    )
    made = {name: value for name, value in (manifest or {}).items() if name not in ("files", "tensors")}
    dense = sha256 if reader.format == "dense" else made.get("dense_sha256")
    return {"source": {"folder": str(folder), "sha256": sha256, "manifest": made or None}, "dense_sha256": dense}


def _fit_grid(folder: Path, source: ModelReader, format: str) -> tuple[QuantizationGrid | None, dict[str, Any]]:
    weight_format = FORMATS[format]
    if source.grid is None:
        if weight_format.needs_grid:
            raise DataError(
                f"--format {format} holds quantised weights, and those of {folder} are on no grid; run `mopcompress "
                "quantize` first (it keeps the zeros of a pruned folder), or choose --format sparse"
            )
        return None, {}
    meta_model = load_meta_model(folder)
    grid = weight_format.fit(source.grid, meta_model)
    return grid, weight_format.settings(grid, meta_model)


def _write_config(scratch: Path, settings: dict[str, Any], source_format: str) -> None:
    """Write the format's keys to config.json, or remove those of the source's format; else leave the file as it is."""
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


def _copy_repair(folder: Path, scratch: Path, progress: Progress) -> dict[str, Any] | None:
    """Copy the repair byte for byte; return the manifest's entry, None without a repair."""
    repairs = read_repairs(folder)
    if not repairs:
        return None
    shutil.copyfile(folder / REPAIR, scratch / REPAIR)
    progress.message(f"{REPAIR} goes along: other tools load the model without it")
    return {"linears": len(repairs), "bytes": (scratch / REPAIR).stat().st_size}


def _compare(source: ModelReader, scratch: Path, progress: Progress) -> dict[str, str]:
    """Compare the written folder with the source tensor by tensor; return the tensors' hashes.

    Raises `StorageError` at the first tensor that differs.
    """
    copy = open_model(scratch)
    hashes: dict[str, str] = {}
    for number, (old_file, new_file) in enumerate(zip(source.files, copy.files, strict=True)):
        progress.update("reading it back", number, len(source.files))
        old, new = tensor_hashes(source.tensors(old_file)), tensor_hashes(copy.tensors(new_file))
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            raise StorageError(
                f"{new_file}: {changed[0]} does not read back as it was; run again, or choose another format"
            )
        hashes |= new
    return hashes
