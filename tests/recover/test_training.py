import math

import pytest
import torch
from factories import TASKS, adapter_init, initialized_adapter, training_config
from tiny_models import random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.errors import NumericalError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, micro_average
from mopcompress.models.attention import attend_to
from mopcompress.recover.distributed import Workers
from mopcompress.recover.training import _backward, _lr_factor, fit

DOCUMENTS = random_documents(12, tasks=TASKS)
LAYER = 2
MODEL = tiny_model()


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def initialized(states, arm="mop", *, seed=0):
    init = adapter_init(gate_logit_scale=0.3, seed=seed)
    return initialized_adapter(arm, MODEL, states, init=init)[0]


def mean_nll(model, states, adapter):
    """Return the mean nats per response token."""
    scores = evaluate(model, states, adapter.compile_for_inference(model), batch_size=12)
    return math.log(micro_average(scores).perplexity)


@pytest.mark.parametrize("arm", ["single", "mop"])
def test_a_small_problem_is_memorized(tiny_llama, states, arm):
    mixture = initialized(states, arm)
    initial = mean_nll(tiny_llama, states, mixture)
    fit(mixture, tiny_llama, states, training_config(steps=150, batch_size=12, learning_rate=0.3))
    assert mean_nll(tiny_llama, states, mixture) < 0.6 * initial


def test_the_model_is_bitwise_unchanged(states):
    model = tiny_model()
    original = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    mixture = initialized(states)
    initial = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    fit(mixture, model, states, training_config())
    assert all(torch.equal(weight, original[name]) for name, weight in model.network.state_dict().items())
    changed = {name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, initial[name])}
    assert changed == initial.keys() - {"gate.mean", "gate.deviation"}


@pytest.mark.parametrize("arm", ["single", "mop"])
def test_equal_seeds_give_equal_results(tiny_llama, states, arm):
    results = []
    for seed in (0, 0, 1):
        mixture = initialized(states, arm)
        rows = fit(mixture, tiny_llama, states, training_config(seed=seed))
        results.append(([row.nll for row in rows], mixture.prompts))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


