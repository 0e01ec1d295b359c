"""Lower states on disk, so that another run, arm or seed on the same model and rows need not compute them again."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from mopcompress.data.encoding import Document
from mopcompress.evaluation.hidden_states import Fill, HiddenStateDataset
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import Progress
from mopcompress.storage import artifacts
from mopcompress.storage.cache import cached
from mopcompress.storage.memmap import map_anonymous, map_file, reserve

STATES, SUMMARIES = "states", "summaries.safetensors"
TRAINING_DTYPE = torch.float16  # of states that nothing is scored on


def load_or_compute_states(
    model: LanguageModel,
    base_sha256: str,
    documents: tuple[Any, ...],
    layer: int,
    batch_size: int,
    which: str,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
) -> HiddenStateDataset:
    """The states that enter `layer` for every document: those kept from another run, or computed and kept."""
    what = f"lower blocks, once for all arms: {which}"
    facts = cache_key(model, base_sha256, documents) | {
        "kind": "states that enter a block",
        "layer": layer,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with torch.inference_mode():
        return HiddenStateDataset(
            model,
            documents,
            layer,
            batch_size=batch_size,
            progress=lambda done: progress.update(what, done, len(documents)),
            store=functools.partial(_kept, facts=facts, dtype=dtype),
        )


def _kept(
    rows: int, columns: int, fill: Fill, *, facts: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "documents hidden"]]:
    """The states and summaries that `facts` describe: read, or made by `fill`, into a mapped file, and kept.

    States that go beyond `dtype` are kept in float32; without a folder, in a file that nobody sees.
    """

    def write(scratch: Path, manifest: dict[str, Any]) -> None:
        def into(dtype: torch.dtype) -> Tensor:
            reserve(scratch / STATES, rows * columns * dtype.itemsize)
            manifest["stored"] = str(dtype).removeprefix("torch.")
            return map_file(scratch / STATES, rows, columns, dtype)

        _, summaries = _filled(into, fill, dtype)
        save_file({"summaries": summaries.cpu()}, scratch / SUMMARIES)

    def read(folder: Path) -> tuple[Tensor, Tensor]:
        stored = json.loads((folder / artifacts.MANIFEST).read_text(encoding="utf-8"))["stored"]
        hidden = map_file(folder / STATES, rows, columns, getattr(torch, stored))
        return hidden, load_file(folder / SUMMARIES)["summaries"]

    return cached(
        facts,
        size=rows * columns * dtype.itemsize,
        write=write,
        read=read,
        otherwise=lambda: _filled(functools.partial(map_anonymous, rows, columns), fill, dtype),
    )


def _filled(make: Callable[[torch.dtype], Tensor], fill: Fill, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = make(dtype)
    summaries = fill(hidden)
    if dtype != torch.float32 and not all(math.isfinite(float(extreme)) for extreme in hidden.aminmax()):
        hidden = make(torch.float32)
        summaries = fill(hidden)
    return hidden, summaries


def cache_key(model: LanguageModel, sha256: str, documents: Sequence[Document]) -> dict[str, Any]:
    """What anything that a model of these weights computes from these rows depends on."""
    return {
        "model": sha256,
        "config": config_hash(model.network.config),
        "documents": tokens_hash(documents),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tokens_hash(documents: Sequence[Document]) -> str:
    """A hash of the tokens of these rows, and of where responses begin."""
    return hashlib.sha256(repr([(one.tokens, one.context_tokens) for one in documents]).encode()).hexdigest()


def config_hash(config: PretrainedConfig) -> str:
    """A hash of what a network computes with besides its weights, such as the base of its rotary positions."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return artifacts.fingerprint({name: one for name, one in fields.items() if name != "_name_or_path"})
