import json
import shutil

import pytest
import torch
from cli_runner import invoke, write_data
from tiny_models import BLOCKS, FAMILIES, random_documents, tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, LlamaForCausalLM

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import response_logits
from mopcompress.recover.distillation import Distillation, Teacher
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.squarehead import TeacherStates, record_outputs, squarehead
from mopcompress.recover.training import TrainingConfig, compute_losses, fit

LAYER = 2
DOCUMENTS = random_documents(9)
ROWS = [4, 0, 7]


def teacher_of(model, *, hidden=True):
    return Teacher(model, DOCUMENTS, temperature=1.0, batch_size=4, with_hidden_states=hidden)


def prompt():
    drawn = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    return MixtureOfPrompts(drawn, LAYER, None, prompt_log_weight=-1.0)


def after_each_block(model, row):
    """One document, without padding, from the whole network: [blocks, response tokens, hidden]."""
    document = DOCUMENTS[row]
    with torch.no_grad(), record_outputs(model.blocks) as seen:
        model.network(torch.tensor([document.tokens]))
    return torch.stack(seen)[:, 0, document.context_tokens - 1 : -1]


def slow(student, teacher, first):
    """Block after block, token after token, in units of the teacher's mean square over all documents."""
    losses = []
    for block in range(first, BLOCKS):
        squares = [
            value**2 for row in range(len(DOCUMENTS)) for value in after_each_block(teacher, row)[block].flatten()
        ]
        errors = []
        for row in ROWS:
            own, theirs = after_each_block(student, row)[block], after_each_block(teacher, row)[block]
            errors += [(one - other) ** 2 for one, other in zip(own.flatten(), theirs.flatten(), strict=True)]
        losses.append(sum(errors) / len(errors) / (sum(squares) / len(squares)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_definition_over_the_blocks_from_the_adapters_layer_on(family):
    student, teacher = tiny_model(family), tiny_model(family, seed=1)
    states = HiddenStateDataset(student, DOCUMENTS, LAYER, batch_size=4)
    taught = Distillation(teacher_of(teacher), fraction=0.0, squarehead_weight=1.0)
    batch = states.batch(ROWS)
    with torch.no_grad(), taught.record_outputs(student, LAYER) as seen:
        logits = response_logits(student, batch, LAYER)
    found = taught.loss(torch.tensor(2.0), logits, seen, batch, ROWS) - 2.0
    assert_close(found, slow(student, teacher, LAYER), rtol=2e-2, atol=0.0)  # the teacher's are kept in bfloat16


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    batch = states.batch(ROWS)
    taught = Distillation(teacher_of(tiny_llama), fraction=0.0, squarehead_weight=1.0)
    with torch.no_grad(), taught.record_outputs(tiny_llama, LAYER) as seen:
        logits = response_logits(tiny_llama, batch, LAYER)
    assert float(taught.loss(torch.tensor(0.0), logits, seen, batch, ROWS)) < 1e-4


def test_states_too_large_for_float16_are_kept(tiny_llama):
    batch = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4).batch(ROWS)
    kept = TeacherStates(tiny_llama, [len(one.tokens) - one.context_tokens for one in DOCUMENTS])
    huge = [torch.full_like(batch.hidden, 1e6) for _ in range(BLOCKS)]
    kept.record(ROWS, batch, huge)
    assert_close(kept._row(ROWS[0]).float(), torch.full_like(kept._row(ROWS[0]), 1e6).float(), rtol=1e-2, atol=0)


def test_no_block_weighs_more_for_having_larger_states():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    scale = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    expected = squarehead(student, teacher, teacher.square().mean((1, 2)))
    scaled = scale * teacher
    assert_close(squarehead(scale * student, scaled, scaled.square().mean((1, 2))), expected)


def fitted(model, states, taught, *, steps=4, gradient_accumulation_steps=1):
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
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    fit(adapter, model, states, settings, distillation=taught)
    return adapter


def test_hidden_states_of_a_taught_student_come_closer(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    rows = range(len(DOCUMENTS))

    def far(adapter):
        loss, nats = compute_losses(
            adapter, tiny_llama, states, rows, Distillation(teacher, fraction=0.0, squarehead_weight=1.0)
        )
        return float((loss - nats).detach())

    reading = fitted(tiny_llama, states, None, steps=30)
    taught = fitted(tiny_llama, states, Distillation(teacher, fraction=0.0, squarehead_weight=100.0), steps=30)
    assert far(taught) < min(far(prompt()), far(reading))


def test_a_step_in_parts_is_the_same_step(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    taught = Distillation(teacher_of(tiny_model(seed=1)), fraction=0.3, squarehead_weight=2.0)
    whole, parts = (fitted(tiny_llama, states, taught, gradient_accumulation_steps=parts) for parts in (1, 3))
    assert_close(whole.prompts, parts.prompts, rtol=1e-3, atol=1e-4)


def test_recover_follows_hidden_states_and_refuses_a_teacher_of_another_shape(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data, nats = write_data(tmp_path / "data"), {}
    for weight in (0, 50):
        target = tmp_path / f"adapter-{weight}"
        taught = ["--squarehead", weight, "--teacher", stories] if weight else []
        flags = [*taught, "--arm", "single", "--steps", 3]
        outcome = invoke("recover", stories, "--data", data, "--output-dir", target, *flags)
        assert outcome.code == 0, outcome.err
        nats[weight] = json.loads((target / "manifest.json").read_text())["final_nats"]
    assert nats[0] != nats[50]
    shallow = shutil.copytree(stories, tmp_path / "shallow")
    config = AutoConfig.from_pretrained(stories)
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(shallow)
    flags = ["--squarehead", 1, "--teacher", shallow, "--arm", "single", "--steps", 3]
    outcome = invoke("recover", stories, "--data", data, "--output-dir", tmp_path / "none", *flags)
    assert outcome.code == 65
    assert "2 blocks" in outcome.err
