"""Tiny compressed folders, made without calibration: what matters here is how they are stored."""

from pathlib import Path

import torch
from tiny_models import saved, tiny_model
from transformers.pytorch_utils import Conv1D

from mopcompress.models.language_model import LanguageModel
from mopcompress.models.quantization_grid import FILE, write_grid

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def block_linears(model: LanguageModel) -> dict[str, torch.nn.Module]:
    prefix = model.blocks_prefix()
    return {
        name: module
        for name, module in model.network.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(prefix)
    }


def compressed_folder(
    folder: Path,
    *,
    sparsity: float = 0.0,
    bits: int | None = None,
    group_size: int | None = 32,
    dtype: torch.dtype = torch.float16,
    family: str = "llama",
    skip: str | None = None,
) -> Path:
    """Random zeros in the linears of the blocks, the rest rounded to a grid when `bits` are given; `skip` stays."""
    model = tiny_model(family, **(SIZES if family == "llama" else {}))
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for name, linear in block_linears(model).items():
        if skip and skip in name:
            continue
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        kept = torch.rand(weight.shape, generator=generator) >= sparsity
        if bits:
            groups = weight.view(len(weight), -1, group_size or weight.shape[1])
            scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
            spread = scale.float().repeat_interleave(groups.shape[-1], dim=1)
            limit = 2 ** (bits - 1)
            weight.copy_((weight / spread).round().clamp(-limit, limit - 1).to(torch.int8) * spread)
            scales[name] = scale
        weight.mul_(kept).add_(0.0)
    saved(model, folder, dtype)
    if bits:
        write_grid(folder / FILE, scales, bits=bits, group_size=group_size)
    return folder
