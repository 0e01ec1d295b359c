"""What we write, loaded by the tools that others use: the greatest difference of a logit from the dense folder's.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/stock_loaders.py

Needs the extra `gptq`. A small random Llama (2 blocks, hidden 256) in fp16 is pruned to 50 %, rounded by our GPTQ
solver and exported; every loader computes the same tokens in fp32 where it can. Prints one JSON object. `dense_fp16`
and `dense_bf16` say how far the dense folder itself is from its fp32 logits when it computes in that dtype: gptqmodel
computes 4 bits on CPUs, and `GPTQModel.load` everything, in bf16.
"""

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mopcompress.compress.gptq import gptq
from mopcompress.models.grid import FILE, write_grid
from mopcompress.stages.export import export
from mopcompress.stages.provenance import provenance

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TOKENS = torch.arange(3, 131)[None]
PACKAGES = ("gptqmodel", "optimum", "compressed-tensors")


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for bits in (2, 3, 4, 8):
            for group_size in (64, None):
                rows += measure(Path(folder) / f"{bits}-{group_size}", bits, group_size)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps({"rows": rows, **provenance(torch.device("cpu")), "loaders": versions}, indent=1))


def measure(folder: Path, bits: int, group_size: int | None) -> list[dict[str, Any]]:
    dense = compressed(folder / "dense", bits, group_size)
    expected = stock(dense, torch.float32)
    loaders: dict[str, tuple[str, Callable[[Path], Tensor]]] = {
        "dense_fp16": ("dense", lambda folder: stock(folder, torch.float16)),
        "dense_bf16": ("dense", lambda folder: stock(folder, torch.bfloat16)),
        "transformers + gptqmodel": ("gptq", lambda folder: stock(folder, torch.float32)),
        "GPTQModel.load": ("gptq", gptqmodel),
        "transformers + compressed-tensors": ("compressed-tensors", lambda folder: stock(folder, torch.float32)),
    }
    rows = []
    for loader, (format, load) in loaders.items():
        target = folder / format
        if not target.exists():
            export(str(dense), format, target)
        difference = float((load(target) - expected).abs().max())
        rows.append({"format": format, "bits": bits, "group_size": group_size, "loader": loader, "max": difference})
    return [row | {"logit_max": float(expected.abs().max())} for row in rows]


def compressed(folder: Path, bits: int, group_size: int | None) -> Path:
    """Half of the weights are zero, the others on a grid that our solver chose."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    scales = {}
    for name, linear in network.model.named_modules():
        if isinstance(linear, nn.Linear):
            weight = linear.weight.data * (torch.rand_like(linear.weight) < 0.5)
            gram = torch.eye(weight.shape[1])
            solved = gptq(weight, gram, bits=bits, group_size=group_size, keep_zeros=True)
            linear.weight.data = solved.weight
            scales[f"model.{name}"] = solved.scales
    network.half().save_pretrained(folder)
    write_grid(folder / FILE, scales, bits=bits, group_size=group_size)
    return folder


def stock(folder: Path, dtype: torch.dtype) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(TOKENS).logits.float()


def gptqmodel(folder: Path) -> Tensor:
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model(TOKENS).logits.float()


if __name__ == "__main__":
    main()
