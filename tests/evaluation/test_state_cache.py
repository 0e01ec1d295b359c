"""Hidden states that another run, arm or seed reads from the cache."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_models import BLOCKS, config_of, network_of, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.evaluation.perplexity import evaluate
from mopcompress.evaluation.state_cache import load_or_compute_states
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import silent
from mopcompress.storage import cache as storage_cache

DOCUMENTS = random_documents(7)
LAYER = 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path))
    return tmp_path / "states"


def load_states(model, *, sha256="of the weights", documents=DOCUMENTS, layer=LAYER, dtype=torch.float32):
    return load_or_compute_states(model, sha256, documents, layer, 4, "rows", silent, dtype=dtype)


@pytest.fixture
def entered(monkeypatch):
    """The layers that lower blocks were run up to, an entry per batch."""
    layers, run_lower = [], LanguageModel.run_lower

    def record(model, tokens, layer):
        layers.append(layer)
        return run_lower(model, tokens, layer)

    monkeypatch.setattr(LanguageModel, "run_lower", record)
    return layers


def tensors_of(states):
    batch = states.batch(range(len(states.documents)))
    return batch.hidden, batch.instructions.hidden, batch.instructions.mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_second_run_reads_the_same_states_to_the_bit(tiny_llama, entered, dtype):
    first = load_states(tiny_llama, dtype=dtype)
    computed = len(entered)
    again = load_states(tiny_llama, dtype=dtype)
    assert len(entered) == computed == 3  # the check of the blocks, and two batches
    assert all(torch.equal(*pair) for pair in zip(tensors_of(first), tensors_of(again), strict=True))


@pytest.mark.parametrize(
    "other",
    [{"sha256": "others"}, {"documents": DOCUMENTS[:6]}, {"layer": 1}, {"dtype": torch.float16}],
    ids=lambda other: next(iter(other)),
)
def test_other_weights_rows_layers_and_dtypes_are_kept_apart(tiny_llama, entered, cache, other):
    load_states(tiny_llama)
    computed = len(entered)
    load_states(tiny_llama, **other)
    assert len(entered) > computed
    assert len(list(cache.iterdir())) == 2


def test_the_same_weights_under_another_config_are_kept_apart(tiny_llama, cache):
    other = LanguageModel(network_of(config_of("llama", rms_norm_eps=1.0)), tiny_llama.tokenizer)
    first, second = (tensors_of(load_states(model)) for model in (tiny_llama, other))
    assert not torch.allclose(first[0], second[0])
    assert len(list(cache.iterdir())) == 2


def test_a_moved_model_finds_its_states(tiny_llama, entered):
    load_states(tiny_llama)
    computed = len(entered)
    moved = LanguageModel(network_of(config_of("llama")), tiny_llama.tokenizer)
    moved.network.config._name_or_path = "/another/folder"
    load_states(moved)
    assert len(entered) == computed


def test_float16_rounds_and_takes_half_the_space(tiny_llama, cache):
    whole, half = load_states(tiny_llama), load_states(tiny_llama, dtype=torch.float16)
    assert_close(tensors_of(half)[0], tensors_of(whole)[0].half().float(), rtol=0, atol=0)
    assert torch.equal(tensors_of(half)[2], tensors_of(whole)[2])  # means are of the exact states
    small, large = sorted((path / "states").stat().st_size for path in cache.iterdir())
    assert large == 2 * small
    scores = [evaluate(tiny_llama, states, batch_size=4).nats for states in (half, whole)]
    assert math.fsum(scores[0]) == pytest.approx(math.fsum(scores[1]), rel=1e-4)


def test_states_beyond_float16_are_kept_in_float32(cache):
    model = tiny_model()
    with torch.no_grad():
        model.network.model.embed_tokens.weight.mul_(1e6)
    stored = tensors_of(load_states(model, dtype=torch.float16))[0]
    assert float(stored.abs().max()) > 65504
    assert torch.equal(stored, tensors_of(load_states(model))[0])
    assert torch.equal(stored, tensors_of(load_states(model, dtype=torch.float16))[0])


@pytest.mark.parametrize("name", ["states", "summaries.safetensors", "manifest.json"])
def test_a_damaged_file_is_computed_again(tiny_llama, entered, cache, name):
    before = tensors_of(load_states(tiny_llama))
    computed = len(entered)
    (folder,) = cache.iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    after = tensors_of(load_states(tiny_llama))
    assert len(entered) == 2 * computed
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert (folder / name).stat().st_size == len(whole)


def test_an_interrupted_run_leaves_nothing(tiny_llama, cache, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "run_lower", stop)
    with pytest.raises(KeyboardInterrupt):
        load_states(tiny_llama)
    assert not list(cache.iterdir())


def test_the_least_recently_used_states_make_room(tiny_llama, entered, cache, monkeypatch):
    for layer in (1, 2):
        load_states(tiny_llama, layer=layer)
    folders = list(cache.iterdir())
    size = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in folders)
    monkeypatch.setattr(storage_cache, "LIMIT", int(2.5 * size))
    load_states(tiny_llama, layer=1)  # used again
    load_states(tiny_llama, layer=BLOCKS - 1)
    assert len(list(cache.iterdir())) == 2
    computed = len(entered)
    load_states(tiny_llama, layer=1)
    assert len(entered) == computed
    load_states(tiny_llama, layer=2)
    assert len(entered) > computed


def test_the_scratch_folder_of_a_living_process_stays(tiny_llama, cache, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living, abandoned = (cache / f".states.partial-{process}" for process in (os.getpid(), dead.pid))
    for folder in (living, abandoned):
        folder.mkdir(parents=True)
        (folder / "states").write_bytes(bytes(1000))
    load_states(tiny_llama)
    monkeypatch.setattr(storage_cache, "LIMIT", sum(file.stat().st_size for file in cache.glob("[!.]*/*")) + 500)
    load_states(tiny_llama, layer=LAYER - 1)
    assert living.is_dir()
    assert not abandoned.exists()


def test_states_that_another_process_removes_are_computed(tiny_llama, cache, monkeypatch):
    expected = tensors_of(load_states(tiny_llama))
    monkeypatch.setattr(storage_cache, "is_intact", lambda _folder: shutil.rmtree(_folder, ignore_errors=True) or True)
    states = tensors_of(load_states(tiny_llama))
    assert all(torch.equal(*pair) for pair in zip(expected, states, strict=True))


@pytest.mark.parametrize("reason", ["too large", "no folder"])
def test_states_that_cannot_be_stored_are_computed(tiny_llama, cache, monkeypatch, reason):
    expected = tensors_of(load_states(tiny_llama, dtype=torch.float16))
    if reason == "too large":
        monkeypatch.setattr(storage_cache, "LIMIT", 10)
        entries = len(list(cache.iterdir()))
    else:
        cache.parent.joinpath("file").write_text("in the way")
        monkeypatch.setenv("MOPCOMPRESS_CACHE", str(cache.parent / "file"))
    states = tensors_of(load_states(tiny_llama, sha256="others", dtype=torch.float16))
    assert all(torch.equal(*pair) for pair in zip(expected, states, strict=True))
    assert reason != "too large" or len(list(cache.iterdir())) == entries
