"""Distillation: the divergence by its definition, the teacher, its place in training, and its cache."""

import shutil

import pytest
import torch
from factories import training_config
from safetensors import SafetensorError
from tiny_models import VOCABULARY, config_of, network_of, random_documents, saved, tiny_model
from torch.testing import assert_close

from mopcompress.entrypoints.teacher import build_distillation
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import response_logits
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import OpenedModel
from mopcompress.progress import silent
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recover import distillation
from mopcompress.recover.distillation import Distillation, Teacher, kl_divergence, top_k_distribution
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.training import fit
from mopcompress.storage import cache as storage_cache

LAYER, TOP = 2, 5
DOCUMENTS = random_documents(9)
ROWS = [4, 0, 7]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of cached results; few tokens of a distribution are stored."""
    monkeypatch.setattr(distillation, "TOP", TOP)
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "states"


def logits_of(seed, *, scored=6, scale=3.0):
    return scale * torch.randn(scored, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_divergence(teacher, student, temperature):
    """Sum p log(p / q) position by position, over the teacher's likeliest tokens and all others together."""
    divergences = []
    for student_logits, teacher_logits in zip(student, teacher, strict=True):
        p, q = (teacher_logits / temperature).softmax(0), (student_logits / temperature).softmax(0)
        best = sorted(range(VOCABULARY), key=lambda token: -float(p[token]))[:TOP]
        rest = [token for token in range(VOCABULARY) if token not in best]
        pairs = [(p[token], q[token]) for token in best] + [(p[rest].sum(), q[rest].sum())]
        divergences.append(temperature**2 * sum(p * (p / q).log() for p, q in pairs))
    return torch.stack(divergences)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_as_defined(temperature):
    teacher, student = logits_of(0), logits_of(1).requires_grad_()
    fast = kl_divergence(top_k_distribution(teacher, temperature=temperature), student, temperature=temperature)
    slow = slow_divergence(teacher, student, temperature)
    assert_close(fast, slow)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (from_fast,) = torch.autograd.grad((fast * weights).sum(), student)
    (from_slow,) = torch.autograd.grad((slow * weights).sum(), student)
    assert_close(from_fast, from_slow)


def test_stored_probabilities_sum_to_1_even_for_a_sure_teacher():
    logits = logits_of(2)
    logits[0, 3] = 200.0
    distribution = top_k_distribution(logits, temperature=1.0)
    assert_close(distribution.log_probs.exp().sum(1), torch.ones(6, dtype=torch.float64))
    assert bool(distribution.log_probs.isfinite().all())
    assert bool(kl_divergence(distribution, logits_of(3), temperature=1.0).isfinite().all())


def test_the_whole_vocabulary_gives_the_plain_divergence(monkeypatch):
    monkeypatch.setattr(distillation, "TOP", 10 * VOCABULARY)
    teacher, student = logits_of(4), logits_of(5)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    assert_close(kl_divergence(top_k_distribution(teacher, temperature=1.0), student, temperature=1.0), expected)


# --- the teacher


def teacher_of(model, *, temperature=1.0, batch_size=4):
    return Teacher(model, DOCUMENTS, temperature=temperature, batch_size=batch_size)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_equals_its_teacher_has_no_divergence(tiny_llama, temperature):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    batch = states.batch(ROWS)
    taught = teacher_of(tiny_llama, temperature=temperature).distributions(ROWS, tiny_llama.device)
    divergence = kl_divergence(taught, response_logits(tiny_llama, batch, LAYER), temperature=temperature)
    assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-5)


def test_the_teachers_entries_are_in_the_order_of_a_batch(tiny_llama):
    """The definition runs single documents without padding through the whole network."""
    taught = teacher_of(tiny_llama).distributions(ROWS, tiny_llama.device)
    expected = []
    for row in ROWS:
        document = DOCUMENTS[row]
        logits = tiny_llama.network(torch.tensor([document.tokens])).logits[0]
        expected.append(top_k_distribution(logits[document.context_tokens - 1 : -1], temperature=1.0))
    assert torch.equal(taught.tokens, torch.cat([distribution.tokens for distribution in expected]))
    expected_log_probs = torch.cat([distribution.log_probs for distribution in expected])
    assert_close(taught.log_probs, expected_log_probs, rtol=1e-4, atol=1e-4)


# --- in training


def prompt():
    drawn = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    return MixtureOfPrompts(drawn, LAYER, None, prompt_log_weight=-1.0)


def train(model, states, distilled, *, steps=4):
    adapter = prompt()
    settings = training_config(steps=steps, batch_size=9, gate_learning_rate=0.0, warmup_fraction=0.0)
    rows = fit(adapter, model, states, settings, distillation=distilled)
    return adapter, [row.nll for row in rows]


