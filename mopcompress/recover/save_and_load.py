"""An adapter folder: what was trained in safetensors, and what it belongs to."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.storage import artifacts

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


def save_adapter(adapter: Adapter, config: AdapterConfig, folder: Path) -> None:
    """Write weights and config into `folder`."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in adapter.state_dict().items()}, folder / WEIGHTS)
    artifacts.write_atomically(folder / CONFIG, json.dumps(asdict(config), indent=1) + "\n")


def load_adapter(folder: Path, model: LanguageModel, *, base_sha256: str) -> tuple[Adapter, AdapterConfig]:
    """Read an adapter for the model whose weights have this hash.

    Raises `InputNotFoundError` when there is none, `DataError` when it is damaged or belongs to another model.
    """
    config = config_for(folder, base_sha256=base_sha256)
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
        adapter.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"adapter {folder}: {str(error).splitlines()[-1].strip()}; train it again") from error
    adapter.to(model.device, model.network.dtype).requires_grad_(False)
    return adapter, config


def config_for(folder: Path, *, base_sha256: str) -> AdapterConfig:
    """What an adapter is, if it is whole and of the model whose weights have this hash; else raises as loading it."""
    if not (folder / CONFIG).exists():
        raise InputNotFoundError(f"adapter {folder}: no {CONFIG} there; name a folder that `mopcompress recover` wrote")
    artifacts.verify(folder)
    try:
        config = AdapterConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"adapter {folder} cannot be read ({error}); train it again") from error
    if config.base_sha256 != base_sha256:
        raise DataError(
            f"adapter {folder} was trained on a model with weights {config.base_sha256}, this one has {base_sha256}; "
            "use the compressed model that it was trained on"
        )
    return config


def adapter_bytes(folder: Path) -> int:
    """Bytes of the adapter's weights on disk."""
    return (folder / WEIGHTS).stat().st_size
