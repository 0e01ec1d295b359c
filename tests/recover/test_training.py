import math

import pytest
import torch
from tiny_models import HIDDEN, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.entrypoints.from_recipe import adapter_config, adapter_init, first_layer, training_config
from mopcompress.errors import NumericalError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, micro_average
from mopcompress.models.attention import attend_to
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.distributed import Workers
from mopcompress.recover.methods.mixture_of_prompts import initialize
from mopcompress.recover.training import TrainingConfig, _backward, _lr_factor, fit

TASKS = ("add", "sort", "tell")
DOCUMENTS = random_documents(12, tasks=TASKS)
LAYER = 2
MODEL = tiny_model()


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def training(**changes):
    settings = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.1,
        "gate_learning_rate": 1e-2,
        "warmup_fraction": 0.1,
        "max_grad_norm": 1.0,
        "grad_clip_percentile": 100.0,
        "clip_gate_separately": True,
        "seed": 0,
    }
    return TrainingConfig(**settings | changes)


def begun(states, arm="mop", *, seed=0):
    config = AdapterConfig(
        arm=arm,
        experts=3,
        prompts_per_expert=2,
        layer=LAYER,
        hidden_size=HIDDEN,
        base_sha256="",
        tasks=TASKS,
    )
    start = AdapterInit(gate_pretraining_steps=5, gate_logit_scale=0.3, prompt_log_weight=-1.0, seed=seed)
    return initialize(config, AdapterInputs(MODEL, states, TASKS), start)


@pytest.mark.parametrize("arm", ["single", "mop"])
def test_a_small_problem_is_learnt_by_heart(tiny_llama, states, arm):
    mixture = begun(states, arm)
    before = micro_average(
        evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=12)
    ).perplexity
    fit(mixture, tiny_llama, states, training(steps=150, batch_size=12, learning_rate=0.3))
    after = micro_average(
        evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=12)
    ).perplexity
    assert math.log(after) < 0.6 * math.log(before)


def test_the_model_is_bitwise_unchanged(states):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    mixture = begun(states)
    started = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    fit(mixture, model, states, training())
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())
    changed = {name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, started[name])}
    assert changed == started.keys() - {"gate.mean", "gate.deviation"}


@pytest.mark.parametrize("arm", ["single", "mop"])
def test_equal_seeds_give_equal_results(tiny_llama, states, arm):
    results = []
    for seed in (0, 0, 1):
        mixture = begun(states, arm)
        rows = fit(mixture, tiny_llama, states, training(seed=seed))
        results.append(([row.nll for row in rows], mixture.prompts))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


