"""A compression can be interrupted anywhere, and resumes to the very same result."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compression_cases import CALIBRATION_TOKENS
from resumable_runs import METADATA, PRUNE, ROUND, KilledError, compress_folder, folder_contents, stop_at
from safetensors.torch import load_file
from tiny_models import BLOCKS, saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.compress.sequential import compress_block, compress_model
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.entrypoints.inputs import CalibrationSet
from mopcompress.errors import DataError, NumericalError, OutputError, QualityGateError, StorageError
from mopcompress.models.quantization_grid import read_grid
from mopcompress.models.safetensors_io import tensor_locations
from mopcompress.recipe import SparseGPTModifier, load_recipe
from mopcompress.storage import artifacts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "dense", torch.float16)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(None, {"device": "cpu", "model": "unused"})


@pytest.fixture(scope="module")
def uninterrupted(source, recipe, tmp_path_factory):
    """A compression without an interruption."""
    target = tmp_path_factory.mktemp("whole") / "out"
    compress_folder(source, target, recipe)
    return target


# --- the result


def test_the_result_equals_compression_in_memory(source, uninterrupted):
    model = tiny_model()
    model.network.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    rows = compress_model(model, CALIBRATION_TOKENS, [method_config(PRUNE), method_config(ROUND)], dtype=torch.float16)
    stored, before = load_file(uninterrupted / "model.safetensors"), load_file(source / "model.safetensors")
    for name, weight in model.network.state_dict().items():
        assert stored[name].dtype == torch.float16
        assert torch.equal(stored[name].float(), weight), name
    assert {name for name in stored if not torch.equal(stored[name], before[name])} == {
        f"{row.name}.weight" for row in rows
    }


def test_stock_transformers_loads_the_result(uninterrupted):
    network, loading = AutoModelForCausalLM.from_pretrained(uninterrupted, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert bool(network(input_ids=CALIBRATION_TOKENS).logits.isfinite().all())


def test_a_row_counts_the_stored_weights(uninterrupted):
    stored = load_file(uninterrupted / "model.safetensors")
    rows = [json.loads(line) for line in (uninterrupted / "layers.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * BLOCKS
    for row in rows:
        assert row["zeros"] == int((stored[f"{row['name']}.weight"] == 0).sum()) >= row["weights"] // 2
    manifest = artifacts.read_manifest(uninterrupted)
    assert (manifest["weights"], manifest["zeros"]) == tuple(
        sum(row[field] for row in rows) for field in ("weights", "zeros")
    )


def test_weights_over_scales_are_integers(uninterrupted):
    grid, stored = read_grid(uninterrupted), load_file(uninterrupted / "model.safetensors")
    assert (grid.bits, grid.group_size, len(grid.scales)) == (4, 8, 7 * BLOCKS)
    for name, scales in grid.scales.items():
        weight = stored[f"{name}.weight"].float()
        codes = weight / scales.float().repeat_interleave(8, dim=1)
        assert float((codes - codes.round()).abs().max()) < 0.01
        assert -8 <= int(codes.round().min()) < int(codes.round().max()) <= 7


@pytest.mark.parametrize("modifiers", [[PRUNE], [ROUND.with_bits(3, 8), ROUND]])
def test_without_a_common_grid_there_is_no_grid_file(modifiers, source, recipe, tmp_path):
    compress_folder(source, tmp_path / "out", recipe, modifiers=modifiers)
    assert read_grid(tmp_path / "out") is None


def test_shards_and_their_index_stay(source, uninterrupted, recipe, tmp_path):
    model = tiny_model()
    model.network.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    folder = tmp_path / "shards"
    model.network.half().save_pretrained(folder, max_shard_size="15KB")
    model.tokenizer.save_pretrained(folder)
    compress_folder(folder, tmp_path / "out", recipe)
    names = {path.name for path in folder.glob("model*")}
    assert len(names) > 3
    assert {path.name for path in (tmp_path / "out").glob("model*")} == names
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()
    stored, expected = {}, load_file(uninterrupted / "model.safetensors")
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


# --- interrupted and resumed


@pytest.mark.parametrize(
    ("function", "count"),
    [
        ("overwrite", 1),  # before any block
        ("overwrite", 14),  # while writing the second block
        ("_save_atomically", 5),  # after the third block's weights, before its hidden states
        ("tensor_crc32", 2),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    function, count, source, uninterrupted, recipe, tmp_path, monkeypatch
):
    target, messages = tmp_path / "out", []
    with monkeypatch.context() as patch:
        stop_at(patch, function, count)
        with pytest.raises(KilledError):
            compress_folder(source, target, recipe)
    assert not target.exists()
    finished = len(list(artifacts.job_folder(target).glob("block-*.json")))
    with monkeypatch.context() as patch:
        computed = []

        def counted(model, tokens, hidden, index, *rest, **settings):
            computed.append(index)
            return compress_block(model, tokens, hidden, index, *rest, **settings)

        patch.setattr("mopcompress.entrypoints.compress.compress_block", counted)
        compress_folder(source, target, recipe, messages=messages)
    assert computed == list(range(finished, BLOCKS))
    assert any(f"going on after {finished} finished" in line for line in messages) == bool(finished)
    assert folder_contents(target) == folder_contents(uninterrupted)
    assert not artifacts.job_folder(target).exists()


def test_matching_the_dense_model_resumes_to_the_same_bytes(source, recipe, tmp_path, monkeypatch):
    def matching(modifier):
        return method_config(modifier).__class__(**vars(method_config(modifier)) | {"match_dense": 1.0})

    monkeypatch.setattr("mopcompress.entrypoints.compress.method_config", matching)
    compress_folder(source, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        stop_at(patch, "_save_atomically", 6)
        with pytest.raises(KilledError):
            compress_folder(source, tmp_path / "out", recipe)
    compress_folder(source, tmp_path / "out", recipe)
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "whole")


KILL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from resumable_runs import compress_folder
from mopcompress.recipe import load_recipe
from mopcompress.compress.checkpoint import CompressionCheckpoint

save_block = CompressionCheckpoint.save_block
def act(self, index, *rest):
    save_block(self, index, *rest)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
CompressionCheckpoint.save_block = act
compress_folder(Path({source!r}), Path({target!r}), load_recipe(None, {{"device": "cpu", "model": "unused"}}))
"""