def test_a_fraction_of_0_trains_bitwise_as_without_a_teacher(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    plain, losses = train(tiny_llama, states, None)
    same, same_losses = train(tiny_llama, states, Distillation(teacher, 0.0))
    assert losses == same_losses
    assert torch.equal(plain.prompts, same.prompts)


def distance(model, states, adapter, teacher):
    batch = states.batch(range(len(DOCUMENTS)))
    with torch.no_grad(), adapter.active(model, batch.instructions):
        logits = response_logits(model, batch, LAYER)
    return float(
        kl_divergence(teacher.distributions(range(len(DOCUMENTS)), model.device), logits, temperature=1.0).mean()
    )


def test_distillation_brings_a_student_closer_than_text_does(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    initial = distance(tiny_llama, states, prompt(), teacher)
    on_text, _ = train(tiny_llama, states, None, steps=40)
    taught, _ = train(tiny_llama, states, Distillation(teacher, 1.0), steps=40)
    final = distance(tiny_llama, states, taught, teacher)
    assert final < 0.8 * initial
    assert final < distance(tiny_llama, states, on_text, teacher)


def test_the_loss_mixes_text_and_teacher_by_the_fraction(tiny_llama):
    teacher = teacher_of(tiny_model(seed=1), temperature=2.0)
    taught = teacher.distributions(ROWS, tiny_llama.device)
    student = logits_of(7, scored=len(taught.tokens)).float()
    divergence = kl_divergence(taught, student, temperature=2.0).mean()
    batch = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4).batch(ROWS)
    mixed = Distillation(teacher, 0.3).loss(torch.tensor(5.0), student, [], batch, ROWS)
    assert_close(mixed, 0.7 * 5.0 + 0.3 * divergence)


# --- the cache


@pytest.fixture
def folder(tmp_path):
    return saved(tiny_model(seed=1), tmp_path / "teacher")


@pytest.fixture
def teacher_runs(monkeypatch):
    """An entry per batch that a teacher ran on."""
    batches, compute = [], top_k_distribution

    def record(logits, *, temperature):
        batches.append(len(logits))
        return compute(logits, temperature=temperature)

    monkeypatch.setattr(distillation, "top_k_distribution", record)
    return batches


def teach(folder, model, *, documents=DOCUMENTS, **fields):
    """Return all distributions of a teacher, and its hidden states if the settings ask for them."""
    modifier = PromptRecoveryModifier(**{"distill": 0.5, "teacher": str(folder)} | fields)
    teacher = build_distillation(modifier, OpenedModel(folder, model), documents, 4, silent).teacher
    return teacher.distributions(range(len(documents)), model.device), teacher.hidden_states


def same(first, second):
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.log_probs, second.log_probs)


def test_a_second_run_reads_the_same_distributions_to_the_bit(folder, tiny_llama, teacher_runs, cache):
    first, _ = teach(folder, tiny_llama)
    computed = len(teacher_runs)
    again, _ = teach(folder, tiny_llama, distill=0.25, arm="lora")
    assert len(teacher_runs) == computed == 3
    assert same(first, again)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("other", ["weights", "config", "documents", "temperature", "top"])
def test_other_teachers_rows_and_settings_are_kept_apart(
    folder, tiny_llama, teacher_runs, cache, tmp_path, monkeypatch, other
):
    teach(folder, tiny_llama)
    computed, fields, teacher = len(teacher_runs), {}, folder
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
    teach(teacher, tiny_llama, **fields)
    assert len(teacher_runs) > computed
    assert len(list(cache.iterdir())) == 2


def test_damaged_distributions_are_computed_again(folder, tiny_llama, teacher_runs, cache):
    first, _ = teach(folder, tiny_llama)
    computed = len(teacher_runs)
    (entry,) = cache.iterdir()
    path = entry / "distributions.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    again, _ = teach(folder, tiny_llama)
    assert len(teacher_runs) == 2 * computed
    assert same(first, again)


def test_an_interrupted_teacher_leaves_nothing(folder, tiny_llama, cache, monkeypatch):
    def stop(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "top_k_distribution", stop)
    with pytest.raises(KeyboardInterrupt):
        teach(folder, tiny_llama)
    assert not list(cache.iterdir())


def test_a_full_disk_costs_only_the_cache(folder, tiny_llama, cache, monkeypatch):
    def fail(*_arguments, **_settings):
        raise SafetensorError("No space left on device (os error 28)")

    expected, _ = teach(folder, tiny_llama)
    shutil.rmtree(cache)
    monkeypatch.setattr(distillation, "save_file", fail)
    computed, _ = teach(folder, tiny_llama)
    assert same(computed, expected)
    assert not list(cache.iterdir())


def test_distributions_that_cannot_be_stored_are_computed(folder, tiny_llama, cache, monkeypatch):
    expected, _ = teach(folder, tiny_llama)
    monkeypatch.setattr(storage_cache, "LIMIT", 10)
    computed, _ = teach(folder, tiny_llama, documents=DOCUMENTS[:8])
    count = len(computed.tokens)
    assert torch.equal(computed.tokens, expected.tokens[:count])
    assert len(list(cache.iterdir())) == 1


def test_the_teacher_runs_again_for_hidden_states(folder, tiny_llama, teacher_runs):
    first, states = teach(folder, tiny_llama)
    assert states is None
    computed = len(teacher_runs)
    again, states = teach(folder, tiny_llama, squarehead=1.0)
    assert len(teacher_runs) == 2 * computed
    assert states is not None
    assert same(first, again)
