"""Arms that differ from `mop` in the gate alone: uniform, oracle, shuffled, and idp, which attends instead."""

import pytest
import torch
from factories import (
    TASKS,
    adapter_init,
    initialized_adapter,
    response_nll,
    saved_and_loaded,
    training_config,
)
from tiny_models import HIDDEN, generate, instructions_of, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.batching import derangement
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.training import fit

DOCUMENTS = random_documents(12)
EXPERTS, PROMPTS, LAYER = 3, 2, 2
CONTROLS = ("uniform", "oracle", "shuffled", "idp")


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def initialized(model, states, arm, **changes):
    return initialized_adapter(arm, model, states, init=adapter_init(gate_logit_scale=1.0), **changes)[0]


def trained(model, states, arm, *, steps=3, **changes):
    """Return a trained adapter, and the losses of its steps."""
    adapter = initialized(model, states, arm, **changes)
    rows = fit(adapter, model, states, training_config(steps=steps))
    return adapter.requires_grad_(False), [row.nll for row in rows]


def all_instructions(states):
    return states.batch(range(len(states.documents))).instructions


# --- all of them


@pytest.mark.parametrize("arm", CONTROLS)
def test_a_saved_adapter_loads_unchanged(tiny_llama, states, tmp_path, arm):
    changes = {"gate_mode": "values", "shared_expert": True, "top_k": 2, "tasks": list(TASKS)}
    adapter, config = initialized_adapter(arm, tiny_llama, states, base_sha256="base", **changes)
    loaded, loaded_config = saved_and_loaded(adapter, config, tiny_llama, tmp_path / "adapter")
    assert loaded_config == config
    scores = [
        evaluate(tiny_llama, states, compiled.compile_for_inference(tiny_llama), batch_size=4)
        for compiled in (loaded, adapter)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("arm", CONTROLS)
def test_compiled_adapters_are_the_trained_ones(tiny_llama, states, arm):
    adapter = initialized(tiny_llama, states, arm)
    compiled = response_nll(tiny_llama, states, adapter, compiled=True)
    assert_close(compiled, response_nll(tiny_llama, states, adapter))


@pytest.mark.parametrize("arm", ["single", "mop", *CONTROLS])
def test_training_lowers_the_loss_and_keeps_the_network(states, arm):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    _, losses = trained(model, states, arm, steps=24)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())


@pytest.mark.parametrize("arm", ["mop", "shuffled"])
def test_every_arm_begins_with_the_same_prompts(tiny_llama, states, arm):
    gated = initialized(tiny_llama, states, arm, shared_expert=True)
    for control in ("single", "uniform", "oracle"):
        other = initialized(tiny_llama, states, control, shared_expert=True)
        assert torch.equal(gated.prompts.flatten(0, 1), other.prompts.flatten(0, 1))
    assert torch.equal(initialized(tiny_llama, states, "idp").prompts, initialized(tiny_llama, states, arm).prompts)


def test_parameters_count_the_shared_expert_and_the_gate(tiny_llama, states):
    gate = sum(parameter.numel() for parameter in Gate(HIDDEN, EXPERTS).parameters())
    for arm, gate_size in {"single": 0, "uniform": 0, "oracle": 0, "mop": gate, "shuffled": gate}.items():
        for shared in (False, True):
            adapter = initialized(tiny_llama, states, arm, shared_expert=shared)
            assert trained_parameters(adapter) == (EXPERTS + shared) * PROMPTS * HIDDEN + 1 + gate_size
    assert trained_parameters(initialized(tiny_llama, states, "idp")) == EXPERTS * PROMPTS * HIDDEN + 1


# --- uniform


