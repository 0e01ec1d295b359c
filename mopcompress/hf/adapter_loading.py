"""Loading of recovered models: a base and its adapter, or the one folder that `save_pretrained` wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from mopcompress.errors import DataError
from mopcompress.hf.config import MopConfig
from mopcompress.models.attention import make_with_attention
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, weights_hash
from mopcompress.models.repair import RepairsByName, attach_repairs, read_repairs
from mopcompress.models.weight_files import weight_files
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import (
    config_from_disk,
    config_to_disk,
    load_adapter,
    tensors_from_disk,
    tensors_to_disk,
)

NETWORK, ADAPTER = "network.", "adapter."  # prefixes of the weights' names
HUB_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})
# transformers' Auto classes and pipelines pass these, and they do not change what is loaded
IGNORED_ARGUMENTS = frozenset(
    {"adapter_kwargs", "low_cpu_mem_usage", "proxies", "trust_remote_code", "use_safetensors"}
    | {"_commit_hash", "_from_auto", "_from_pipeline"}
)


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a recovered model."""

    config: MopConfig
    network: PreTrainedModel
    adapter: Adapter
    repairs: RepairsByName


def select_hub_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Select the arguments of `from_pretrained` that say what is downloaded from the hub.

    Raises `TypeError` for an argument that would have no effect.
    """
    for name in arguments:
        if name == "attn_implementation":
            raise TypeError(f"from_pretrained: {name}: adapters need attention of their own kind; leave it out")
        if name not in IGNORED_ARGUMENTS | HUB_ARGUMENTS:
            raise TypeError(f"from_pretrained: it has no argument {name!r}; leave it out")
    return {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS and value is not None}


def parse_device_map(device_map: object) -> torch.device | None:
    """Return the device that a `device_map` names: as a device, an index, a word, or transformers' `{"": device}`.

    Raises `TypeError` for a map that spreads a model over several devices.
    """
    device: Any = device_map
    if isinstance(device_map, Mapping) and list(device_map) == [""]:  # the name of the whole model
        device = device_map[""]
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"from_pretrained: device_map {device_map!r} is not one device; name one, such as cpu"
        ) from error


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """Return the dtype that `from_pretrained` was given, as a dtype or its name; None for None and `auto`."""
    if dtype in (None, "auto"):
        return None
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def make_network(config: PretrainedConfig) -> PreTrainedModel:
    """Return a network with random weights, with our attention in families whose attention can be exchanged."""
    return make_with_attention(lambda **settings: AutoModelForCausalLM.from_config(config, **settings))


def build_adapter(model: LanguageModel, config: AdapterConfig) -> Adapter:
    """Return an adapter in its shapes, without trained values."""
    return RECOVERY_METHODS[config.arm].build(model, config)


def load_base_and_adapter(folder: Path, adapter_folder: Path, dtype: torch.dtype | None) -> LoadedModel:
    """Load a base, in fp32 by default, and the adapter that `recover` wrote for it."""
    base = load_model(folder, device=torch.device("cpu"), dtype=dtype or torch.float32)
    adapter, config = load_adapter(adapter_folder, base, base_sha256=weights_hash(folder))
    mop_config = MopConfig(text_config=base.network.config, adapter=config_to_disk(config))
    return LoadedModel(mop_config, base.network, adapter, read_repairs(folder))


def load_saved_model(folder: Path, config: PretrainedConfig | None, dtype: torch.dtype | None) -> LoadedModel:
    """Load network and adapter from one folder, in the dtype that they are stored in by default.

    Raises `DataError` when the folder holds no recovered model, lacks weights, or holds unknown ones.
    """
    config = config or MopConfig.from_pretrained(folder)
    if not isinstance(config, MopConfig) or config.text_config is None or config.adapter is None:
        raise DataError(f"model {folder} is no recovered model; name its adapter too, or one that was saved")
    try:
        weights = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"model {folder} cannot be read ({error}); save it again") from error
    if dtype is not None:
        weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    with init_empty_weights(include_buffers=False):
        network = make_network(config.text_config)
    _assign_weights(network, _without_prefix(weights, NETWORK), folder)
    if (folder / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    model, repairs = LanguageModel(network), read_repairs(folder)
    attach_repairs(model, repairs)
    adapter = build_adapter(model, config_from_disk(config.adapter))
    assert isinstance(adapter, nn.Module)  # for mypy: a protocol cannot ask for it
    adapter = adapter.to(network.dtype)
    try:
        adapter.load_state_dict(tensors_from_disk(_without_prefix(weights, ADAPTER)))
    except RuntimeError as error:
        raise DataError(f"model {folder}: {str(error).splitlines()[-1].strip()}; save it again") from error
    return LoadedModel(config, network, adapter, repairs)


def state_dict_to_disk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a recovered model's state with the adapter's tensors under their names on disk."""
    adapter = tensors_to_disk(_without_prefix(state, ADAPTER))
    others = {name: tensor for name, tensor in state.items() if not name.startswith(ADAPTER)}
    return others | {f"{ADAPTER}{name}": tensor for name, tensor in adapter.items()}


def rename_from_disk(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    """Rename, in place, adapter tensors of a recovered model's state from their names on disk.

    A hook before `load_state_dict`: Trainer loads the files of a checkpoint by it. Names of the code stay.
    """
    prefix += ADAPTER
    adapter = _without_prefix(state, prefix)
    for name in adapter:
        del state[prefix + name]
    state |= {prefix + name: tensor for name, tensor in tensors_from_disk(adapter).items()}


def _assign_weights(network: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Put stored weights into an empty network, in place."""
    unknown = network.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    network.tie_weights()
    missing = [name for name, weight in network.named_parameters() if weight.is_meta]
    if missing or unknown:
        fault = f"no {missing[0]}" if missing else f"{unknown[0]}, which the network has not"
        raise DataError(f"model {folder}: its files hold {fault}; save it again")


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, under names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
