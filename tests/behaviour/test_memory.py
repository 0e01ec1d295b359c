"""A model larger than the memory it gets is compressed all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TOKENS, network_of, saved, tiny_model, word_tokenizer
from transformers import LlamaConfig

HIDDEN, INNER, BLOCKS, SAMPLES, LENGTH = 384, 1152, 28, 8, 32
MEGABYTE = 2**20
BLOCK = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)  # bytes of its weights in fp32

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from resumable_runs import METADATA, compress_folder
from tiny_models import random_tokens
from mopcompress.entrypoints.inputs import CalibrationSet
from mopcompress.recipe import SparseGPTModifier, load_recipe

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

recipe = load_recipe(None, {{"device": "cpu", "model": "unused"}})
prune = SparseGPTModifier(sparsity=0.5)
calibration = CalibrationSet(random_tokens({samples}, {length}), METADATA)
compress_folder(Path({small!r}), Path({small!r} + "-out"), recipe, modifiers=[prune], calibration=calibration)
Path("/proc/self/clear_refs").write_text("5")  # reset the peak: importing has a higher one
before = resident("VmRSS")
compress_folder(Path({large!r}), Path({large!r} + "-out"), recipe, modifiers=[prune], calibration=calibration)
print(json.dumps([before, resident("VmHWM")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_peak_memory_is_that_of_one_block(tmp_path):
    small, large = saved(tiny_model(), tmp_path / "small"), tmp_path / "large"
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 6}
    network = network_of(LlamaConfig(**TOKENS | shape | {"max_position_embeddings": LENGTH}))
    network.to(torch.float16).save_pretrained(large)
    word_tokenizer().save_pretrained(large)
    del network
    code = CHILD.format(
        tests=str(Path(__file__).parents[1]), samples=SAMPLES, length=LENGTH, small=str(small), large=str(large)
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    before, peak = json.loads(child.stdout.splitlines()[-1])
    # the largest solve: a Gram matrix, its factor and what they are made with; a stacked weight, its errors and copies
    working_set = BLOCK + 5 * 4 * INNER**2 + 5 * 4 * 2 * INNER * HIDDEN
    activations = 4 * SAMPLES * LENGTH * (12 * HIDDEN + 4 * INNER)
    bound = 1.3 * working_set + activations + 64 * MEGABYTE
    assert bound < BLOCKS * BLOCK / 1.3  # the weights alone would break it
    assert peak - before < bound, (peak - before) / MEGABYTE
