"""Finding, loading and saving Hugging Face folders. safetensors only; nothing is fetched unless a hub id was named."""

import json
import shutil
from collections.abc import Callable, Mapping
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


def resolve_model(
    name: str, *, hub: Mapping[str, Any] = NO_HUB, progress: Callable[[str], None] = lambda line: None
) -> Path:
    """The local folder of a model: `smollm2`, a folder, or a hub id (a local path wins).

    `hub` is what `snapshot_download` is told besides, such as a revision.

    Raises `InputNotFoundError` for a path that does not exist, `UnavailableError` for a hub id that cannot be had.
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
    return _from_hub(name, hub)


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a folder, in fp32 unless told otherwise, ready to be taken apart and prompted.

    A repair is computed beside its weights.

    Raises `RefusedError` for pickled weights and remote code, `DataError` for a folder that holds no causal language
    model, or not all of it.
    """
    check_folder(folder)
    try:
        loaded: Any = attention.with_our_attention(
            lambda **chosen: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **chosen,
            )
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(folder, error) from error
    network, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise DataError(f"model {folder}: its files hold no {missing[0]}; get the model again")
    broken = [name for name, weight in network.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise DataError(f"model {folder}: {broken[0]} holds NaN or infinite weights; get the model again")
    model = LanguageModel(network.to(device), load_tokenizer(folder))
    attach_repairs(model, read_repairs(folder))
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises `DataError` when there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(folder, error) from error


def without_weights(folder: Path) -> PreTrainedModel:
    """The network with its parameters on the meta device; buffers, such as rotary frequencies, are real."""
    check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            return attention.with_our_attention(
                lambda **chosen: AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(folder, error) from error


def _not_loaded(folder: Path, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0]
    return DataError(f"model {folder} cannot be loaded: {reason}; check that the folder is whole")


def check_folder(folder: Path) -> dict[str, object]:
    """Read `config.json` and refuse, before torch allocates anything, what must not or cannot be loaded."""
    config_file = folder / "config.json"
    if not folder.is_dir() or not config_file.exists():
        raise InputNotFoundError(f"model {folder}: no config.json there; name a Hugging Face folder")
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
            "`mopcompress export FOLDER --format dense` if mopcompress wrote it"
        )
    if list(folder.glob(f"{SPARSE}*.safetensors")):
        raise DataError(
            f"model {folder} is a sparse container; make a folder that loads everywhere of it: mopcompress export "
            f"{folder} --format dense"
        )
    if not weight_files(folder):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickled:
            raise RefusedError(
                f"model {folder} has only pickled weights ({pickled[0]}), which can run code; convert it to safetensors"
            )
        raise InputNotFoundError(f"model {folder}: no {SINGLE} or {INDEX} there; get the model again")
    return config


def weights_hash(folder: Path) -> str:
    """One hash over the names and contents of the folder's weight files, and of the repair beside them."""
    return artifacts.fingerprint({path.name: artifacts.sha256_file(path) for path in _used(folder)})


def weights_bytes(folder: Path) -> int:
    """Bytes of the folder's weight files, and of the repair beside them."""
    return sum(path.stat().st_size for path in _used(folder))


def _used(folder: Path) -> list[Path]:
    return [*weight_files(folder), *folder.glob(REPAIR)]


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that a folder keeps its weights in."""
    with safe_open(weight_files(folder)[0], framework="pt") as file:
        dtypes = [file.get_tensor(name).dtype for name in sorted(file.keys())[:8]]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def save_model(model: LanguageModel, source: Path, target: Path) -> None:
    """Write the weights in the source's dtype; copy every other file of `source` byte for byte.

    Tokenizer and config files stay as their author wrote them, so that other tools load the result as they load the
    source.
    """
    dtype = stored_dtype(source)
    stored: dict[int, Tensor] = {}  # by address: weights that are tied stay tied, and are written once
    weights = {
        name: stored.setdefault(weight.data_ptr(), weight.to(dtype) if weight.is_floating_point() else weight)
        for name, weight in model.network.state_dict().items()
    }
    model.network.save_pretrained(target, state_dict=weights)
    copy_other_files(source, target)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy all that is neither weights nor a manifest of ours, byte for byte."""
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


def _from_hub(name: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **hub))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnavailableError(
            f"model {name} is no local folder and could not be had from the hub: {reason}; "
            "check the name and the network, or name a local folder"
        ) from error
