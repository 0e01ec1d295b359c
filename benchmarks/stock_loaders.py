"""Exported models in the loaders of other tools: the largest difference of a logit from the dense folder.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/stock_loaders.py RESULT.json [FOLDER...]

Needs the extra `gptq`. FOLDERs are models that `quantize` made; without any, a small random Llama (2 blocks, hidden
256) in fp16 is pruned to 50 %, rounded by our GPTQ solver to 2, 3, 4 and 8 bits, and exported. Every loader computes
the same tokens in fp32 where it can. Writes one JSON object. `dense_fp16` and `dense_bf16` say how far the dense folder
itself is from its fp32 logits when it computes in that dtype: gptqmodel computes 4 bits on CPUs, and `GPTQModel.load`
everything, in bf16.
"""

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from mopcompress.algorithms.gptq import gptq
from mopcompress.entrypoints.export import export
from mopcompress.environment import provenance
from mopcompress.models.quantization_grid import FILE, write_grid

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TOKENS = torch.arange(3, 131)[None]
PACKAGES = ("gptqmodel", "optimum", "compressed-tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)  # gptqmodel prints on stdout
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sources = arguments.folders or [
            compressed(Path(folder) / f"{bits} bits, groups of {group_size}", bits, group_size)
            for bits in (2, 3, 4, 8)
            for group_size in (64, None)
        ]
        for source in sources:
            rows += measure(source, Path(folder) / "exports" / source.name)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"rows": rows, **provenance(torch.device("cpu")), "loaders": versions}
    arguments.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(dense: Path, targets: Path) -> list[dict[str, Any]]:
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
        if not (targets / format).exists():
            export(str(dense), format, targets / format)
        difference = float((load(targets / format) - expected).abs().max())
        rows.append({"name": dense.name, "format": format, "loader": loader, "max": difference})
    return [row | {"logit_max": float(expected.abs().max())} for row in rows]


def compressed(folder: Path, bits: int, group_size: int | None) -> Path:
    """Write a model with half of its weights at zero and the others on a grid that our solver chose."""
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
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # GPTQModel.load wants one
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    write_grid(folder / FILE, scales, bits=bits, group_size=group_size)
    return folder


def stock(folder: Path, dtype: torch.dtype) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(TOKENS).logits.float()


def gptqmodel(folder: Path) -> Tensor:
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model(TOKENS).logits.float()


if __name__ == "__main__":
    main()
