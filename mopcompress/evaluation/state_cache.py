"""Cache of hidden states on disk, shared by runs, arms and seeds on the same model and rows."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from mopcompress.data.encoding import Document
from mopcompress.evaluation.hidden_states import HiddenStateDataset, PackedStates, compute_states, count_tokens
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import Progress
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cached
from mopcompress.storage.memmap import map_anonymous, map_file, reserve

STATES, MEANS = "states", "summaries.safetensors"
TRAINING_DTYPE = torch.float16  # of states that nothing is scored on


def load_or_compute_states(
    model: LanguageModel,
    base_sha256: str,
    documents: Sequence[Document],
    layer: int,
    batch_size: int,
    which: str,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
) -> HiddenStateDataset:
    """Return the states that enter `layer` for every document, from the cache or by running the blocks below.

    `base_sha256` is the hash of the model's weights, and `which` names the rows for the progress display. States that
    overflow `dtype` are stored in float32.
    """
    rows, columns = count_tokens(documents), model.hidden_size
    key = cache_key(model, base_sha256, documents) | {
        "kind": "states that enter a block",
        "layer": layer,
        "dtype": _dtype_name(dtype),
    }
    label = f"lower blocks, once for all arms: {which}"

    def compute(allocate: Callable[[torch.dtype], Tensor]) -> PackedStates:
        fill = partial(
            compute_states,
            model,
            documents,
            layer,
            batch_size=batch_size,
            progress=lambda done: progress.update(label, done, len(documents)),
        )
        hidden = allocate(dtype)
        means = fill(hidden)
        if dtype != torch.float32 and not all(math.isfinite(float(extreme)) for extreme in hidden.aminmax()):
            hidden = allocate(torch.float32)
            means = fill(hidden)
        return PackedStates(hidden, means)

    def write(scratch: Path, manifest: dict[str, Any]) -> None:
        def allocate(dtype: torch.dtype) -> Tensor:
            reserve(scratch / STATES, rows * columns * dtype.itemsize)
            manifest["stored"] = _dtype_name(dtype)
            return map_file(scratch / STATES, rows, columns, dtype)

        save_file({"summaries": compute(allocate).means.cpu()}, scratch / MEANS)

    def read(folder: Path) -> PackedStates:
        stored = json.loads((folder / artifacts.MANIFEST).read_text(encoding="utf-8"))["stored"]
        hidden = map_file(folder / STATES, rows, columns, getattr(torch, stored))
        return PackedStates(hidden, load_file(folder / MEANS)["summaries"])

    with torch.inference_mode():
        packed = cached(
            key,
            size=rows * columns * dtype.itemsize,
            write=write,
            read=read,
            compute=lambda: compute(partial(map_anonymous, rows, columns)),
        )
        return HiddenStateDataset(model, documents, layer, batch_size=batch_size, packed=packed)


def cache_key(model: LanguageModel, weights_sha256: str, documents: Sequence[Document]) -> dict[str, Any]:
    """Return all that a result depends on which a model of these weights computes from these rows."""
    return {
        "model": weights_sha256,
        "config": config_hash(model.network.config),
        "documents": tokens_hash(documents),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tokens_hash(documents: Sequence[Document]) -> str:
    """Hash the tokens of these rows, and the positions at which their responses begin."""
    pairs = [(document.tokens, document.context_tokens) for document in documents]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


def config_hash(config: PretrainedConfig) -> str:
    """Hash all that a network computes with besides its weights, such as the base of its rotary positions."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return artifacts.fingerprint({name: value for name, value in fields.items() if name != "_name_or_path"})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