@pytest.mark.parametrize(
    ("max_grad_norm", "percentile", "separately"),
    [
        (0.02, 100.0, True),
        (0.02, 100.0, False),
        (1e6, 100.0, True),
        (1e6, 50.0, True),
        (1e6, 50.0, False),
        (1e6, 0.0, True),
        (0.02, 50.0, True),
    ],
)
def test_training_is_adamw_on_the_mean_loss_of_a_batch(
    tiny_llama, states, monkeypatch, max_grad_norm, percentile, separately
):
    """AdamW by its equations (Loshchilov and Hutter, 2019), without weight decay; AutoClip by its definition."""
    settings = training_config(
        steps=5,
        warmup_fraction=0.4,
        max_grad_norm=max_grad_norm,
        grad_clip_percentile=percentile,
        clip_gate_separately=separately,
    )
    earlier_norms = {group: [] for group in ("gate", "adapter", "all")}
    batches = record_batches(states, tiny_llama, "mop", monkeypatch, steps=5)
    trained, mixture = initialized(states), initialized(states)
    train_rows = fit(trained, tiny_llama, states, settings)
    names, weights = zip(*mixture.named_parameters(), strict=True)
    groups = ["gate" if name.startswith("gate") else "adapter" for name in names]
    clipped_with = groups if separately else ["all"] * len(names)
    means = [torch.zeros_like(weight) for weight in weights]
    squares = [torch.zeros_like(weight) for weight in weights]
    for step, rows in enumerate(batches, start=1):
        batch = states.batch(rows)
        with attend_to(mixture.prefix(tiny_llama, batch.instructions)):
            hidden = tiny_llama.run_upper(batch.hidden, LAYER)
        logits = tiny_llama.network.lm_head(hidden[batch.example, batch.position])
        loss = -logits.log_softmax(-1)[range(len(batch.target)), batch.target].mean()
        gradients = torch.autograd.grad(loss, weights)
        norms = {group: norm_of(gradients, clipped_with, group) for group in clipped_with}
        assert min(norms.values()) > 0.02
        assert dict(train_rows[step - 1].norms) == pytest.approx(norms, rel=1e-3)
        for group, norm in norms.items():
            earlier_norms[group] = sorted([*earlier_norms[group], norm])
        limits = {
            group: min(
                max_grad_norm, norms[group] if percentile == 100 else quantile(earlier_norms[group], percentile / 100)
            )
            for group in norms
        }
        fraction = [0.5, 1.0, 1.0, 0.75, 0.25][step - 1]
        with torch.no_grad():
            for index, gradient in enumerate(gradients):
                clipped = gradient * min(1.0, limits[clipped_with[index]] / norms[clipped_with[index]])
                means[index].mul_(0.9).add_(0.1 * clipped)
                squares[index].mul_(0.999).add_(0.001 * clipped**2)
                rate = fraction * (1e-2 if groups[index] == "gate" else 0.1)
                mean, square = means[index] / (1 - 0.9**step), squares[index] / (1 - 0.999**step)
                weights[index].sub_(rate * mean / (square.sqrt() + 1e-8))
    for name, weight in trained.named_parameters():
        expected = mixture.get_parameter(name)
        assert_close(weight, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def quantile(ordered, fraction):
    """Interpolate between the two neighbouring values."""
    index = fraction * (len(ordered) - 1)
    low, high = ordered[math.floor(index)], ordered[math.ceil(index)]
    return low + (index - math.floor(index)) * (high - low)


def norm_of(gradients, groups, group):
    pairs = zip(gradients, groups, strict=True)
    return float(torch.cat([gradient.flatten() for gradient, name in pairs if name == group]).norm())


def record_batches(states, model, arm, monkeypatch, **changes):
    """Return the rows of each step."""
    batches, batch = [], HiddenStateDataset.batch
    monkeypatch.setattr(HiddenStateDataset, "batch", lambda self, rows: batches.append(list(rows)) or batch(self, rows))
    fit(initialized(states, arm), model, states, training_config(**changes))
    monkeypatch.undo()
    return batches


def test_the_seed_alone_decides_the_batches_of_all_arms(tiny_llama, states, monkeypatch):
    single, mop = (record_batches(states, tiny_llama, arm, monkeypatch) for arm in ("single", "mop"))
    assert single == mop
    assert single != record_batches(states, tiny_llama, "single", monkeypatch, seed=1)


def test_every_epoch_holds_every_document_once(tiny_llama, states, monkeypatch):
    batches = record_batches(states, tiny_llama, "single", monkeypatch, steps=6)
    epochs = [sorted(row for batch in batches[first : first + 3] for row in batch) for first in (0, 3)]
    assert epochs == [list(range(12))] * 2
    assert batches[:3] != batches[3:]


def test_the_loss_of_a_step_is_the_metric_before_it(tiny_llama, states):
    mixture = initialized(states)
    scores = evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=12)
    (row,) = fit(mixture, tiny_llama, states, training_config(steps=1, batch_size=12))
    assert row.nll == pytest.approx(math.fsum(scores.nats) / sum(scores.scored_tokens), rel=1e-5)


def test_rows_count_steps_and_real_tokens(tiny_llama, states):
    reported = []
    rows = fit(
        initialized(states), tiny_llama, states, training_config(steps=3, batch_size=12), progress=reported.append
    )
    assert rows == reported
    assert [(row.step, row.steps) for row in rows] == [(1, 3), (2, 3), (3, 3)]
    assert {row.tokens for row in rows} == {sum(len(document.tokens) for document in DOCUMENTS)}


