"""Every family goes from folder to folder, and stock transformers loads and runs what comes out."""

import json

import pytest
import torch
from compression_cases import CALIBRATION_TOKENS
from factories import on_progress
from resumable_runs import CALIBRATION, ROUND
from safetensors.torch import load_file
from tiny_models import BLOCKS, saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.compress import compress_into
from mopcompress.errors import DataError
from mopcompress.models.model_loading import load_model
from mopcompress.recipe import ALPSModifier, load_recipe

LINEARS = {  # in a block; a mixture of experts is counted expert by expert
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma": 7,
    "gemma3": 7,
    "phi": 6,
    "gpt2": 4,
    "opt": 6,
    "gpt_neox": 4,
    "bloom": 4,
    "mixtral": 4 + 3 * 3,
    "qwen3_moe": 4 + 3 * 4,
}
COMMANDS = {"prune": ALPSModifier(sparsity=0.5, match_dense=1.0), "quantize": ROUND}
CPU = torch.device("cpu")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("family", LINEARS)
@torch.no_grad()
def test_a_family_is_compressed_and_loads_elsewhere(family, command, tmp_path):
    source, target = saved(tiny_model(family), tmp_path / "dense", torch.float16), tmp_path / "out"
    recipe = load_recipe(None, {"device": "cpu", "model": "unused"})
    facts = compress_into(
        target, source, [COMMANDS[command]], CALIBRATION, recipe, progress=on_progress(lambda *call: None)
    )
    network, loading = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(target, device=CPU).network
    torch.testing.assert_close(
        network(input_ids=CALIBRATION_TOKENS).logits, ours(input_ids=CALIBRATION_TOKENS).logits, rtol=1e-4, atol=1e-4
    )

    rows = [json.loads(line) for line in (target / "layers.jsonl").read_text().splitlines()]
    assert len({row["name"] for row in rows}) == len(rows) == LINEARS[family] * BLOCKS
    assert facts["unreached"] == [row["name"] for row in rows if not row["methods"]]
    if command == "prune":
        for row in rows:
            assert row["zeros"] >= (row["weights"] // 2 if row["methods"] else 0), row
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert before.keys() == after.keys()
    changed = sum(weight.numel() for name, weight in before.items() if not torch.equal(weight, after[name]))
    assert changed == sum(row["weights"] for row in rows if row["methods"])
    zeros = sum(int((weight == 0).sum()) for name, weight in after.items() if not torch.equal(weight, before[name]))
    assert zeros >= sum(row["zeros"] for row in rows if row["methods"])


def test_a_family_without_prompt_attention_is_an_error_late(tmp_path):
    model = load_model(saved(tiny_model("bloom"), tmp_path / "dense"), device=CPU)
    with pytest.raises(DataError, match="prompts cannot reach"):
        model.require_prompt_attention()
