"""Recovered models from folders: a base and its adapter, or the one folder that `save_pretrained` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from mopcompress.errors import DataError
from mopcompress.models.attention import with_our_attention
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.repair import attach_repairs, read_repairs
from mopcompress.models.weight_files import weight_files
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import tensors_from_disk, tensors_to_disk

NETWORK, ADAPTER = "network.", "adapter."  # what the names of the weights begin with
HUB = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "token"})  # of what is fetched from it
# transformers' Auto classes and pipelines hand these over, and what is loaded is the same with them and without
HANDED_OVER = frozenset(
    {"adapter_kwargs", "low_cpu_mem_usage", "proxies", "trust_remote_code", "use_safetensors"}
    | {"_commit_hash", "_from_auto", "_from_pipeline"}
)


def hub_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Those settings of `from_pretrained` that say what is fetched from the hub.

    Raises `TypeError` for one that would be taken and change nothing.
    """
    for name in settings:
        if name == "attn_implementation":
            raise TypeError(f"from_pretrained: {name}: adapters need attention of their own kind; leave it out")
        if name not in HANDED_OVER | HUB:
            raise TypeError(f"from_pretrained: it has no argument {name!r}; leave it out")
    return {name: one for name, one in settings.items() if name in HUB and one is not None}


def one_device(device_map: object) -> torch.device | None:
    """The device that a `device_map` names: as a device, an index or a word, or as transformers' `{"": device}`.

    Raises `TypeError` for one that spreads a model over several.
    """
    device: Any = device_map
    if isinstance(device_map, Mapping) and list(device_map) == [""]:  # the name of all of a model
        device = device_map[""]
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"from_pretrained: device_map {device_map!r} is not one device; name one, such as cpu"
        ) from error


def network_of(config: PretrainedConfig) -> PreTrainedModel:
    """A network with random weights, whose attention is ours where it can be."""
    return with_our_attention(lambda **chosen: AutoModelForCausalLM.from_config(config, **chosen))


def adapter_of(model: LanguageModel, config: AdapterConfig) -> Adapter:
    """An adapter whose values are yet to be loaded."""
    return RECOVERY_METHODS[config.arm].build(model, config)


def load_whole(
    folder: Path, config: PretrainedConfig, adapter: AdapterConfig, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, Adapter]:
    """Network and adapter of one folder, in the dtype that they are stored in unless told otherwise.

    Raises `DataError` when the folder holds less than both, or more.
    """
    try:
        stored = {name: one for path in weight_files(folder) for name, one in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"model {folder} cannot be read ({error}); save it again") from error
    if dtype is not None:
        stored = {name: one.to(dtype) if one.is_floating_point() else one for name, one in stored.items()}
    with init_empty_weights(include_buffers=False):
        network = network_of(config)
    _fill(network, _part(stored, NETWORK), folder)
    if (folder / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    model = LanguageModel(network)
    attach_repairs(model, read_repairs(folder))
    made = adapter_of(model, adapter)
    assert isinstance(made, nn.Module)  # for mypy: a protocol cannot ask for it
    made = made.to(network.dtype)
    try:
        made.load_state_dict(tensors_from_disk(_part(stored, ADAPTER)))
    except RuntimeError as error:
        raise DataError(f"model {folder}: {str(error).splitlines()[-1].strip()}; save it again") from error
    return network, made


def state_dict_to_disk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole model's state with the adapter's tensors under their names on disk."""
    adapter = {name: tensor for name, tensor in state.items() if name.startswith(ADAPTER)}
    renamed = tensors_to_disk({name.removeprefix(ADAPTER): tensor for name, tensor in adapter.items()})
    others = {name: tensor for name, tensor in state.items() if name not in adapter}
    return others | {f"{ADAPTER}{name}": tensor for name, tensor in renamed.items()}


def _fill(network: PreTrainedModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Put stored weights into an empty network, in place."""
    unknown = network.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    network.tie_weights()
    missing = [name for name, weight in network.named_parameters() if weight.is_meta]
    if missing or unknown:
        what = f"no {missing[0]}" if missing else f"{unknown[0]}, which the network has not"
        raise DataError(f"model {folder}: its files hold {what}; save it again")


def _part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