def test_a_loss_that_is_nan_stops_and_names_the_rate(tiny_llama, states):
    mixture = initialized(states)
    with torch.no_grad():
        mixture.prompts[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"step 1: the loss is nan with recovery.learning_rate 0\.1"):
        fit(mixture, tiny_llama, states, training_config())


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_llama, states):
    mixture = initialized(states)
    initial = mixture.prompts.detach().clone()
    mixture.prompts.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        NumericalError, match=r"step 1: the gradient's norm is (inf|nan) with recovery.learning_rate 0\.1; lower"
    ):
        fit(mixture, tiny_llama, states, training_config())
    assert torch.equal(mixture.prompts, initial)


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    settings = training_config(steps=110, warmup_fraction=1 / 11)
    assert [_lr_factor(step, settings) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert _lr_factor(10, settings) == 1
    assert _lr_factor(60, settings) == pytest.approx(0.5)
    assert _lr_factor(35, settings) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert _lr_factor(110, settings) == pytest.approx(0, abs=1e-12)
    assert 0 < _lr_factor(109, settings) < 0.001


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_every_step_has_a_rate_above_zero(steps, fraction):
    assert all(
        0 < _lr_factor(step, training_config(steps=steps, warmup_fraction=fraction)) <= 1 for step in range(steps)
    )


def test_gate_and_prompts_have_separate_rates(tiny_llama, states):
    """After one step of AdamW every weight with a gradient has moved by its rate."""
    mixture = initialized(states)
    initial = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    fit(mixture, tiny_llama, states, training_config(steps=1, learning_rate=0.5, gate_learning_rate=1e-4))
    moved = {name: (tensor - initial[name]).abs() for name, tensor in mixture.state_dict().items()}
    assert float(moved["prompts"].median()) == pytest.approx(0.5, rel=1e-2)
    assert float(moved["prompt_log_weight"]) == pytest.approx(0.5, rel=1e-2)
    assert float(moved["gate.outer.bias"].max()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(("gate_learning_rate", "separately"), [(0.0, True), (0.0, False), (1e-12, True)])
def test_a_gate_has_no_part_in_the_clipping_of_prompts(tiny_llama, states, monkeypatch, gate_learning_rate, separately):
    """With a gate that is frozen, or nearly so, prompts learn what they learn if it is no parameter at all."""
    frozen, without = initialized(states), initialized(states)
    initial = {name: tensor.clone() for name, tensor in frozen.gate.state_dict().items()}
    fit(
        frozen,
        tiny_llama,
        states,
        training_config(gate_learning_rate=gate_learning_rate, clip_gate_separately=separately, max_grad_norm=0.01),
    )
    for name, tensor in frozen.gate.state_dict().items():
        assert_close(tensor, initial[name], rtol=0, atol=100 * gate_learning_rate)
    without.gate.requires_grad_(False)
    monkeypatch.setattr(without, "parameter_groups", lambda: {"adapter": [without.prompts, without.prompt_log_weight]})
    fit(without, tiny_llama, states, training_config(max_grad_norm=0.01))
    assert_close(frozen.prompts, without.prompts, rtol=0, atol=1e-6)


# --- parts of a step


@pytest.mark.parametrize("arm", ["single", "mop"])
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_accumulated_parts_learn_what_the_whole_step_learns(tiny_llama, states, arm, parts):
    whole, split = initialized(states, arm), initialized(states, arm)
    rows = fit(whole, tiny_llama, states, training_config(batch_size=5))
    of_parts = fit(split, tiny_llama, states, training_config(batch_size=5, gradient_accumulation_steps=parts))
    assert [row.nll for row in of_parts] == pytest.approx([row.nll for row in rows], rel=1e-4)
    for name, weight in whole.state_dict().items():
        assert_close(split.state_dict()[name], weight, rtol=1e-3, atol=1e-3)


def test_the_sum_over_processes_is_the_whole_step(tiny_llama, states):
    rows = [4, 1, 7, 2, 11]
    whole = initialized(states)
    whole.zero_grad()  # the gate's pre-training leaves some
    loss = _backward(whole, tiny_llama, states, rows, None, 1, Workers())
    losses, gradients = 0.0, {name: torch.zeros_like(weight) for name, weight in whole.named_parameters()}
    for rank in range(3):
        mixture = initialized(states)
        mixture.zero_grad()
        losses += _backward(mixture, tiny_llama, states, rows, None, 1, Workers(rank, 3))
        for name, weight in mixture.named_parameters():
            gradients[name] += weight.grad
    assert_close(losses, loss)
    for name, weight in whole.named_parameters():
        assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6)
