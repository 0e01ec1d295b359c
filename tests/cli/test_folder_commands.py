"""Commands on finished folders: adapters for PEFT."""

import json
import shutil
from pathlib import Path

import torch
from cli_runner import invoke, left_behind
from safetensors.torch import load_file


def test_an_input_adapter_is_exported_for_peft(pruned: Path, stories: Path, data: Path, tmp_path: Path) -> None:
    adapter, target = tmp_path / "adapter", tmp_path / "peft"
    words = ("--data", data, "--steps", 2, "--device", "cpu", "--output-dir", adapter)
    assert invoke("recover", pruned, "--arm", "input", *words).code == 0
    outcome = invoke("export-adapter", adapter, "--output-dir", target, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["arm"], outcome.json["base"]) == ("input", str(pruned))
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pruned)
    (stored,) = load_file(target / "adapter_model.safetensors").values()
    assert torch.equal(stored, load_file(adapter / "adapter.safetensors")["prompts"])
    again = invoke("export-adapter", adapter, "--output-dir", target)
    assert (again.code, "done already" in again.err) == (0, True)
    assert invoke("export-adapter", adapter, "--output-dir", target, "--resume", "never").code == 73
    assert invoke("export-adapter", adapter, "--output-dir", adapter).code == 73
    assert invoke("export-adapter", adapter, "--output-dir", target, "--model", pruned).code == 0
    wrong = invoke("export-adapter", adapter, "--output-dir", target, "--model", stories)
    assert (wrong.code, "was trained on a model with weights" in wrong.err) == (65, True)
    other = ("--model", "no/such/model", "--output-dir", tmp_path / "other")
    assert invoke("export-adapter", adapter, *other).code == 66


def test_an_adapter_without_hashes_is_an_error(adapter: Path, tmp_path: Path) -> None:
    manifest = json.loads((adapter / "manifest.json").read_text())
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    (damaged / "manifest.json").write_text(json.dumps({"kind": manifest["kind"], "arm": "input"}))
    outcome = invoke("export-adapter", damaged, "--output-dir", tmp_path / "peft")
    assert outcome.code == 65
    assert "with hashes" in outcome.err


def test_an_arm_that_peft_lacks_is_an_error(adapter: Path, tmp_path: Path) -> None:
    outcome = invoke("export-adapter", adapter, "--output-dir", tmp_path / "peft")
    assert outcome.code == 65
    (line,) = outcome.errors
    assert "arm mop: PEFT has no such adapter, only input, prefix" in line
    assert left_behind(tmp_path) == []
    assert invoke("export-adapter", tmp_path, "--output-dir", tmp_path / "peft").code == 66