@pytest.mark.parametrize(
    ("max_grad_norm", "percentile", "apart"),
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
def test_training_is_adamw_on_each_batchs_mean_loss(tiny_llama, states, monkeypatch, max_grad_norm, percentile, apart):
    """AdamW by its equations (Loshchilov and Hutter, 2019), without weight decay; AutoClip by its definition."""
    settings = training(
        steps=5,
        warmup_fraction=0.4,
        max_grad_norm=max_grad_norm,
        grad_clip_percentile=percentile,
        clip_gate_separately=apart,
    )
    before = {group: [] for group in ("gate", "adapter", "all")}
    order = order_of(states, tiny_llama, "mop", monkeypatch, steps=5)
    trained, mixture = begun(states), begun(states)
    rows_done = fit(trained, tiny_llama, states, settings)
    names, weights = zip(*mixture.named_parameters(), strict=True)
    groups = ["gate" if name.startswith("gate") else "adapter" for name in names]
    clipped_with = groups if apart else ["all"] * len(names)
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    for step, rows in enumerate(order, start=1):
        batch = states.batch(rows)
        with attend_to(mixture.prefix(tiny_llama, batch.instructions)):
            left = tiny_llama.run_upper(batch.hidden, LAYER)
        logits = tiny_llama.network.lm_head(left[batch.example, batch.position])
        loss = -logits.log_softmax(-1)[range(len(batch.target)), batch.target].mean()
        gradients = torch.autograd.grad(loss, weights)
        norms = {group: norm_of(gradients, clipped_with, group) for group in clipped_with}
        assert min(norms.values()) > 0.02
        assert dict(rows_done[step - 1].norms) == pytest.approx(norms, rel=1e-3)
        for group, norm in norms.items():
            before[group] = sorted([*before[group], norm])
        longest = {
            group: min(max_grad_norm, norms[group] if percentile == 100 else quantile(before[group], percentile / 100))
            for group in norms
        }
        share = [0.5, 1.0, 1.0, 0.75, 0.25][step - 1]
        with torch.no_grad():
            for index, gradient in enumerate(gradients):
                clipped = gradient * min(1.0, longest[clipped_with[index]] / norms[clipped_with[index]])
                first[index].mul_(0.9).add_(0.1 * clipped)
                second[index].mul_(0.999).add_(0.001 * clipped**2)
                rate = share * (1e-2 if groups[index] == "gate" else 0.1)
                mean, square = first[index] / (1 - 0.9**step), second[index] / (1 - 0.999**step)
                weights[index].sub_(rate * mean / (square.sqrt() + 1e-8))
    for name, weight in trained.named_parameters():
        expected = mixture.get_parameter(name)
        assert_close(weight, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def quantile(ordered, share):
    """Between the two values that it lies between, in proportion."""
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def norm_of(gradients, groups, group):
    return float(torch.cat([one.flatten() for one, of in zip(gradients, groups, strict=True) if of == group]).norm())


def order_of(states, model, arm, monkeypatch, **changes):
    """The rows of each step."""
    seen = []
    whole = HiddenStateDataset.batch
    monkeypatch.setattr(HiddenStateDataset, "batch", lambda self, rows: seen.append(list(rows)) or whole(self, rows))
    fit(begun(states, arm), model, states, training(**changes))
    monkeypatch.undo()
    return seen


def test_both_arms_see_the_same_batches_and_the_seed_decides_which(tiny_llama, states, monkeypatch):
    single, mop = (order_of(states, tiny_llama, arm, monkeypatch) for arm in ("single", "mop"))
    assert single == mop
    assert single != order_of(states, tiny_llama, "single", monkeypatch, seed=1)


def test_every_epoch_holds_every_document_once(tiny_llama, states, monkeypatch):
    order = order_of(states, tiny_llama, "single", monkeypatch, steps=6)
    epochs = [sorted(row for batch in order[first : first + 3] for row in batch) for first in (0, 3)]
    assert epochs == [list(range(12))] * 2
    assert order[:3] != order[3:]


def test_the_loss_of_a_step_is_the_metric_before_it(tiny_llama, states):
    mixture = begun(states)
    scores = evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=12)
    (row,) = fit(mixture, tiny_llama, states, training(steps=1, batch_size=12))
    assert row.nll == pytest.approx(math.fsum(scores.nats) / sum(scores.scored_tokens), rel=1e-5)


def test_rows_count_steps_and_real_tokens(tiny_llama, states):
    told = []
    rows = fit(begun(states), tiny_llama, states, training(steps=3, batch_size=12), progress=told.append)
    assert rows == told
    assert [(row.step, row.steps) for row in rows] == [(1, 3), (2, 3), (3, 3)]
    assert {row.tokens for row in rows} == {sum(len(document.tokens) for document in DOCUMENTS)}


def test_a_loss_that_is_no_number_stops_training_and_names_the_rate(tiny_llama, states):
    mixture = begun(states)
    with torch.no_grad():
        mixture.prompts[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"step 1: the loss is nan with --learning-rate 0\.1"):
        fit(mixture, tiny_llama, states, training())


def test_a_gradient_that_is_not_finite_stops_training_before_it_does_harm(tiny_llama, states):
    mixture = begun(states)
    before = mixture.prompts.detach().clone()
    mixture.prompts.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(
        NumericalError, match=r"step 1: the gradient's norm is (inf|nan) with --learning-rate 0\.1; lower"
    ):
        fit(mixture, tiny_llama, states, training())
    assert torch.equal(mixture.prompts, before)


def test_the_rate_rises_in_equal_steps_then_falls_as_a_cosine_to_zero():
    ten = training(steps=110, warmup_fraction=1 / 11)
    assert [_lr_factor(step, ten) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert _lr_factor(10, ten) == 1
    assert _lr_factor(60, ten) == pytest.approx(0.5)
    assert _lr_factor(35, ten) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert _lr_factor(110, ten) == pytest.approx(0, abs=1e-12)
    assert 0 < _lr_factor(109, ten) < 0.001


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_no_step_is_lost_whatever_the_warm_up(steps, fraction):
    assert all(0 < _lr_factor(step, training(steps=steps, warmup_fraction=fraction)) <= 1 for step in range(steps))


def test_gate_and_prompts_have_their_own_rates(tiny_llama, states):
    """After one step of AdamW every weight with a gradient has moved by its rate."""
    mixture = begun(states)
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    fit(mixture, tiny_llama, states, training(steps=1, learning_rate=0.5, gate_learning_rate=1e-4))
    moved = {name: (tensor - before[name]).abs() for name, tensor in mixture.state_dict().items()}
    assert float(moved["prompts"].median()) == pytest.approx(0.5, rel=1e-2)
    assert float(moved["prompt_log_weight"]) == pytest.approx(0.5, rel=1e-2)
    assert float(moved["gate.outer.bias"].max()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(("gate_learning_rate", "apart"), [(0.0, True), (0.0, False), (1e-12, True)])
def test_a_gate_has_no_share_in_the_clipping_of_what_it_weighs(
    tiny_llama, states, monkeypatch, gate_learning_rate, apart
):
    """Beside a gate that is frozen, or as good as, prompts learn what they learn where it is no parameter at all."""
    still, without = begun(states), begun(states)
    before = {name: tensor.clone() for name, tensor in still.gate.state_dict().items()}
    fit(
        still,
        tiny_llama,
        states,
        training(gate_learning_rate=gate_learning_rate, clip_gate_separately=apart, max_grad_norm=0.01),
    )
    for name, tensor in still.gate.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=100 * gate_learning_rate)
    without.gate.requires_grad_(False)
    monkeypatch.setattr(without, "learned", lambda: {"adapter": [without.prompts, without.prompt_log_weight]})
    fit(without, tiny_llama, states, training(max_grad_norm=0.01))
    assert_close(still.prompts, without.prompts, rtol=0, atol=1e-6)


# --- parts of a step


@pytest.mark.parametrize("arm", ["single", "mop"])
@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_of_a_step_learn_what_the_whole_learns(tiny_llama, states, arm, parts):
    whole, split = begun(states, arm), begun(states, arm)
    rows = fit(whole, tiny_llama, states, training(batch_size=5))
    of_parts = fit(split, tiny_llama, states, training(batch_size=5, gradient_accumulation_steps=parts))
    assert [row.nll for row in of_parts] == pytest.approx([row.nll for row in rows], rel=1e-4)
    for name, weight in whole.state_dict().items():
        assert_close(split.state_dict()[name], weight, rtol=1e-3, atol=1e-3)


def test_processes_share_a_step_and_their_sum_is_the_whole(tiny_llama, states):
    chosen = [4, 1, 7, 2, 11]
    whole = begun(states)
    whole.zero_grad()  # the gate's pre-training leaves some
    loss = _backward(whole, tiny_llama, states, chosen, None, 1, Workers())
    losses, gradients = 0.0, {name: torch.zeros_like(weight) for name, weight in whole.named_parameters()}
    for rank in range(3):
        mixture = begun(states)
        mixture.zero_grad()
        losses += _backward(mixture, tiny_llama, states, chosen, None, 1, Workers(rank, 3))
        for name, weight in mixture.named_parameters():
            gradients[name] += weight.grad
    assert_close(losses, loss)
    for name, weight in whole.named_parameters():
        assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6)


# --- what a recipe asks for


# each another than its default
ASKED = {
    "arm": "mop",
    "experts": 5,
    "prompts_per_expert": 4,
    "layer": 3,
    "deep": True,
    "rank": 6,
    "adapter_targets": ("v_proj",),
    "steps": 7,
    "batch_size": 3,
    "gradient_accumulation_steps": 3,
    "gate_learning_rate": 0.02,
    "gate_clipping": "together",
    "gate_pretraining_steps": 11,
    "gate_logit_scale": 0.7,
    "gate_mode": "values",
    "shared_expert": True,
    "top_k": 2,
    "prompt_log_weight": -1.5,
    "warmup_fraction": 0.4,
    "max_grad_norm": 0.6,
    "grad_clip_percentile": 30.0,
}


def test_a_recipe_says_how_an_arm_is_trained():
    modifier = PromptRecoveryModifier(**ASKED)
    assert all(getattr(modifier, name) != getattr(PromptRecoveryModifier(), name) for name in ASKED if name != "arm")
    assert training_config(modifier, 0.25, seed=8) == TrainingConfig(
        steps=7,
        batch_size=3,
        gradient_accumulation_steps=3,
        learning_rate=0.25,
        gate_learning_rate=0.02,
        warmup_fraction=0.4,
        max_grad_norm=0.6,
        grad_clip_percentile=30.0,
        clip_gate_separately=False,
        seed=8,
    )
    assert training_config(PromptRecoveryModifier(), 0.25, seed=8).clip_gate_separately


def test_a_recipe_says_how_an_arm_begins():
    start = AdapterInit(gate_pretraining_steps=11, gate_logit_scale=0.7, prompt_log_weight=-1.5, seed=8)
    assert adapter_init(PromptRecoveryModifier(**ASKED), 8) == start


def test_a_recipe_says_what_an_arm_is(tiny_llama):
    assert adapter_config(PromptRecoveryModifier(**ASKED), tiny_llama, TASKS, "base") == AdapterConfig(
        arm="mop",
        experts=5,
        prompts_per_expert=4,
        layer=3,
        deep=True,
        rank=6,
        targets=("v_proj",),
        hidden_size=HIDDEN,
        base_sha256="base",
        tasks=(),
        gate_mode="values",
        shared_expert=True,
        top_k=2,
    )


@pytest.mark.parametrize(("blocks", "layer"), [(32, 10), (30, 9), (2, 1)])
def test_an_arm_acts_from_the_papers_tenth_of_32_layers_on_in_proportion(blocks, layer):
    assert first_layer("mop", None, tiny_model(num_hidden_layers=blocks)) == layer


def test_a_model_of_one_block_has_no_middle():
    with pytest.raises(UsageError, match="the model has one in all"):
        first_layer("mop", None, tiny_model(num_hidden_layers=1))
    for arm in ("input", "lora", "none"):
        assert first_layer(arm, None, tiny_model(num_hidden_layers=1)) == 0
