import json
import shutil

import pytest
import torch
from cli_runner import invoke, write_data
from factories import training_config
from tiny_models import BLOCKS, FAMILIES, random_documents, tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, LlamaForCausalLM

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import response_logits
from mopcompress.recover.distillation import Distillation, Teacher
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.squarehead import TeacherStates, record_outputs, squarehead
from mopcompress.recover.training import compute_losses, fit

LAYER = 2
DOCUMENTS = random_documents(9)
ROWS = [4, 0, 7]


def teacher_of(model):
    return Teacher(model, DOCUMENTS, temperature=1.0, batch_size=4, with_hidden_states=True)


def prompt():
    drawn = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    return MixtureOfPrompts(drawn, LAYER, None, prompt_log_weight=-1.0)


def after_each_block(model, row):
    """Return one document's states from the whole network, without padding: [blocks, response tokens, hidden]."""
    document = DOCUMENTS[row]
    with torch.no_grad(), record_outputs(model.blocks) as outputs:
        model.network(torch.tensor([document.tokens]))
    return torch.stack(outputs)[:, 0, document.context_tokens - 1 : -1]


def slow_loss(student, teacher, first):
    """Compute the loss block by block and number by number, in units of the teacher's mean square over all rows."""
    losses = []
    for block in range(first, BLOCKS):
        squares = [
            value**2 for row in range(len(DOCUMENTS)) for value in after_each_block(teacher, row)[block].flatten()
        ]
        errors = []
        for row in ROWS:
            pair = after_each_block(student, row)[block], after_each_block(teacher, row)[block]
            values = zip(*(states.flatten() for states in pair), strict=True)
            errors += [(student_value - teacher_value) ** 2 for student_value, teacher_value in values]
        losses.append(sum(errors) / len(errors) / (sum(squares) / len(squares)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_definition_over_the_upper_blocks(family):
    student, teacher = tiny_model(family), tiny_model(family, seed=1)
    states = HiddenStateDataset(student, DOCUMENTS, LAYER, batch_size=4)
    distillation = Distillation(teacher_of(teacher), fraction=0.0, squarehead_weight=1.0)
    batch = states.batch(ROWS)
    with torch.no_grad(), distillation.record_outputs(student, LAYER) as outputs:
        logits = response_logits(student, batch, LAYER)
    added = distillation.loss(torch.tensor(2.0), logits, outputs, batch, ROWS) - 2.0
    assert_close(added, slow_loss(student, teacher, LAYER), rtol=2e-2, atol=0.0)  # the teacher's are stored in bfloat16


def test_a_student_that_equals_its_teacher_has_no_loss(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    batch = states.batch(ROWS)
    distillation = Distillation(teacher_of(tiny_llama), fraction=0.0, squarehead_weight=1.0)
    with torch.no_grad(), distillation.record_outputs(tiny_llama, LAYER) as outputs:
        logits = response_logits(tiny_llama, batch, LAYER)
    assert float(distillation.loss(torch.tensor(0.0), logits, outputs, batch, ROWS)) < 1e-4


def test_states_too_large_for_float16_are_stored(tiny_llama):
    batch = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4).batch(ROWS)
    stored = TeacherStates(tiny_llama, [len(document.tokens) - document.context_tokens for document in DOCUMENTS])
    huge = [torch.full_like(batch.hidden, 1e6) for _ in range(BLOCKS)]
    stored.record(ROWS, batch, huge)
    row = stored._row(ROWS[0]).float()
    assert_close(row, torch.full_like(row, 1e6), rtol=1e-2, atol=0)


def test_no_block_weighs_more_for_larger_states():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    scale = torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    expected = squarehead(student, teacher, teacher.square().mean((1, 2)))
    scaled = scale * teacher
    assert_close(squarehead(scale * student, scaled, scaled.square().mean((1, 2))), expected)


def fitted(model, states, distillation, *, steps=4, gradient_accumulation_steps=1):
    adapter = prompt()
    settings = training_config(
        steps=steps,
        batch_size=9,
        gate_learning_rate=0.0,
        warmup_fraction=0.0,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    fit(adapter, model, states, settings, distillation=distillation)
    return adapter


def test_training_brings_hidden_states_closer(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    teacher = teacher_of(tiny_model(seed=1))
    rows = range(len(DOCUMENTS))

    def distance(adapter):
        loss, nll = compute_losses(
            adapter, tiny_llama, states, rows, Distillation(teacher, fraction=0.0, squarehead_weight=1.0)
        )
        return float((loss - nll).detach())

    on_text = fitted(tiny_llama, states, None, steps=30)
    taught = fitted(tiny_llama, states, Distillation(teacher, fraction=0.0, squarehead_weight=100.0), steps=30)
    assert distance(taught) < min(distance(prompt()), distance(on_text))


def test_a_step_in_parts_is_the_same_step(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    distillation = Distillation(teacher_of(tiny_model(seed=1)), fraction=0.3, squarehead_weight=2.0)
    whole, parts = (fitted(tiny_llama, states, distillation, gradient_accumulation_steps=parts) for parts in (1, 3))
    assert_close(whole.prompts, parts.prompts, rtol=1e-3, atol=1e-4)


def test_recover_takes_squarehead_from_a_teacher_of_its_shape(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data, nats = write_data(tmp_path / "data"), {}
    for weight in (0, 50):
        target = tmp_path / f"adapter-{weight}"
        taught = ["--set", f"recovery.squarehead={weight}", "--teacher", stories] if weight else []
        flags = [*taught, "--arm", "single", "--steps", 3]
        outcome = invoke("recover", stories, "--data", data, "--output-dir", target, *flags)
        assert outcome.code == 0, outcome.err
        nats[weight] = json.loads((target / "manifest.json").read_text())["final_nats"]
    assert nats[0] != nats[50]
    shallow = shutil.copytree(stories, tmp_path / "shallow")
    config = AutoConfig.from_pretrained(stories)
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(shallow)
    flags = ["--set", "recovery.squarehead=1", "--teacher", shallow, "--arm", "single", "--steps", 3]
    outcome = invoke("recover", stories, "--data", data, "--output-dir", tmp_path / "none", *flags)
    assert outcome.code == 65
    assert "2 blocks" in outcome.err
