"""Single weights of a model in a folder, without the model in memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mopcompress.errors import DataError
from mopcompress.models.modules import weight_of
from mopcompress.models.repair import read_repairs
from mopcompress.models.streaming import StreamedModel


def open_dense_weights(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, device: torch.device
) -> Callable[[str], Float[Tensor, "out in"]]:
    """Return a function that reads the weight of a linear by its dotted name, in fp32, with its repair if it has one.

    It reads one block at a time, so call it in the order of the blocks. Both raise `DataError` when the folder does
    not hold what is asked for.
    """
    streamed = StreamedModel(folder, tokenizer, torch.zeros(1, dtype=torch.long), device=device)
    repairs = read_repairs(folder)
    network, blocks = streamed.model.network, f"{streamed.model.blocks_prefix()}."

    def read_weight(name: str) -> Float[Tensor, "out in"]:
        try:
            linear = network.get_submodule(name)
            streamed.load_block(int(name.removeprefix(blocks).partition(".")[0]))
        except (AttributeError, ValueError) as error:
            raise DataError(f"model {folder} has no linear {name}; name the right recovery.teacher") from error
        weight = weight_of(linear)
        if name not in repairs:
            return weight
        repair = repairs[name]
        return weight + (repair.up.to(weight) @ repair.down.to(weight))

    return read_weight
