"""Tiny compressed folders, made without calibration: these tests are about how they are stored."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tiny_models import saved, tiny_model
from transformers.pytorch_utils import Conv1D

from mopcompress.formats.model_reader import open_model
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.quantization_grid import FILE, write_grid
from mopcompress.storage import artifacts

WEIGHTS = "model.safetensors"

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
    """Save a model with random zeros in the linears of the blocks, the rest rounded to a grid when `bits` are given.

    Linears whose name contains `skip` stay dense.
    """
    model = tiny_model(family, **(SIZES if family == "llama" else {}))
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for name, linear in block_linears(model).items():
        if skip and skip in name:
            continue
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        survives = torch.rand(weight.shape, generator=generator) >= sparsity
        if bits:
            groups = weight.view(len(weight), -1, group_size or weight.shape[1])
            scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
            spread = scale.float().repeat_interleave(groups.shape[-1], dim=1)
            limit = 2 ** (bits - 1)
            weight.copy_((weight / spread).round().clamp(-limit, limit - 1).to(torch.int8) * spread)
            scales[name] = scale
        weight.mul_(survives).add_(0.0)
    saved(model, folder, dtype)
    if bits:
        write_grid(folder / FILE, scales, bits=bits, group_size=group_size)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder in any format, as in a dense folder."""
    reader = open_model(folder)
    return {name: tensor for path in reader.files for name, tensor in reader.tensors(path)}


def assert_same_tensors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def flip_a_bit(path: Path, position: int = -1) -> None:
    """Flip the lowest bit of a byte of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def rehash(folder: Path) -> None:
    """Write the present hashes of all files into the manifest, as if somebody hid a change."""
    manifest = json.loads((folder / artifacts.MANIFEST).read_text())
    manifest["files"] = {name: artifacts.sha256_file(folder / name) for name in manifest["files"]}
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))
