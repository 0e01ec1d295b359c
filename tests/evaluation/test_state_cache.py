"""Lower states that another run, arm or seed takes up again."""

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


def states_of(model, *, sha256="of the weights", documents=DOCUMENTS, layer=LAYER, dtype=torch.float32):
    return load_or_compute_states(model, sha256, documents, layer, 4, "rows", silent, dtype=dtype)


@pytest.fixture
def entered(monkeypatch):
    """The layers that lower blocks were run up to, once a batch."""
    seen, enter = [], LanguageModel.run_lower
    monkeypatch.setattr(LanguageModel, "run_lower", lambda self, *given: seen.append(given[1]) or enter(self, *given))
    return seen


def everything(states):
    batch = states.batch(range(len(states.documents)))
    return batch.hidden, batch.instructions.hidden, batch.instructions.mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_second_run_computes_nothing_and_has_the_same_states_to_the_bit(tiny_llama, entered, dtype):
    first = states_of(tiny_llama, dtype=dtype)
    computed = len(entered)
    again = states_of(tiny_llama, dtype=dtype)
    assert len(entered) == computed == 3  # the check of the blocks, and two batches
    assert all(torch.equal(*pair) for pair in zip(everything(first), everything(again), strict=True))


@pytest.mark.parametrize(
    "other",
    [{"sha256": "others"}, {"documents": DOCUMENTS[:6]}, {"layer": 1}, {"dtype": torch.float16}],
    ids=lambda other: next(iter(other)),
)
def test_other_weights_rows_layers_or_precisions_are_kept_apart(tiny_llama, entered, cache, other):
    states_of(tiny_llama)
    computed = len(entered)
    states_of(tiny_llama, **other)
    assert len(entered) > computed
    assert len(list(cache.iterdir())) == 2


def test_the_same_weights_under_another_config_are_kept_apart(tiny_llama, cache):
    other = LanguageModel(network_of(config_of("llama", rms_norm_eps=1.0)), tiny_llama.tokenizer)
    before, found = (everything(states_of(model)) for model in (tiny_llama, other))
    assert not torch.allclose(before[0], found[0])
    assert len(list(cache.iterdir())) == 2


def test_a_model_that_was_moved_finds_its_states(tiny_llama, entered):
    states_of(tiny_llama)
    computed = len(entered)
    moved = LanguageModel(network_of(config_of("llama")), tiny_llama.tokenizer)
    moved.network.config._name_or_path = "/another/folder"
    states_of(moved)
    assert len(entered) == computed


def test_float16_is_the_same_to_its_rounding_and_half_the_size(tiny_llama, cache):
    whole, half = states_of(tiny_llama), states_of(tiny_llama, dtype=torch.float16)
    assert_close(everything(half)[0], everything(whole)[0].half().float(), rtol=0, atol=0)
    assert torch.equal(everything(half)[2], everything(whole)[2])  # summaries are of the exact states
    small, large = sorted((path / "states").stat().st_size for path in cache.iterdir())
    assert large == 2 * small
    scores = [evaluate(tiny_llama, one, batch_size=4).nats for one in (half, whole)]
    assert math.fsum(scores[0]) == pytest.approx(math.fsum(scores[1]), rel=1e-4)


def test_states_beyond_float16_are_kept_in_float32(cache):
    model = tiny_model()
    with torch.no_grad():
        model.network.model.embed_tokens.weight.mul_(1e6)
    found = everything(states_of(model, dtype=torch.float16))[0]
    assert float(found.abs().max()) > 65504
    assert torch.equal(found, everything(states_of(model))[0])
    assert torch.equal(found, everything(states_of(model, dtype=torch.float16))[0])


@pytest.mark.parametrize("name", ["states", "summaries.safetensors", "manifest.json"])
def test_a_damaged_file_is_noticed_and_made_again(tiny_llama, entered, cache, name):
    before = everything(states_of(tiny_llama))
    computed = len(entered)
    (folder,) = cache.iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    after = everything(states_of(tiny_llama))
    assert len(entered) == 2 * computed
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert (folder / name).stat().st_size == len(whole)


def test_a_run_that_stops_half_way_leaves_nothing(tiny_llama, cache, monkeypatch):
    def stop(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "run_lower", stop)
    with pytest.raises(KeyboardInterrupt):
        states_of(tiny_llama)
    assert not list(cache.iterdir())


def test_what_was_not_used_for_longest_makes_room(tiny_llama, entered, cache, monkeypatch):
    for layer in (1, 2):
        states_of(tiny_llama, layer=layer)
    folders = list(cache.iterdir())
    size = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in folders)
    monkeypatch.setattr(storage_cache, "LIMIT", int(2.5 * size))
    states_of(tiny_llama, layer=1)  # used again
    states_of(tiny_llama, layer=BLOCKS - 1)
    assert len(list(cache.iterdir())) == 2
    computed = len(entered)
    states_of(tiny_llama, layer=1)
    assert len(entered) == computed
    states_of(tiny_llama, layer=2)
    assert len(entered) > computed


def test_room_is_never_made_of_what_a_living_process_builds(tiny_llama, cache, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, left = (cache / f".states.partial-{process}" for process in (os.getpid(), gone.pid))
    for folder in (alive, left):
        folder.mkdir(parents=True)
        (folder / "states").write_bytes(bytes(1000))
    states_of(tiny_llama)
    monkeypatch.setattr(storage_cache, "LIMIT", sum(file.stat().st_size for file in cache.glob("[!.]*/*")) + 500)
    states_of(tiny_llama, layer=LAYER - 1)
    assert alive.is_dir()
    assert not left.exists()


def test_states_that_another_process_takes_away_are_computed(tiny_llama, cache, monkeypatch):
    expected = everything(states_of(tiny_llama))
    monkeypatch.setattr(storage_cache, "is_intact", lambda _folder: shutil.rmtree(_folder, ignore_errors=True) or True)
    found = everything(states_of(tiny_llama))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("reason", ["too large", "no folder"])
def test_what_cannot_be_kept_is_computed_all_the_same(tiny_llama, cache, monkeypatch, reason):
    expected = everything(states_of(tiny_llama, dtype=torch.float16))
    if reason == "too large":
        monkeypatch.setattr(storage_cache, "LIMIT", 10)
        there = len(list(cache.iterdir()))
    else:
        cache.parent.joinpath("file").write_text("in the way")
        monkeypatch.setenv("MOPCOMPRESS_CACHE", str(cache.parent / "file"))
    found = everything(states_of(tiny_llama, sha256="others", dtype=torch.float16))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert reason != "too large" or len(list(cache.iterdir())) == there
