"""What a teacher said, which another run, arm or process takes up again."""

import shutil

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import config_of, network_of, random_documents, saved, tiny_model

from mopcompress.entrypoints.teacher import build_distillation
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import silent
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recover import distillation
from mopcompress.storage import cache as storage_cache

DOCUMENTS = random_documents(9)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distillation, "TOP", 5)
    return tmp_path / "cache" / "states"


@pytest.fixture
def folder(tmp_path):
    return saved(tiny_model(seed=1), tmp_path / "teacher")


@pytest.fixture
def asked(monkeypatch):
    """One entry a batch that a teacher was run on."""
    seen, keep = [], distillation.top_k_distribution
    monkeypatch.setattr(
        distillation, "top_k_distribution", lambda *given, **more: seen.append(given) or keep(*given, **more)
    )
    return seen


def said(folder, model, *, documents=DOCUMENTS, **fields):
    """All that a teacher says, and its hidden states if it was asked for them."""
    modifier = PromptRecoveryModifier(**{"distill": 0.5, "teacher": str(folder)} | fields)
    teacher = build_distillation(modifier, folder, model, documents, 4, silent).teacher
    return teacher.distributions(range(len(documents)), model.device), teacher.hidden_states


def same(first, second):
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.log_probs, second.log_probs)


def test_a_second_run_asks_nobody_and_has_the_same_distributions_to_the_bit(folder, tiny_llama, asked, cache):
    first, _ = said(folder, tiny_llama)
    computed = len(asked)
    again, _ = said(folder, tiny_llama, distill=0.25, arm="lora")
    assert len(asked) == computed == 3
    assert same(first, again)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("other", ["weights", "config", "documents", "temperature", "top"])
def test_other_teachers_rows_temperatures_and_numbers_of_tokens_are_kept_apart(
    folder, tiny_llama, asked, cache, tmp_path, monkeypatch, other
):
    said(folder, tiny_llama)
    computed, fields, teacher = len(asked), {}, folder
    match other:
        case "weights":
            teacher = saved(tiny_model(seed=2), tmp_path / "other")
        case "config":
            changed = network_of(config_of("llama", rms_norm_eps=1.0), seed=1)
            teacher = saved(LanguageModel(changed, tiny_llama.tokenizer), tmp_path / "other")
        case "documents":
            fields = {"documents": DOCUMENTS[:8]}
        case "temperature":
            fields = {"distill_temperature": 2.0}
        case "top":
            monkeypatch.setattr(distillation, "TOP", 6)
    said(teacher, tiny_llama, **fields)
    assert len(asked) > computed
    assert len(list(cache.iterdir())) == 2


def test_what_is_damaged_is_made_again(folder, tiny_llama, asked, cache):
    first, _ = said(folder, tiny_llama)
    computed = len(asked)
    (kept_folder,) = cache.iterdir()
    path = kept_folder / "distributions.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    again, _ = said(folder, tiny_llama)
    assert len(asked) == 2 * computed
    assert same(first, again)


def test_a_run_that_stops_half_way_leaves_nothing(folder, tiny_llama, cache, monkeypatch):
    def stop(*_given, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "top_k_distribution", stop)
    with pytest.raises(KeyboardInterrupt):
        said(folder, tiny_llama)
    assert not list(cache.iterdir())


def test_a_full_disk_costs_only_the_keeping(folder, tiny_llama, cache, monkeypatch):
    def full(*_given, **_more):
        raise SafetensorError("No space left on device (os error 28)")

    expected, _ = said(folder, tiny_llama)
    shutil.rmtree(cache)
    monkeypatch.setattr(distillation, "save_file", full)
    found, _ = said(folder, tiny_llama)
    assert same(found, expected)
    assert not list(cache.iterdir())


def test_what_cannot_be_kept_is_computed_all_the_same(folder, tiny_llama, cache, monkeypatch):
    expected, _ = said(folder, tiny_llama)
    monkeypatch.setattr(storage_cache, "LIMIT", 10)
    found, _ = said(folder, tiny_llama, documents=DOCUMENTS[:8])
    count = len(found.tokens)
    assert torch.equal(found.tokens, expected.tokens[:count])
    assert len(list(cache.iterdir())) == 1


def test_hidden_states_are_never_kept_so_the_teacher_is_run_for_them(folder, tiny_llama, asked):
    first, states = said(folder, tiny_llama)
    assert states is None
    computed = len(asked)
    again, states = said(folder, tiny_llama, squarehead=1.0)
    assert len(asked) == 2 * computed
    assert states is not None
    assert same(first, again)
