"""A compression can be stopped anywhere, and goes on to the very same result."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import on_progress
from safetensors.torch import load_file
from tiny_models import BLOCKS, random_tokens, saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.compress.sequential import compress_block, compress_model
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.errors import DataError, NumericalError, OutputError, QualityGateError, StorageError
from mopcompress.models.quantization_grid import read_grid
from mopcompress.models.safetensors_io import tensor_locations
from mopcompress.recipe import GPTQModifier, SparseGPTModifier, load_recipe
from mopcompress.storage import artifacts

TOKENS = random_tokens(6, 20)
FACTS = {"source": "here", "sha256": "of these tokens"}
PRUNE = SparseGPTModifier(sparsity=0.5, block_size=8)
ROUND = GPTQModifier.model_validate(
    {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 8}}}}
)
CLOCKS = ("compress_seconds", "peak_bytes", "files", "recipe", "base")


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tiny_model(), tmp_path_factory.mktemp("models") / "dense", torch.float16)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(None, {"device": "cpu", "model": "unused"})


def run(source, target, recipe, *, modifiers=(PRUNE, ROUND), facts=FACTS, told=None):
    def progress(line, _done, _all):
        if told is not None:
            told.append(line)

    return compress_into(target, source, list(modifiers), TOKENS, facts, recipe, progress=on_progress(progress))


@pytest.fixture(scope="module")
def whole(source, recipe, tmp_path_factory):
    """A compression that nothing stopped."""
    target = tmp_path_factory.mktemp("whole") / "out"
    run(source, target, recipe)
    return target


def contents(folder):
    """All that does not depend on the machine's speed."""
    rows = [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]
    facts = {name: value for name, value in artifacts.read_manifest(folder).items() if name not in CLOCKS}
    others = {"layers.jsonl", "manifest.json", "grid.safetensors"}  # the order of a grid's metadata is not fixed
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in others}
    scales = {name: scale.tolist() for name, scale in read_grid(folder).scales.items()}
    return [row | {"seconds": 0} for row in rows], facts, files, scales


def stop(monkeypatch, what, count):
    """Let the `count`-th call of a function of the job end everything, before it does what it does."""
    original, calls = getattr(checkpoint, what), []

    def act(*arguments):
        calls.append(what)
        if len(calls) == count:
            raise KilledError
        return original(*arguments)

    monkeypatch.setattr(checkpoint, what, act)


# --- the result


def test_the_result_is_what_compressing_in_memory_gives(source, whole):
    model = tiny_model()
    model.network.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    rows = compress_model(model, TOKENS, [method_config(PRUNE), method_config(ROUND)], dtype=torch.float16)
    stored, before = load_file(whole / "model.safetensors"), load_file(source / "model.safetensors")
    for name, weight in model.network.state_dict().items():
        assert stored[name].dtype == torch.float16
        assert torch.equal(stored[name].float(), weight), name
    assert {name for name in stored if not torch.equal(stored[name], before[name])} == {
        f"{row.name}.weight" for row in rows
    }


def test_stock_transformers_loads_the_result(whole):
    network, loading = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert bool(network(input_ids=TOKENS).logits.isfinite().all())


def test_a_row_counts_what_was_written(whole):
    stored = load_file(whole / "model.safetensors")
    rows = [json.loads(line) for line in (whole / "layers.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * BLOCKS
    for row in rows:
        assert row["zeros"] == int((stored[f"{row['name']}.weight"] == 0).sum()) >= row["weights"] // 2
    facts = artifacts.read_manifest(whole)
    assert (facts["weights"], facts["zeros"]) == tuple(sum(row[one] for row in rows) for one in ("weights", "zeros"))


def test_the_grid_gives_the_integers_back(whole):
    grid, stored = read_grid(whole), load_file(whole / "model.safetensors")
    assert (grid.bits, grid.group_size, len(grid.scales)) == (4, 8, 7 * BLOCKS)
    for name, scales in grid.scales.items():
        weight = stored[f"{name}.weight"].float()
        codes = weight / scales.float().repeat_interleave(8, dim=1)
        assert float((codes - codes.round()).abs().max()) < 0.01
        assert -8 <= int(codes.round().min()) < int(codes.round().max()) <= 7


@pytest.mark.parametrize("modifiers", [[PRUNE], [ROUND.with_bits(3, 8), ROUND]])
def test_without_one_grid_there_is_no_grid_file(modifiers, source, recipe, tmp_path):
    run(source, tmp_path / "out", recipe, modifiers=modifiers)
    assert read_grid(tmp_path / "out") is None


def test_shards_and_their_index_stay_as_they_were(source, whole, recipe, tmp_path):
    model = tiny_model()
    model.network.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    folder = tmp_path / "shards"
    model.network.half().save_pretrained(folder, max_shard_size="15KB")
    model.tokenizer.save_pretrained(folder)
    run(folder, tmp_path / "out", recipe)
    names = {path.name for path in folder.glob("model*")}
    assert len(names) > 3
    assert {path.name for path in (tmp_path / "out").glob("model*")} == names
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()
    stored, expected = {}, load_file(whole / "model.safetensors")
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


# --- stopped and gone on


@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("overwrite", 1),  # nothing is finished yet
        ("overwrite", 14),  # in the midst of writing the second block
        ("_save_whole", 5),  # the third block's weights are there, its hidden states are not
        ("_checksum", 2),
    ],
)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(what, count, source, whole, recipe, tmp_path, monkeypatch):
    target, told = tmp_path / "out", []
    with monkeypatch.context() as patch:
        stop(patch, what, count)
        with pytest.raises(KilledError):
            run(source, target, recipe)
    assert not target.exists()
    finished = len(list(artifacts.job_folder(target).glob("block-*.json")))
    with monkeypatch.context() as patch:
        computed = []

        def counted(model, tokens, hidden, index, *rest, **settings):
            computed.append(index)
            return compress_block(model, tokens, hidden, index, *rest, **settings)

        patch.setattr("mopcompress.entrypoints.compress.compress_block", counted)
        run(source, target, recipe, told=told)
    assert computed == list(range(finished, BLOCKS))
    assert any(f"going on after {finished} finished" in line for line in told) == bool(finished)
    assert contents(target) == contents(whole)
    assert not artifacts.job_folder(target).exists()


