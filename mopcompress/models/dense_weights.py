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
    """The weight of a linear of the blocks by its dotted name, in fp32, with its repair if it has one.

    One block at a time is read, so ask in order. Raises `DataError`, as what is given does, for what is not there.
    """
    streamed = StreamedModel(folder, tokenizer, torch.zeros(1, dtype=torch.long), device=device)
    repairs = read_repairs(folder)
    network, blocks = streamed.model.network, f"{streamed.model.blocks_prefix()}."

    def weight(name: str) -> Float[Tensor, "out in"]:
        try:
            linear = network.get_submodule(name)
            streamed.hold(int(name.removeprefix(blocks).partition(".")[0]))
        except (AttributeError, ValueError) as error:
            raise DataError(f"model {folder} has no linear {name}; name the right --teacher") from error
        own = weight_of(linear)
        if name not in repairs:
            return own
        repair = repairs[name]
        return own + (repair.up.to(own) @ repair.down.to(own))

    return weight
