"""The gate, its pre-training, and the gate that each arm begins with."""

import pytest
import torch
from factories import TASKS, adapter_init, initialized_adapter, response_nll, training_config
from tiny_models import HIDDEN, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.methods.gate import Gate, pretrain
from mopcompress.recover.methods.prompt_initialization import expert_domains, kmeans
from mopcompress.recover.training import fit

EXPERTS, LAYER = len(TASKS), 2
DOCUMENTS = random_documents(24)
MODEL = tiny_model()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(count=30):
    """Return points in three clouds, in turn, far from the origin: their common part is larger than their distances."""
    experts = torch.arange(count) % EXPERTS
    centres = 3.0 * torch.randn(EXPERTS, HIDDEN, generator=seeded(0)) + 50
    return centres[experts] + torch.randn(count, HIDDEN, generator=seeded(1)), experts


def random_gate(seed=0):
    return Gate(HIDDEN, EXPERTS, generator=seeded(seed))


# --- the gate


def test_weights_are_experts_times_a_softmax():
    gate, (means, _) = random_gate(), clouds()
    inputs = (means - gate.mean) / gate.deviation
    hidden = torch.nn.functional.gelu(inputs @ gate.inner.weight.T + gate.inner.bias)
    scores = (hidden @ gate.outer.weight.T + gate.outer.bias).exp()
    expected = EXPERTS * scores / scores.sum(1, keepdim=True)
    assert_close(gate(means).exp(), expected)
    assert_close(gate(means).exp().sum(1), torch.full((30,), float(EXPERTS)))


def test_a_gate_with_logits_of_0_has_no_preference():
    gate, (means, _) = random_gate(), clouds()
    gate.scale_logits(0.0)
    assert_close(gate(means), torch.zeros(30, EXPERTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_logits_are_scaled_with_their_bias(factor):
    gate, (means, experts) = random_gate(), clouds()
    pretrain(gate, means, experts, steps=3)  # else biases are zero
    before = gate.logits(means)
    gate.scale_logits(factor)
    assert_close(gate.logits(means), factor * before)


def test_a_shift_and_a_scale_of_the_hidden_states_do_not_matter():
    (means, _), logits = clouds(), []
    for inputs in (means, 7 * means + 1000):
        gate = random_gate()
        gate.fit_standardization(inputs)
        logits.append(gate.logits(inputs))
    assert_close(logits[1], logits[0], rtol=1e-2, atol=1e-2)


def test_a_feature_that_never_changes_does_no_harm():
    gate, (means, _) = random_gate(), clouds()
    means[:, 3] = 1.0
    gate.fit_standardization(means)
    assert bool(gate(means).isfinite().all())


def test_pretraining_learns_the_map_from_instructions_to_experts():
    gate, (means, experts) = random_gate(), clouds(count=60)
    pretrain(gate, means[:30], experts[:30], steps=60)
    assert torch.equal(gate(means[30:]).argmax(1), experts[30:])


def test_no_pretraining_only_standardizes():
    gate, (means, experts) = random_gate(), clouds()
    pretrain(gate, means, experts, steps=0)
    assert torch.equal(gate.inner.weight, random_gate().inner.weight)
    assert_close(gate.mean, means.mean(0))
    assert_close(gate.deviation, means.std(0, correction=0))


def test_equal_seeds_give_equal_gates():
    assert torch.equal(random_gate(0).inner.weight, random_gate(0).inner.weight)
    assert not torch.equal(random_gate(0).inner.weight, random_gate(1).inner.weight)


# --- the gate of an adapter


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=8)


def initialized(states, arm="mop", *, steps=20, scale=0.3, seed=0, **changes):
    init = adapter_init(gate_pretraining_steps=steps, gate_logit_scale=scale, seed=seed)
    return initialized_adapter(arm, MODEL, states, init=init, **changes)[0]


@pytest.mark.parametrize("arm", ["mop", "shuffled", "mop+"])
def test_the_seed_draws_the_gate(states, arm):
    first, again, other = (initialized(states, arm, seed=seed, steps=0).gate for seed in (0, 0, 1))
    assert torch.equal(first.inner.weight, again.inner.weight)
    assert not torch.equal(first.inner.weight, other.inner.weight)
    assert not torch.equal(first.outer.weight, other.outer.weight)


def test_the_gate_begins_pretrained_and_scaled(states):
    full, scaled = (initialized(states, scale=scale).gate for scale in (1.0, 0.25))
    assert_close(scaled.logits(states.means), 0.25 * full.logits(states.means))
    correct = full(states.means).argmax(1) == expert_domains(states, TASKS, EXPERTS, generator=seeded())
    assert float(correct.float().mean()) > 0.6  # random instructions can only be memorized


def test_without_pretraining_the_gate_is_random(states):
    random, trained = (initialized(states, steps=steps, scale=1.0).gate for steps in (0, 5))
    assert not bool(random.outer.bias.any())  # as drawn
    assert not torch.equal(trained.outer.weight, random.outer.weight)
    assert float(random(states.means).detach().std(0).min()) > 0.01  # random, not without preference
    assert_close(random.mean, trained.mean)  # the standardization is fitted all the same


def test_a_gate_scaled_to_0_begins_as_a_plain_prompt_and_learns(states):
    mop, single = (initialized(states, arm, scale=0.0) for arm in ("mop", "single"))
    assert_close(response_nll(MODEL, states, mop), response_nll(MODEL, states, single))
    fit(mop, MODEL, states, training_config(steps=3))
    assert float(mop.gate(states.means).detach().abs().max()) > 1e-3


def test_a_gate_without_a_learning_rate_does_not_change(states):
    before, frozen, trained = (initialized(states, steps=5, scale=1.0) for _ in range(3))
    fit(frozen, MODEL, states, training_config(steps=3, gate_learning_rate=0.0))
    for name, tensor in before.gate.state_dict().items():
        assert torch.equal(frozen.gate.state_dict()[name], tensor), name
    assert not torch.equal(frozen.prompts, before.prompts)
    fit(trained, MODEL, states, training_config(steps=3))
    assert not torch.equal(trained.gate.outer.weight, before.gate.outer.weight)


def test_without_tasks_the_gate_learns_clusters(tiny_llama):
    """K-means chooses the domains, and the gate learns those, one to one."""
    documents = random_documents(12)
    states = HiddenStateDataset(tiny_llama, documents, LAYER, batch_size=4)
    gate = initialized(states, steps=200, scale=1.0, tasks=()).gate
    clusters = kmeans(states.means, EXPERTS, generator=seeded())
    assert torch.equal(gate(states.means).argmax(1), clusters)
    assert clusters.tolist() != [TASKS.index(document.task) for document in documents]