def test_stopped_while_matching_the_dense_model_it_goes_on_to_the_same_bytes(source, recipe, tmp_path, monkeypatch):
    def matching(modifier):
        return method_config(modifier).__class__(**vars(method_config(modifier)) | {"match_dense": 1.0})

    monkeypatch.setattr("mopcompress.entrypoints.from_recipe.method_config", matching)
    run(source, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        stop(patch, "_save_whole", 6)
        with pytest.raises(KilledError):
            run(source, tmp_path / "out", recipe)
    run(source, tmp_path / "out", recipe)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from compress.test_checkpoint import run
from mopcompress.recipe import load_recipe
from mopcompress.compress.checkpoint import CompressionCheckpoint

finish = CompressionCheckpoint.finish
def act(self, index, *rest):
    finish(self, index, *rest)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
CompressionCheckpoint.finish = act
run(Path({source!r}), Path({target!r}), load_recipe(None, {{"device": "cpu", "model": "unused"}}))
"""


def test_a_killed_process_goes_on_after_the_last_finished_block(source, whole, recipe, tmp_path):
    target = tmp_path / "out"
    code = KILL.format(tests=str(Path(__file__).parents[1]), source=str(source), target=str(target))
    child = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    told = []
    run(source, target, recipe, told=told)
    assert any("going on after 2 finished blocks" in line for line in told)
    assert contents(target) == contents(whole)


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(bytes(content))


def stopped(source, target, recipe, monkeypatch):
    """Work that was stopped after two blocks."""
    with monkeypatch.context() as patch:
        stop(patch, "_save_whole", 5)
        with pytest.raises(KilledError):
            run(source, target, recipe)
    return artifacts.job_folder(target)


@pytest.mark.parametrize("damaged", ["model.layers.0.mlp.up_proj.weight", "states", "cut"])
def test_work_that_is_damaged_is_begun_again(damaged, source, whole, recipe, tmp_path, monkeypatch):
    target, told = tmp_path / "out", []
    folder = stopped(source, target, recipe, monkeypatch)
    weights = folder / "model.safetensors.unfinished"
    if damaged == "states":
        flip(folder / "states-00001.safetensors", -1)
    elif damaged == "cut":
        weights.write_bytes(weights.read_bytes()[:20_000])
    else:
        flip(weights, tensor_locations(source)[damaged].offset + 3)
    run(source, target, recipe, told=told)
    assert "is damaged: beginning again" in told[0]
    assert contents(target) == contents(whole)


def test_a_copy_of_what_is_not_compressed_that_is_damaged_is_an_error(source, recipe, tmp_path, monkeypatch):
    folder = stopped(source, tmp_path / "out", recipe, monkeypatch)
    flip(folder / "model.safetensors.unfinished", tensor_locations(source)["model.embed_tokens.weight"].offset + 3)
    with pytest.raises(StorageError, match=r"embed_tokens\.weight was not copied whole"):
        run(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"modifiers": [ROUND]}, "method was 'sparsegpt', is 'gptq'"),
        ({"modifiers": [SparseGPTModifier(sparsity=0.6, block_size=8), ROUND]}, "sparsity was 0.5, is 0.6"),
        ({"facts": FACTS | {"sha256": "of others"}}, "calibration was 'of these tokens', is 'of others'"),
    ],
)
def test_unfinished_work_of_another_job_is_refused(changed, says, source, recipe, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop(patch, "_save_whole", 3)
        with pytest.raises(KilledError):
            run(source, target, recipe)
    with pytest.raises(OutputError, match="unfinished work of another job") as caught:
        run(source, target, recipe, **changed)
    assert says in str(caught.value)
    assert len(list(artifacts.job_folder(target).glob("block-*.json"))) == 1


def test_two_processes_do_not_work_on_one_output(source, recipe, tmp_path):
    with artifacts.locked(artifacts.job_folder(tmp_path / "out")), pytest.raises(OutputError, match="in use"):
        run(source, tmp_path / "out", recipe)


# --- what is left behind


def test_an_error_that_would_come_again_leaves_nothing(source, recipe, tmp_path, monkeypatch):
    for error in (DataError, NumericalError):

        def fail(*_arguments, error=error, **_settings):
            raise error("again and again")

        monkeypatch.setattr("mopcompress.entrypoints.compress.compress_block", fail)
        with pytest.raises(error):
            run(source, tmp_path / "out", recipe)
        assert list(tmp_path.iterdir()) == []


def test_work_that_failed_the_quality_gate_is_kept(source, whole, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        counts = "mopcompress.entrypoints.compress.check_fallbacks"
        patch.setattr(counts, lambda *_arguments: (_ for _ in ()).throw(QualityGateError("too many")))
        with pytest.raises(QualityGateError):
            run(source, tmp_path / "out", recipe)
    told = []
    run(source, tmp_path / "out", recipe, told=told)
    assert any(f"going on after {BLOCKS} finished blocks" in line for line in told)
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_links_cannot_be_made_files_are_copied(source, whole, recipe, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    run(source, tmp_path / "out", recipe)
    assert contents(tmp_path / "out") == contents(whole)
