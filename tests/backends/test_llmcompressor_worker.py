"""The worker of llm-compressor without its library: what it requests of it, and what it reads in its log."""

import subprocess
import sys
from pathlib import Path

import torch

from mopcompress.backends import llmcompressor_worker
from mopcompress.backends.llmcompressor_worker import FallbackLogReader, gptq_fields
from mopcompress.environment import peak_bytes


def test_gptq_options_become_the_fields_of_its_modifier() -> None:
    options = {"bits": 3, "group_size": 64, "damping": 0.02, "block_size": 96, "act_order": True}
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    assert gptq_fields(options, ["a.b"]) == {
        "config_groups": {"group_0": {"targets": ["a.b"], "weights": weights}},
        "block_size": 96,
        "dampening_frac": 0.02,
        "actorder": "static",
    }
    other = gptq_fields(options | {"group_size": None, "act_order": False}, ["a.b"])
    assert other["actorder"] is None
    assert other["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_fallbacks_are_read_from_the_log() -> None:
    log_reader = FallbackLogReader()
    for line in (
        "Sparsifying model.layers.0.mlp.up_proj. using 24 samples",
        "Sparsifying model.layers.0.mlp.down_proj. using 24 samples",
        "Failed to invert hessian due to numerical instability. Consider increasing",
        "Sparsifying model.layers.1.mlp.up_proj. using 24 samples",
        "Modules quantized with round-to-nearest due to hessian inversion failure: a.b, c.d",
        "Hessian inversion failed for 3/9 modules. Affected modules: a.b, and 1 more (full list at DEBUG level)",
    ):
        log_reader(line)
    assert log_reader.fallbacks == {"model.layers.0.mlp.down_proj", "a.b", "c.d"}


def test_peak_memory_excludes_the_parent_process() -> None:
    """In getrusage, a child of a large process starts with its parent's peak."""
    folder = Path(llmcompressor_worker.__file__).parent
    ballast = torch.ones(75_000_000)  # 300 MB
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import llmcompressor_worker as w; print(w.peak_bytes())"
    output = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1e6 < int(output) < 1e8
    assert peak_bytes() > ballast.nbytes
