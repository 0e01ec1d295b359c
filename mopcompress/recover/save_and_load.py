"""Adapter folders: trained tensors in safetensors, and the settings and base model that they belong to, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.storage import artifacts

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"

# Adapter files keep the names that they were first written with: name in the code -> name on disk.
FIELDS_ON_DISK = {"gate_mode": "gate_reading", "per_layer_prompts": "deep"}
TENSORS_ON_DISK = {"prompt_log_weight": "log_opening", "layer_key_values": "deep", "patches": "changes"}


def save_adapter(adapter: Adapter, config: AdapterConfig, folder: Path) -> None:
    """Write an adapter's weights and config into `folder`."""
    tensors = tensors_to_disk(adapter.state_dict())
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / WEIGHTS)
    artifacts.write_atomically(folder / CONFIG, json.dumps(config_to_disk(config), indent=1) + "\n")


def config_to_disk(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields of a config under their names in `adapter.json`."""
    return {FIELDS_ON_DISK.get(name, name): value for name, value in asdict(config).items()}


def config_from_disk(fields: Mapping[str, Any]) -> AdapterConfig:
    """Return the config of fields that `config_to_disk` named. Raises `TypeError` for a field that is unknown."""
    in_code = {stored: name for name, stored in FIELDS_ON_DISK.items()}
    return AdapterConfig(**{in_code.get(name, name): value for name, value in fields.items()})


def tensors_to_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under their names in `adapter.safetensors`."""
    return _rename_first_part(tensors, TENSORS_ON_DISK)


def tensors_from_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that `tensors_to_disk` named under their names in the adapter's state dict."""
    return _rename_first_part(tensors, {stored: name for name, stored in TENSORS_ON_DISK.items()})


def _rename_first_part(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    parts = {name: name.partition(".") for name in tensors}
    return {"".join((names.get(first, first), dot, rest)): tensors[name] for name, (first, dot, rest) in parts.items()}


def load_adapter(folder: Path, model: LanguageModel, *, base_sha256: str) -> tuple[Adapter, AdapterConfig]:
    """Return the adapter in `folder`, frozen and on the model's device, and its config.

    `base_sha256` is the hash of the model's weights. Raises `InputNotFoundError` when there is no adapter, `DataError`
    when it is damaged or belongs to another model.
    """
    config = read_config(folder, base_sha256=base_sha256)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"adapter {folder} cannot be read ({error}); train it again") from error
    if config.arm not in RECOVERY_METHODS:
        raise DataError(
            f"adapter {folder}: no arm {config.arm!r} here, only {', '.join(RECOVERY_METHODS)}; train it again"
        )
    adapter = RECOVERY_METHODS[config.arm].build(model, config)
    assert isinstance(adapter, nn.Module)  # for mypy: a protocol cannot ask for it
    try:
        adapter.load_state_dict(tensors_from_disk(weights))
    except RuntimeError as error:
        raise DataError(f"adapter {folder}: {str(error).splitlines()[-1].strip()}; train it again") from error
    adapter.to(model.device, model.network.dtype).requires_grad_(False)
    return adapter, config


def read_config(folder: Path, *, base_sha256: str) -> AdapterConfig:
    """Verify an adapter's folder and return its config. Raises the errors of `load_adapter`."""
    if not (folder / CONFIG).exists():
        raise InputNotFoundError(f"adapter {folder}: no {CONFIG} there; name a folder that `mopcompress recover` wrote")
    artifacts.verify(folder)
    try:
        config = config_from_disk(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"adapter {folder} cannot be read ({error}); train it again") from error
    if config.base_sha256 != base_sha256:
        raise DataError(
            f"adapter {folder} was trained on a model with weights {config.base_sha256}, this one has {base_sha256}; "
            "use the compressed model that it was trained on"
        )
    return config


def adapter_bytes(folder: Path) -> int:
    """Return the size of the adapter's weights on disk, in bytes."""
    return (folder / WEIGHTS).stat().st_size
