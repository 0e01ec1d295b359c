"""Which files of a Hugging Face folder hold its weights. Needs no torch."""

import json
from pathlib import Path

from mopcompress.errors import DataError, RefusedError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SPARSE = "sparse-"  # what our sparse container puts before the name of a weight file
REPAIR = "repair.safetensors"  # low-rank matrices beside the weights; see `models.repair`


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: `model.safetensors`, else the shards that its index names; none without both.

    Every other safetensors file, such as `grid.safetensors` or a second copy in its author's own names, is no weight
    file. Raises `DataError` for a damaged index or a missing shard, `RefusedError` for a shard outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{index} is no index of weights ({error!r}); get the model again") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise RefusedError(f"{index} names {name!r}, which is no safetensors file beside it; get the model again")
        if not (folder / name).is_file():
            raise DataError(f"model {folder}: its index names {name}, which is not there; get the model again")
    return [folder / name for name in names]
