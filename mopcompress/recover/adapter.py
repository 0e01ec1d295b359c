"""An adapter folder: the trained prompts and gate in safetensors, and what they belong to."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mopcompress import artifact
from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.recover.gate import Gate
from mopcompress.recover.mixture import MixtureOfPrompts

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the weights are for."""

    arm: str
    experts: int
    prompts_per_expert: int
    layer: int
    hidden_size: int
    base_sha256: str  # of the compressed model's weights: prompts fit no other model
    tasks: Sequence[str]  # expert e's domain, in order; empty when experts were found by clustering


def save_adapter(mixture: MixtureOfPrompts, config: AdapterConfig, folder: Path) -> None:
    """Write weights and config into `folder`."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in mixture.state_dict().items()}, folder / WEIGHTS)
    artifact.write_whole(folder / CONFIG, json.dumps(asdict(config), indent=1) + "\n")


def load_adapter(folder: Path, *, base_sha256: str, device: torch.device) -> tuple[MixtureOfPrompts, AdapterConfig]:
    """Read an adapter for the model whose weights have this hash.

    Raises `InputNotFoundError` when there is none, `DataError` when it is damaged or belongs to another model.
    """
    if not (folder / CONFIG).exists():
        raise InputNotFoundError(f"adapter {folder}: no {CONFIG} there; name a folder that `mopcompress recover` wrote")
    artifact.verify(folder)
    try:
        config = AdapterConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        weights = load_file(folder / WEIGHTS)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise DataError(f"adapter {folder} cannot be read ({error}); train it again") from error
    if config.base_sha256 != base_sha256:
        raise DataError(
            f"adapter {folder} was trained on a model with weights {config.base_sha256}, this one has {base_sha256}; "
            "use the compressed model that it was trained on"
        )
    mixture = _empty(config)
    try:
        mixture.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"adapter {folder}: {str(error).splitlines()[-1].strip()}; train it again") from error
    return mixture.to(device).requires_grad_(False), config


def adapter_bytes(folder: Path) -> int:
    """Bytes of the adapter's weights on disk."""
    return (folder / WEIGHTS).stat().st_size


def _empty(config: AdapterConfig) -> MixtureOfPrompts:
    groups = config.experts if config.arm == "mop" else 1
    prompts = torch.zeros(groups, config.experts * config.prompts_per_expert // groups, config.hidden_size)
    gate = Gate(config.hidden_size, config.experts, generator=torch.Generator()) if config.arm == "mop" else None
    return MixtureOfPrompts(prompts, config.layer, gate)
