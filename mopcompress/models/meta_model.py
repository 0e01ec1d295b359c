"""A network on the meta device: the names and shapes of its linears, without weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mopcompress.errors import DataError
from mopcompress.models.language_model import locate_blocks


@dataclass(frozen=True)
class MetaModel:
    """The linears of a network by dotted name, on the meta device, and the dotted name of its list of blocks."""

    linears: Mapping[str, nn.Linear]
    transposed: frozenset[str]  # names of GPT-2's Conv1D, a linear whose weight is [in, out]
    blocks: str


def load_meta_model(folder: Path) -> MetaModel:
    """Build the network of a folder without weights. Raises `DataError` when its config cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"model {folder} cannot be loaded: {reason}; check that the folder is whole") from error
    decoder, blocks = locate_blocks(network)
    modules = dict(network.named_modules())
    return MetaModel(
        linears={name: module for name, module in modules.items() if isinstance(module, nn.Linear)},
        transposed=frozenset(name for name, module in modules.items() if isinstance(module, Conv1D)),
        blocks=f"{decoder}.{blocks}",
    )
