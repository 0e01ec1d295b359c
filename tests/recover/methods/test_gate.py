from collections import Counter

import pytest
import torch
from tiny_models import HIDDEN, random_documents, tiny_model
from torch.testing import assert_close

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.gate import Gate, pretrain
from mopcompress.recover.methods.prompt_initialization import expert_domains, kmeans
from mopcompress.recover.registry import RECOVERY_METHODS

TASKS = ("add", "sort", "tell")
EXPERTS = len(TASKS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def domains(count=30, *, apart=3.0, seed=0):
    """Points in three clouds, in turn, far from the origin: what instructions share is larger than what parts them."""
    experts = torch.arange(count) % EXPERTS
    centres = apart * torch.randn(EXPERTS, HIDDEN, generator=seeded(seed)) + 50
    return centres[experts] + torch.randn(count, HIDDEN, generator=seeded(seed + 1)), experts


def gate_of(seed=0):
    return Gate(HIDDEN, EXPERTS, generator=seeded(seed))


# --- the gate


def test_weights_are_experts_times_a_softmax():
    gate, (summaries, _) = gate_of(), domains()
    inputs = (summaries - gate.mean) / gate.deviation
    hidden = torch.nn.functional.gelu(inputs @ gate.inner.weight.T + gate.inner.bias)
    scores = (hidden @ gate.outer.weight.T + gate.outer.bias).exp()
    expected = EXPERTS * scores / scores.sum(1, keepdim=True)
    assert_close(gate(summaries).exp(), expected)
    assert_close(gate(summaries).exp().sum(1), torch.full((30,), float(EXPERTS)))


def test_a_gate_tempered_to_nothing_has_no_preference():
    gate, (summaries, _) = gate_of(), domains()
    gate.scale_logits(0.0)
    assert_close(gate(summaries), torch.zeros(30, EXPERTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_tempering_scales_the_logits(factor):
    gate, (summaries, _) = gate_of(), domains()
    pretrain(gate, *domains(), steps=3)  # else biases are zero
    before = gate.logits(summaries)
    gate.scale_logits(factor)
    assert_close(gate.logits(summaries), factor * before)


def test_a_shift_and_a_scale_of_the_hidden_states_do_not_matter():
    (summaries, _), logits = domains(), []
    for given in (summaries, 7 * summaries + 1000):
        gate = gate_of()
        gate.fit_standardization(given)
        logits.append(gate.logits(given))
    assert_close(logits[1], logits[0], rtol=1e-2, atol=1e-2)


def test_a_feature_that_never_changes_does_no_harm():
    gate, (summaries, _) = gate_of(), domains()
    summaries[:, 3] = 1.0
    gate.fit_standardization(summaries)
    assert bool(gate(summaries).isfinite().all())


def test_pretraining_teaches_the_map_from_instructions_to_experts():
    gate, (summaries, experts) = gate_of(), domains(count=60)
    pretrain(gate, summaries[:30], experts[:30], steps=60)
    assert torch.equal(gate(summaries[30:]).argmax(1), experts[30:])


def test_no_pretraining_only_standardises():
    gate, (summaries, experts) = gate_of(), domains()
    pretrain(gate, summaries, experts, steps=0)
    assert torch.equal(gate.inner.weight, gate_of().inner.weight)
    assert_close(gate.mean, summaries.mean(0))


def test_equal_seeds_give_equal_gates():
    assert torch.equal(gate_of(0).inner.weight, gate_of(0).inner.weight)
    assert not torch.equal(gate_of(0).inner.weight, gate_of(1).inner.weight)


# --- clusters


def test_clusters_are_found_whatever_the_seed():
    summaries, experts = domains(apart=5.0)
    for seed in range(3):
        found = kmeans(summaries, EXPERTS, generator=seeded(seed))
        assert len(Counter(zip(found.tolist(), experts.tolist(), strict=True))) == EXPERTS


def test_every_point_is_with_its_nearest_mean():
    """The definition of a k-means solution."""
    summaries, _ = domains(count=40, apart=0.3)
    points = (summaries - summaries.mean(0)) / summaries.std(0, correction=0)
    found = kmeans(summaries, 4, generator=seeded(), rounds=100)
    means = torch.stack([points[found == index].mean(0) for index in range(4)])
    assert torch.equal(((points[:, None] - means) ** 2).sum(2).argmin(1), found)


def test_clusters_depend_on_the_generator_alone():
    summaries, _ = domains(count=40, apart=0.3)
    first, again = (kmeans(summaries, 5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_more_clusters_than_distinct_points_leave_some_empty():
    found = kmeans(torch.ones(5, HIDDEN), 3, generator=seeded())
    assert found.shape == (5,)


# --- how arms begin

DOCUMENTS = random_documents(24, tasks=TASKS)
LAYER = 2
MODEL = tiny_model()


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=8)


def begun(states, arm, *, experts=EXPERTS, seed=0, temper=0.3, prompt_log_weight=-2.0, pretraining=20):
    config = AdapterConfig(
        arm=arm,
        experts=experts,
        prompts_per_expert=2,
        layer=LAYER,
        hidden_size=HIDDEN,
        base_sha256="",
        tasks=TASKS if experts == EXPERTS else (),
    )
    start = AdapterInit(
        gate_pretraining_steps=pretraining, gate_logit_scale=temper, prompt_log_weight=prompt_log_weight, seed=seed
    )
    return RECOVERY_METHODS[arm].initialize(config, AdapterInputs(MODEL, states, TASKS), start)


@pytest.mark.parametrize("experts", [2, EXPERTS, 5])
def test_both_arms_begin_with_the_same_prompts(states, experts):
    mop, single = (begun(states, arm, experts=experts) for arm in ("mop", "single"))
    assert mop.prompts.shape == (experts, 2, HIDDEN)
    assert single.prompts.shape == (1, 2 * experts, HIDDEN)
    assert torch.equal(mop.prompts.flatten(0, 1), single.prompts.flatten(0, 1))
    assert single.gate is None
    assert mop.prompt_log_weight.item() == single.prompt_log_weight.item() == -2.0


def test_an_experts_prompts_begin_as_instruction_states_of_its_own_task(tiny_llama, states):
    for expert, prompts in enumerate(begun(states, "mop").prompts):
        own = torch.cat(
            [
                tiny_llama.run_lower(torch.tensor([document.tokens]), LAYER)[0][1 : document.context_tokens]
                for document in DOCUMENTS
                if document.task == TASKS[expert]
            ]
        )
        assert float((prompts.detach()[:, None] - own).norm(dim=2).amin(1).max()) < 1e-4


def test_the_seed_decides_where_arms_begin(states):
    first, again, other = (begun(states, "mop", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(first.prompts, other.prompts)


@pytest.mark.parametrize("arm", ["mop", "shuffled", "mop+"])
def test_the_seed_draws_the_gate(states, arm):
    first, again, other = (begun(states, arm, seed=seed, pretraining=0).gate for seed in (0, 0, 1))
    assert torch.equal(first.inner.weight, again.inner.weight)
    assert not torch.equal(first.inner.weight, other.inner.weight)
    assert not torch.equal(first.outer.weight, other.outer.weight)


def test_the_gate_begins_pretrained_and_tempered(states):
    full, tempered = (begun(states, "mop", temper=temper).gate for temper in (1.0, 0.25))
    assert_close(tempered.logits(states.means), 0.25 * full.logits(states.means))
    right = full(states.means).argmax(1) == expert_domains(states, TASKS, EXPERTS, generator=seeded())
    assert float(right.float().mean()) > 0.6  # random instructions can only be learnt by heart


def test_as_many_experts_as_tasks_are_the_tasks(states):
    found = expert_domains(states, TASKS, EXPERTS, generator=seeded())
    assert [TASKS[expert] for expert in found.tolist()] == [document.task for document in DOCUMENTS]


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_another_number_of_experts_is_found_by_clustering(states, experts):
    found = expert_domains(states, TASKS, experts, generator=seeded())
    assert found.tolist() == kmeans(states.means, experts, generator=seeded()).tolist()
