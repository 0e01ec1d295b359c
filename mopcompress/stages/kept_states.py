"""Lower states on disk, so that another run, arm or seed on the same model and rows need not compute them again.

A folder for each model, layer and set of rows in the user's cache: whole or not there, hashed, mapped into memory. It
only saves time: what cannot be kept, for want of room or rights, is computed into a file that nobody sees.
"""

import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from mopcompress import artifact
from mopcompress.data.encoding import Encoded
from mopcompress.errors import DataError, OutputError, StorageError
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.smollm2 import cache_folder
from mopcompress.stages.progress import Progress
from mopcompress.states import CachedStates, Fill, mapped, reserve, unseen

STATES, SUMMARIES = "states", "summaries.safetensors"
LIMIT = 16 * 2**30  # bytes of all folders; what was not used for longest goes first
TRAINING = torch.float16  # of states that nothing is scored on


def cache_states(
    model: LanguageModel,
    base_sha256: str,
    documents: tuple[Any, ...],
    layer: int,
    batch_size: int,
    which: str,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
) -> CachedStates:
    """The states that enter `layer` for every document: those kept from another run, or computed and kept."""
    what = f"lower blocks, once for all arms: {which}"
    facts = {
        "kind": "states that enter a block",
        "model": base_sha256,
        "config": config_digest(model.network.config),
        "layer": layer,
        "documents": digest(documents),
        "dtype": str(dtype).removeprefix("torch."),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with torch.inference_mode():
        return CachedStates(
            model,
            documents,
            layer,
            batch_size=batch_size,
            progress=lambda done: progress(what, done, len(documents)),
            store=functools.partial(kept, facts=facts, dtype=dtype),
        )


def kept(
    rows: int, columns: int, fill: Fill, *, facts: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "documents hidden"]]:
    """The states and summaries that `facts` describe: read, or made by `fill` and kept.

    States that go beyond `dtype` are kept in float32.
    """
    folder = cache_folder() / "states" / artifact.fingerprint(facts)
    if not _whole(folder):
        try:
            _make(folder, rows, columns, fill, facts, dtype)
        except (OSError, OutputError, StorageError):
            if not _whole(folder):  # it can be that another process was faster
                return _filled(functools.partial(unseen, rows, columns), fill, dtype)
    try:
        return _read(folder, rows, columns)
    except OSError:  # another process made room, and took it away
        return _filled(functools.partial(unseen, rows, columns), fill, dtype)


def _read(folder: Path, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    os.utime(folder, ns=(time.time_ns(),) * 2)  # the file system's own clock is too coarse to order two uses
    stored = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))["stored"]
    hidden = mapped(folder / STATES, rows, columns, getattr(torch, stored))
    return hidden, load_file(folder / SUMMARIES)["summaries"]


def digest(documents: Sequence[Encoded]) -> str:
    """A hash of all that states and summaries of these rows depend on."""
    return hashlib.sha256(repr([(one.tokens, one.context_tokens) for one in documents]).encode()).hexdigest()


def config_digest(config: PretrainedConfig) -> str:
    """A hash of what a network computes with besides its weights, such as the base of its rotary positions."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return artifact.fingerprint({name: one for name, one in fields.items() if name != "_name_or_path"})


def _whole(folder: Path) -> bool:
    """Whether a folder is there and as it was written; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        artifact.verify(folder)
    except (DataError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _make(folder: Path, rows: int, columns: int, fill: Fill, facts: Mapping[str, Any], dtype: torch.dtype) -> None:
    _make_room(folder.parent, rows * columns * dtype.itemsize)
    manifest = dict(facts)

    def into(dtype: torch.dtype) -> Tensor:
        reserve(scratch / STATES, rows * columns * dtype.itemsize)
        manifest["stored"] = str(dtype).removeprefix("torch.")
        return mapped(scratch / STATES, rows, columns, dtype)

    with artifact.publish(folder, manifest) as scratch:
        _, summaries = _filled(into, fill, dtype)
        save_file({"summaries": summaries.cpu()}, scratch / SUMMARIES)


def _filled(make: Callable[[torch.dtype], Tensor], fill: Fill, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = make(dtype)
    summaries = fill(hidden)
    if dtype != torch.float32 and not all(math.isfinite(float(extreme)) for extreme in hidden.aminmax()):
        hidden = make(torch.float32)
        summaries = fill(hidden)
    return hidden, summaries


def _make_room(parent: Path, size: int) -> None:
    """Remove what was not used for longest until `size` more bytes fit. Raises `StorageError` when they never will."""
    if size > LIMIT:
        raise StorageError(f"states of {size} bytes are more than all that may be kept in {parent} ({LIMIT})")
    folders = sorted((path for path in parent.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    for folder, freed in zip(folders, list(sizes), strict=True):
        if sum(sizes) + size <= LIMIT:
            break
        shutil.rmtree(folder, ignore_errors=True)
        sizes.remove(freed)
