import json
import shutil

import pytest
import torch
from cli_runner import invoke, write_data
from factories import on_progress
from safetensors.torch import save_file
from tiny_models import VOCABULARY, random_documents, saved, tiny_model
from torch.testing import assert_close

from mopcompress.entrypoints.teacher import build_distillation, dense_folder
from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import response_logits
from mopcompress.models.model_loading import weights_hash
from mopcompress.progress import silent
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recover import distillation
from mopcompress.recover.distillation import Distillation, Teacher, kl_divergence, top_k_distribution
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.training import TrainingConfig, fit

LAYER, TOP = 2, 5
DOCUMENTS = random_documents(9)
ROWS = [4, 0, 7]


@pytest.fixture(autouse=True)
def _few_kept(monkeypatch):
    monkeypatch.setattr(distillation, "TOP", TOP)


def logits_of(seed, *, scored=6, scale=3.0):
    return scale * torch.randn(scored, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_divergence(teacher, student, temperature):
    """Token after token: the sum of p log(p / q) over the teacher's likeliest tokens and all others in one."""
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = (theirs / temperature).softmax(0), (ours / temperature).softmax(0)
        best = sorted(range(VOCABULARY), key=lambda token: -float(p[token]))[:TOP]
        rest = [token for token in range(VOCABULARY) if token not in best]
        pairs = [(p[token], q[token]) for token in best] + [(p[rest].sum(), q[rest].sum())]
        found.append(temperature**2 * sum(one * (one / other).log() for one, other in pairs))
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_the_definitions(temperature):
    teacher, student = logits_of(0), logits_of(1).requires_grad_()
    fast = kl_divergence(top_k_distribution(teacher, temperature=temperature), student, temperature=temperature)
    slow = slow_divergence(teacher, student, temperature)
    assert_close(fast, slow)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (from_fast,) = torch.autograd.grad((fast * weights).sum(), student)
    (from_slow,) = torch.autograd.grad((slow * weights).sum(), student)
    assert_close(from_fast, from_slow)


def test_what_is_kept_is_a_distribution_even_where_next_to_nothing_is_left():
    logits = logits_of(2)
    logits[0, 3] = 200.0
    kept = top_k_distribution(logits, temperature=1.0)
    assert_close(kept.log_probs.exp().sum(1), torch.ones(6, dtype=torch.float64))
    assert bool(kept.log_probs.isfinite().all())
    assert bool(kl_divergence(kept, logits_of(3), temperature=1.0).isfinite().all())


def test_a_vocabulary_that_is_kept_whole_gives_the_plain_divergence(monkeypatch):
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
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_llama, temperature):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    batch = states.batch(ROWS)
    kept = teacher_of(tiny_llama, temperature=temperature).distributions(ROWS, tiny_llama.device)
    far = kl_divergence(kept, response_logits(tiny_llama, batch, LAYER), temperature=temperature)
    assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-5)


def test_the_teachers_entries_stand_where_the_batch_scores_them(tiny_llama):
    """Documents one at a time, without padding, from the whole network."""
    kept = teacher_of(tiny_llama).distributions(ROWS, tiny_llama.device)
    expected = []
    for row in ROWS:
        document = DOCUMENTS[row]
        logits = tiny_llama.network(torch.tensor([document.tokens])).logits[0]
        expected.append(top_k_distribution(logits[document.context_tokens - 1 : -1], temperature=1.0))
    assert kept.tokens.tolist() == [tokens for one in expected for tokens in one.tokens.tolist()]
    assert_close(kept.log_probs, torch.cat([one.log_probs for one in expected]), rtol=1e-4, atol=1e-4)


# --- in training


def prompt():
    drawn = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    return MixtureOfPrompts(drawn, LAYER, None, prompt_log_weight=-1.0)


def trained(model, states, taught, *, steps=4):
    adapter = prompt()
    settings = TrainingConfig(
        steps=steps,
        batch_size=9,
        learning_rate=0.1,
        gate_learning_rate=0.0,
        warmup_fraction=0.0,
        max_grad_norm=1.0,
        grad_clip_percentile=100.0,
        clip_gate_separately=True,
        seed=0,
    )
    rows = fit(adapter, model, states, settings, distillation=taught)
    return adapter, [row.nll for row in rows]