def test_a_killed_process_resumes_after_the_last_block(source, uninterrupted, recipe, tmp_path):
    target = tmp_path / "out"
    code = KILL.format(tests=str(Path(__file__).parents[1]), source=str(source), target=str(target))
    child = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    messages = []
    compress_folder(source, target, recipe, messages=messages)
    assert any("going on after 2 finished blocks" in line for line in messages)
    assert folder_contents(target) == folder_contents(uninterrupted)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(bytes(content))


def interrupted(source, target, recipe, monkeypatch):
    """Return the checkpoint of a run that was interrupted after two blocks."""
    with monkeypatch.context() as patch:
        stop_at(patch, "_save_atomically", 5)
        with pytest.raises(KilledError):
            compress_folder(source, target, recipe)
    return artifacts.job_folder(target)


@pytest.mark.parametrize("damaged", ["model.layers.0.mlp.up_proj.weight", "states", "cut"])
def test_a_damaged_checkpoint_restarts(damaged, source, uninterrupted, recipe, tmp_path, monkeypatch):
    target, messages = tmp_path / "out", []
    folder = interrupted(source, target, recipe, monkeypatch)
    weights = folder / "model.safetensors.unfinished"
    if damaged == "states":
        flip(folder / "states-00001.safetensors", -1)
    elif damaged == "cut":
        weights.write_bytes(weights.read_bytes()[:20_000])
    else:
        flip(weights, tensor_locations(source)[damaged].offset + 3)
    compress_folder(source, target, recipe, messages=messages)
    assert "is damaged: beginning again" in messages[0]
    assert folder_contents(target) == folder_contents(uninterrupted)


def test_a_damaged_copy_of_an_uncompressed_tensor_raises(source, recipe, tmp_path, monkeypatch):
    folder = interrupted(source, tmp_path / "out", recipe, monkeypatch)
    flip(folder / "model.safetensors.unfinished", tensor_locations(source)["model.embed_tokens.weight"].offset + 3)
    with pytest.raises(StorageError, match=r"embed_tokens\.weight was not copied whole"):
        compress_folder(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modifiers": [ROUND]}, "method was 'sparsegpt', is 'gptq'"),
        ({"modifiers": [SparseGPTModifier(sparsity=0.6, block_size=8), ROUND]}, "sparsity was 0.5, is 0.6"),
        (
            {"calibration": CalibrationSet(CALIBRATION_TOKENS, METADATA | {"sha256": "of others"})},
            "calibration was 'of these tokens', is 'of others'",
        ),
    ],
)
def test_a_checkpoint_of_another_job_raises(changes, message, source, recipe, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, "_save_atomically", 3)
        with pytest.raises(KilledError):
            compress_folder(source, target, recipe)
    with pytest.raises(OutputError, match="unfinished work of another job") as caught:
        compress_folder(source, target, recipe, **changes)
    assert message in str(caught.value)
    assert len(list(artifacts.job_folder(target).glob("block-*.json"))) == 1


def test_two_processes_cannot_write_the_same_output(source, recipe, tmp_path):
    with artifacts.locked(artifacts.job_folder(tmp_path / "out")), pytest.raises(OutputError, match="in use"):
        compress_folder(source, tmp_path / "out", recipe)


# --- what is left behind


def test_an_error_that_would_come_again_leaves_nothing(source, recipe, tmp_path, monkeypatch):
    for error in (DataError, NumericalError):

        def fail(*_arguments, error=error, **_settings):
            raise error("again and again")

        monkeypatch.setattr("mopcompress.entrypoints.compress.compress_block", fail)
        with pytest.raises(error):
            compress_folder(source, tmp_path / "out", recipe)
        assert list(tmp_path.iterdir()) == []


def test_a_failed_quality_gate_leaves_the_checkpoint(source, uninterrupted, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counts = "mopcompress.entrypoints.compress.check_fallbacks"
        patch.setattr(counts, lambda *_arguments: (_ for _ in ()).throw(QualityGateError("too many")))
        with pytest.raises(QualityGateError):
            compress_folder(source, tmp_path / "out", recipe)
    messages = []
    compress_folder(source, tmp_path / "out", recipe, messages=messages)
    assert any(f"going on after {BLOCKS} finished blocks" in line for line in messages)
    assert folder_contents(tmp_path / "out") == folder_contents(uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_copied_where_links_fail(source, uninterrupted, recipe, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    compress_folder(source, tmp_path / "out", recipe)
    assert folder_contents(tmp_path / "out") == folder_contents(uninterrupted)
