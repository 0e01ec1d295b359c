"""First prompts and expert domains: tasks, or clusters of instructions."""

from collections import Counter

import pytest
import torch
from factories import TASKS, adapter_init, initialized_adapter
from tiny_models import HIDDEN, random_documents, tiny_model

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.methods.prompt_initialization import expert_domains, kmeans

EXPERTS, LAYER = len(TASKS), 2
DOCUMENTS = random_documents(24)
MODEL = tiny_model()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(count=30, *, distance=3.0):
    """Return points in three clouds, in turn, far from the origin."""
    experts = torch.arange(count) % EXPERTS
    centres = distance * torch.randn(EXPERTS, HIDDEN, generator=seeded(0)) + 50
    return centres[experts] + torch.randn(count, HIDDEN, generator=seeded(1)), experts


# --- clusters


def test_clusters_are_found_whatever_the_seed():
    means, experts = clouds(distance=5.0)
    for seed in range(3):
        clusters = kmeans(means, EXPERTS, generator=seeded(seed))
        assert len(Counter(zip(clusters.tolist(), experts.tolist(), strict=True))) == EXPERTS


def test_every_point_is_with_its_nearest_mean():
    """The definition of a k-means solution."""
    means, _ = clouds(count=40, distance=0.3)
    points = (means - means.mean(0)) / means.std(0, correction=0)
    clusters = kmeans(means, 4, generator=seeded(), rounds=100)
    centres = torch.stack([points[clusters == index].mean(0) for index in range(4)])
    assert torch.equal(((points[:, None] - centres) ** 2).sum(2).argmin(1), clusters)


def test_clusters_depend_on_the_generator_alone():
    means, _ = clouds(count=40, distance=0.3)
    first, again = (kmeans(means, 5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_more_clusters_than_distinct_points_leave_some_empty():
    clusters = kmeans(torch.ones(5, HIDDEN), 3, generator=seeded())
    assert clusters.shape == (5,)


# --- domains and first prompts


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=8)


def initialized(states, arm, *, experts=EXPERTS, seed=0):
    tasks = TASKS if experts == EXPERTS else ()
    init = adapter_init(gate_pretraining_steps=20, gate_logit_scale=0.3, prompt_log_weight=-2.0, seed=seed)
    return initialized_adapter(arm, MODEL, states, init=init, experts=experts, tasks=tasks)[0]


def test_as_many_experts_as_tasks_are_the_tasks(states):
    domains = expert_domains(states, TASKS, EXPERTS, generator=seeded())
    assert [TASKS[expert] for expert in domains.tolist()] == [document.task for document in DOCUMENTS]


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_another_number_of_experts_is_found_by_clustering(states, experts):
    domains = expert_domains(states, TASKS, experts, generator=seeded())
    assert domains.tolist() == kmeans(states.means, experts, generator=seeded()).tolist()


@pytest.mark.parametrize("experts", [2, EXPERTS, 5])
def test_mop_and_single_begin_with_the_same_prompts(states, experts):
    mop, single = (initialized(states, arm, experts=experts) for arm in ("mop", "single"))
    assert mop.prompts.shape == (experts, 2, HIDDEN)
    assert single.prompts.shape == (1, 2 * experts, HIDDEN)
    assert torch.equal(mop.prompts.flatten(0, 1), single.prompts.flatten(0, 1))
    assert single.gate is None
    assert mop.prompt_log_weight.item() == single.prompt_log_weight.item() == -2.0


def test_an_experts_prompts_begin_as_states_of_its_task(states):
    prompts = initialized(states, "mop").prompts.detach()
    instructions = states.batch(range(len(DOCUMENTS))).instructions
    for expert, task in enumerate(TASKS):
        in_task = [document.task == task for document in DOCUMENTS]
        task_states = instructions.hidden[in_task].flatten(0, 1)
        assert all(bool((task_states == prompt).all(1).any()) for prompt in prompts[expert])


def test_first_prompts_are_no_first_tokens_of_instructions(tiny_llama, states):
    """The first position is an attention sink."""
    for expert, prompts in enumerate(initialized(states, "mop").prompts):
        task_states = torch.cat(
            [
                tiny_llama.run_lower(torch.tensor([document.tokens]), LAYER)[0][1 : document.context_tokens]
                for document in DOCUMENTS
                if document.task == TASKS[expert]
            ]
        )
        assert float((prompts.detach()[:, None] - task_states).norm(dim=2).amin(1).max()) < 1e-4


def test_the_seed_decides_the_first_values(states):
    first, again, other = (initialized(states, "mop", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(first.prompts, other.prompts)