@pytest.mark.parametrize("mode", ["renormalised", "values"])
@pytest.mark.parametrize("shared", [False, True])
def test_uniform_is_single_after_training_too(tiny_llama, states, mode, shared):
    settings = {"gate_mode": mode, "shared_expert": shared, "top_k": 1}
    (single, losses), (uniform, uniform_losses) = (
        trained(tiny_llama, states, arm, **settings) for arm in ("single", "uniform")
    )
    assert uniform_losses == losses
    assert torch.equal(uniform.prompts.flatten(0, 1), single.prompts.flatten(0, 1))
    assert torch.equal(response_nll(tiny_llama, states, uniform), response_nll(tiny_llama, states, single))
    scores = [
        evaluate(tiny_llama, states, adapter.compile_for_inference(tiny_llama), batch_size=4)
        for adapter in (uniform, single)
    ]
    assert scores[0] == scores[1]  # without a gate there are no strongest experts


def test_uniform_with_separate_groups_is_no_plain_prompt(tiny_llama, states):
    single, uniform = (initialized(tiny_llama, states, arm, gate_mode="separate") for arm in ("single", "uniform"))
    plain = response_nll(tiny_llama, states, single)
    assert not torch.allclose(response_nll(tiny_llama, states, uniform), plain, atol=1e-3)


# --- oracle


def test_the_oracle_gives_all_weight_to_the_true_tasks_expert(tiny_llama, states):
    instructions = all_instructions(states)
    weights = initialized(tiny_llama, states, "oracle").training_log_weights(instructions).exp()
    expected = torch.tensor([[3.0 * (task == name) for name in TASKS] for task in instructions.tasks])
    assert_close(weights, expected)


def test_with_the_oracle_an_expert_learns_from_its_task_alone(tiny_llama):
    model = tiny_model()
    documents = [document for document in DOCUMENTS if document.task == "sort"]
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    adapter = initialized(model, states, "oracle")
    task_states = HiddenStateDataset(tiny_llama, documents, LAYER, batch_size=4)
    response_nll(model, task_states, adapter).mean().backward()
    assert bool(adapter.prompts.grad[1].any(1).all())
    assert not bool(adapter.prompts.grad[2].any())  # the first is another matter: the second sees it


def test_unknown_tasks_raise_with_the_oracle(tiny_llama, states):
    adapter = initialized(tiny_llama, states, "oracle").requires_grad_(False)
    with pytest.raises(UsageError, match="oracle: it needs the true task"):
        generate(tiny_llama, adapter, ["w5 w6"], max_new_tokens=2)
    instructions = instructions_of(tiny_llama, random_tokens(2, 5), LAYER, tasks=["add", "sing"])
    with pytest.raises(DataError, match="no expert for the task 'sing', only for add, sort, tell"):
        adapter.training_log_weights(instructions)


def test_an_oracle_without_tasks_raises(tiny_llama, states):
    with pytest.raises(UsageError, match="oracle: 2 experts are not one for each task"):
        initialized(tiny_llama, states, "oracle", experts=2, tasks=())


# --- shuffled


def test_the_shuffled_gate_gives_the_weights_of_another_row(tiny_llama, states):
    instructions, shuffled = all_instructions(states), initialized(tiny_llama, states, "shuffled")
    weights = initialized(tiny_llama, states, "mop").training_log_weights(instructions)
    shuffled_weights = shuffled.training_log_weights(instructions)
    assert_close(shuffled_weights, weights[derangement(len(DOCUMENTS))])
    assert not torch.allclose(shuffled_weights, weights, atol=1e-2)


def test_the_row_of_a_shuffled_gate_is_independent_of_the_batch(tiny_llama, states):
    shuffled = initialized(tiny_llama, states, "shuffled")
    together = shuffled.training_log_weights(all_instructions(states))
    for rows in ([3], [4, 5], [11, 0, 7]):
        assert_close(shuffled.training_log_weights(states.batch(rows).instructions), together[rows])


def test_a_shuffled_gate_reads_the_training_mean_of_a_single_row(tiny_llama, states):
    shuffled = initialized(tiny_llama, states, "shuffled").requires_grad_(False)
    alone = HiddenStateDataset(tiny_llama, DOCUMENTS[:1], LAYER, batch_size=4)
    mean = states.means.mean(0, keepdim=True)
    assert_close(shuffled.training_log_weights(alone.batch([0]).instructions), shuffled.gate(mean))
    assert generate(tiny_llama, shuffled, ["w5 w6"], max_new_tokens=4)
