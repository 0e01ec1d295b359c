"""Find, load and save Hugging Face folders: safetensors only, and downloads only when a hub id was named."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mopcompress.errors import DataError, InputNotFoundError, OutputError, RefusedError, UnavailableError
from mopcompress.models import attention, smollm2
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.repair import attach_repairs, read_repairs
from mopcompress.models.weight_files import INDEX, REPAIR, SINGLE, SPARSE, weight_files
from mopcompress.storage import artifacts

BUILT_IN = "smollm2"
NO_HUB: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model and the folder that it was read from."""

    folder: Path
    model: LanguageModel

    @cached_property
    def sha256(self) -> str:
        """Hash of the folder's weights, computed once: what caches, adapters and manifests know the model by."""
        return weights_hash(self.folder)


def open_model(name: str, *, device: torch.device, log: Callable[[str], None] = lambda line: None) -> OpenedModel:
    """Find and load a model by its name, as `resolve_model` and `load_model` do; raises as they do."""
    folder = resolve_model(name, progress=log)
    return OpenedModel(folder, load_model(folder, device=device))


def resolve_model(
    name: str, *, hub: Mapping[str, Any] = NO_HUB, progress: Callable[[str], None] = lambda line: None
) -> Path:
    """Return the local folder of a model: `smollm2`, a folder, or a hub id (a local path wins).

    `hub` holds more arguments of `snapshot_download`, such as a revision.

    Raises `InputNotFoundError` for a path that does not exist, and `UnavailableError` when a hub id cannot be
    downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == BUILT_IN:
        return smollm2.convert_wheel(progress)
    if folder.exists():
        raise DataError(f"model {name} is a file; name the Hugging Face folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputNotFoundError(f"model {name}: no such folder; name a Hugging Face folder, a hub id or {BUILT_IN}")
    return _download(name, hub)


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load the model of a folder, with its tokenizer, and with its low-rank repair if it has one.

    Args:
        folder: A folder in the layout of Hugging Face, with safetensors: what `prune` and `quantize` write, or a
            download. `resolve_model` turns a name such as `smollm2` into its folder.
        device: The device of the weights.
        dtype: The dtype of the weights.

    Returns:
        The model in evaluation mode, whose blocks can be run one by one and whose attention accepts prompts.

    Raises:
        RefusedError: The weights are pickled, or the model needs code of its own.
        DataError: The folder holds no causal language model, or an incomplete one.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> import mopcompress
        >>> model = mopcompress.load_model(Path("runs/model"), device=torch.device("cpu"))
        >>> len(model.blocks)
        4
    """
    check_folder(folder)
    try:
        loaded: Any = attention.make_with_attention(
            lambda **settings: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _loading_error(folder, error) from error
    network, loading_info = loaded
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise DataError(f"model {folder}: its files hold no {missing[0]}; get the model again")
    broken = [name for name, weight in network.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise DataError(f"model {folder}: {broken[0]} holds NaN or infinite weights; get the model again")
    model = LanguageModel(network.to(device), load_tokenizer(folder))
    attach_repairs(model, read_repairs(folder))
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer. Raises `DataError` when it has none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _loading_error(folder, error) from error


def load_meta_network(folder: Path) -> PreTrainedModel:
    """Build the network with its parameters on the meta device; buffers, such as rotary frequencies, are real."""
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            return attention.make_with_attention(
                lambda **settings: AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _loading_error(folder, error) from error


def _loading_error(folder: Path, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"model {folder} cannot be loaded: {reason}; check that the folder is whole")


def check_folder(folder: Path) -> dict[str, object]:
    """Return the content of `config.json` after checks that need no memory.

    Raises `InputNotFoundError`, `DataError` or `RefusedError` for a folder that cannot or must not be loaded.
    """
    config_file = folder / "config.json"
    if not folder.is_dir() or not config_file.exists():
        raise InputNotFoundError(f"model {folder} has no config.json; name a Hugging Face folder")
    try:
        config = dict(json.loads(config_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{config_file} is not a JSON object ({error}); get the model again") from error
    if "auto_map" in config:
        raise RefusedError(f"{config_file} asks for remote code (auto_map); use a model that transformers knows itself")
    if config.get("is_encoder_decoder"):
        raise DataError(f"{config_file}: an encoder-decoder; mopcompress works on decoder-only language models")
    if config.get("quantization_config"):
        raise DataError(
            f"{config_file}: the model is quantised already; start from its unquantised folder, or make one with "
            "`mopcompress export FOLDER --format dense` if mopcompress wrote this folder"
        )
    if list(folder.glob(f"{SPARSE}*.safetensors")):
        raise DataError(
            f"model {folder} is a sparse container; turn it into a folder that loads everywhere: mopcompress export "
            f"{folder} --format dense"
        )
    if not weight_files(folder):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickled:
            raise RefusedError(
                f"model {folder} has only pickled weights ({pickled[0]}), which can run code; convert it to safetensors"
            )
        raise InputNotFoundError(f"model {folder} has no {SINGLE} or {INDEX}; get the model again")
    return config


def weights_hash(folder: Path) -> str:
    """Return one hash over the names and contents of the folder's weight files and of its repair."""
    return artifacts.fingerprint({path.name: artifacts.sha256_file(path) for path in _hashed_files(folder)})


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the folder's weight files and of its repair."""
    return sum(path.stat().st_size for path in _hashed_files(folder))


def _hashed_files(folder: Path) -> list[Path]:
    return [*weight_files(folder), *folder.glob(REPAIR)]


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a folder stores its weights."""
    with safe_open(weight_files(folder)[0], framework="pt") as file:
        dtypes = [file.get_tensor(name).dtype for name in sorted(file.keys())[:8]]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def save_model(model: LanguageModel, source: Path, target: Path) -> None:
    """Write the weights in the source's dtype; copy every other file of `source` byte for byte.

    Tokenizer and config files stay as their author wrote them, so that other tools load the result as they load the
    source.
    """
    dtype = stored_dtype(source)
    stored: dict[int, Tensor] = {}  # by address: tied weights stay tied, and are written once
    weights = {
        name: stored.setdefault(weight.data_ptr(), weight.to(dtype) if weight.is_floating_point() else weight)
        for name, weight in model.network.state_dict().items()
    }
    model.network.save_pretrained(target, state_dict=weights)
    copy_other_files(source, target)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy every file that is neither weights nor a manifest of ours, byte for byte."""
    for path in source.iterdir():
        if path.is_file() and not _is_weights(path) and path.name != artifacts.MANIFEST:
            shutil.copyfile(path, target / path.name)


def check_output(target: Path, source: Path) -> None:
    """Raise `OutputError` when `target` exists or lies inside the model folder `source`."""
    if target.exists():
        raise OutputError(f"output {target} exists already; remove it or name another --output-dir")
    if target.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"output {target} lies inside the model folder {source}; name another --output-dir")


def _is_weights(path: Path) -> bool:
    return path.suffix in {".safetensors", ".bin", ".pt", ".pth"} or path.name.endswith(".index.json")


def _download(name: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnavailableError(
            f"model {name} is no local folder and could not be downloaded from the hub: {reason}; "
            "check the name and the network, or name a local folder"
        ) from error
