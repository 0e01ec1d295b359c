"""The files of a Hugging Face folder that hold its weights, found without torch."""

import json
from pathlib import Path

from mopcompress.errors import DataError, RefusedError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SPARSE = "sparse-"  # prefix of the weight files of our sparse container
REPAIR = "repair.safetensors"  # low-rank repairs of the linears; see `models.repair`


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads: `model.safetensors`, or the shards that the index names, or none.

    Any other safetensors file, such as `grid.safetensors` or a second copy in its author's own names, is no weight
    file. Raises `DataError` for a damaged index or a missing shard, and `RefusedError` for a shard outside the folder.
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
            raise RefusedError(
                f"{index} names {name!r}, which is no safetensors file in its folder; get the model again"
            )
        if not (folder / name).is_file():
            raise DataError(f"model {folder}: its index names {name}, which is missing; get the model again")
    return [folder / name for name in names]