def test_without_a_share_the_training_is_bitwise_what_it_is_without_a_teacher(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    plain, nats = trained(tiny_llama, states, None)
    same, same_nats = trained(tiny_llama, states, Distillation(teacher, 0.0))
    assert nats == same_nats
    assert torch.equal(plain.prompts, same.prompts)


def distance(model, states, adapter, teacher):
    batch = states.batch(range(len(DOCUMENTS)))
    with torch.no_grad(), adapter.active(model, batch.instructions):
        logits = response_logits(model, batch, LAYER)
    return float(
        kl_divergence(teacher.distributions(range(len(DOCUMENTS)), model.device), logits, temperature=1.0).mean()
    )


def test_a_taught_student_comes_closer_to_its_teacher_than_one_that_reads_the_text(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    before = distance(tiny_llama, states, prompt(), teacher)
    reading, _ = trained(tiny_llama, states, None, steps=40)
    taught, _ = trained(tiny_llama, states, Distillation(teacher, 1.0), steps=40)
    after = distance(tiny_llama, states, taught, teacher)
    assert after < 0.8 * before
    assert after < distance(tiny_llama, states, reading, teacher)


def test_the_loss_mixes_text_and_teacher_by_the_share(tiny_llama):
    teacher = teacher_of(tiny_model(seed=1), temperature=2.0)
    kept = teacher.distributions(ROWS, tiny_llama.device)
    student = logits_of(7, scored=len(kept.tokens)).float()
    far = kl_divergence(kept, student, temperature=2.0).mean()
    batch = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4).batch(ROWS)
    mixed = Distillation(teacher, 0.3).loss(torch.tensor(5.0), student, [], batch, ROWS)
    assert_close(mixed, 0.7 * 5.0 + 0.3 * far)


# --- who teaches


def test_the_teacher_is_asked_as_the_recipe_says_and_speaks_the_same_tokens(tiny_llama, tmp_path):
    folder = saved(tiny_model(seed=1), tmp_path / "teacher")
    modifier = PromptRecoveryModifier(distill=0.25, distill_temperature=2.5, squarehead=3.0, teacher=str(folder))
    told = []
    found = build_distillation(
        modifier, tmp_path, tiny_llama, DOCUMENTS, 4, on_progress(lambda *line: told.append(line))
    )
    assert (found.fraction, found.squarehead_weight, found.teacher.temperature) == (0.25, 3.0, 2.5)
    assert told[-1][1:] == (len(DOCUMENTS), len(DOCUMENTS))
    assert (
        build_distillation(PromptRecoveryModifier(teacher=str(folder)), tmp_path, tiny_llama, DOCUMENTS, 4, silent)
        is None
    )
    other = tiny_model()
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(DataError, match=r"its tokens are not those of .* --teacher"):
        build_distillation(modifier, tmp_path, other, DOCUMENTS, 4, silent)
    padded = tiny_model(vocab_size=tiny_llama.config.vocab_size + 8)
    with pytest.raises(DataError, match=r"scores \d+ tokens, padding included, and .* --teacher"):
        build_distillation(modifier, tmp_path, padded, DOCUMENTS, 4, silent)


def folder_of(path, base=None):
    """A folder with weights, and a manifest that says what it was made from."""
    path.mkdir()
    save_file({"weight": torch.randn(2, 2)}, path / "model.safetensors")
    if base is not None:
        made = {"base": {"folder": str(base), "sha256": weights_hash(base)}}
        (path / "manifest.json").write_text(json.dumps(made))
    return path


def test_the_teacher_is_the_dense_model_whatever_was_made_in_between(tmp_path):
    dense = folder_of(tmp_path / "dense")
    pruned = folder_of(tmp_path / "pruned", dense)
    assert dense_folder(pruned) == dense
    assert dense_folder(folder_of(tmp_path / "rounded", pruned)) == dense


def test_a_teacher_that_is_missing_gone_or_another_is_refused(tmp_path):
    dense = folder_of(tmp_path / "dense")
    pruned = folder_of(tmp_path / "pruned", dense)
    with pytest.raises(InputNotFoundError, match="name one by --teacher"):
        dense_folder(dense)
    save_file({"weight": torch.zeros(2, 2)}, dense / "model.safetensors")
    with pytest.raises(DataError, match=r"has weights .* was made from"):
        dense_folder(pruned)
    shutil.rmtree(dense)
    with pytest.raises(InputNotFoundError, match="is not there"):
        dense_folder(pruned)


def test_recover_distils_from_the_model_that_it_is_told_of(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data = write_data(tmp_path / "data")
    nats = {}
    for share in (0, 1):
        target = tmp_path / f"adapter-{share}"
        taught = ["--distill", share, "--teacher", stories] if share else []
        flags = [*taught, "--arm", "single", "--steps", 3]
        outcome = invoke("recover", stories, "--data", data, "--output-dir", target, *flags)
        assert outcome.code == 0, outcome.err
        nats[share] = json.loads((target / "manifest.json").read_text())["final_nats"]
    assert nats[0] != nats[1]
    outcome = invoke("recover", stories, "--data", data, "--output-dir", tmp_path / "none", "--distill", 1)
    assert outcome.code == 66
    assert "--teacher" in outcome.err
