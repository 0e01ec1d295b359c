"""Exports load in the stock loaders of other projects, where these are installed."""

import importlib.util
import os

import pytest
import torch
from tiny_folders import compressed_folder
from tiny_models import random_tokens
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.export import export

PACKAGES = {"gptq": ("gptqmodel", "optimum"), "compressed-tensors": ("compressed_tensors",)}
TOKENS = random_tokens(2, 20)


def require_packages(format: str) -> None:
    """Skip the test when a loader is missing; a missing compressed-tensors is a failure in CI, as it is in `dev`.

    gptqmodel needs a compiler: `make test-loaders`, which CI runs where there is one, installs it.
    """
    missing = [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing and format == "compressed-tensors" and os.environ.get("CI"):
        pytest.fail(f"{missing[0]} is not installed")
    if missing:
        pytest.skip(f"{missing[0]} is not installed")


@torch.no_grad()
def logits(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=TOKENS).logits


@pytest.mark.parametrize("format", [*PACKAGES])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("skip", [None, "layers.1.mlp"])
@pytest.mark.filterwarnings("default")  # warnings of other projects
def test_a_stock_loader_computes_the_same(format, bits, group_size, skip, tmp_path):
    require_packages(format)
    dtype = torch.float16 if format == "gptq" else torch.float32  # gptqmodel multiplies in fp16
    folder = compressed_folder(tmp_path / "in", bits=bits, group_size=group_size, sparsity=0.5, dtype=dtype, skip=skip)
    export(str(folder), format, tmp_path / "out")
    expected = logits(folder, torch.float32)
    # on CPUs it computes 4 bits in bf16; the dense folder in bf16 differs as much from fp32
    tolerance = 0.3 if (format, bits) == ("gptq", 4) else 1e-4
    assert float((logits(tmp_path / "out", torch.float32) - expected).abs().max()) < tolerance
