"""Statistics of a gate describe the weights that acted when the documents were scored."""

import math
from collections import Counter

import pytest
import torch
from factories import TASKS
from tiny_models import HIDDEN, random_documents
from torch.testing import assert_close

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.recover.gate_statistics import gate_statistics, measure_gate
from mopcompress.recover.methods.expert_weights import ExpertWeighting, shuffled_weights
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.idp import DynamicPrompts
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.methods.smop import RoutedPrompts

DOCUMENTS = random_documents(11, tasks=TASKS)
LAYER, EXPERTS = 2, 3


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def mixture_of(**weighting):
    seeded = torch.Generator().manual_seed(0)
    gate = Gate(HIDDEN, EXPERTS, generator=seeded)
    gate.scale_logits(3.0)
    return MixtureOfPrompts(
        torch.randn(3, 2, HIDDEN, generator=seeded), LAYER, gate, weighting=ExpertWeighting(**weighting)
    )


def test_statistics_are_as_defined():
    weights = 3 * torch.rand(11, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    tasks = [document.task for document in DOCUMENTS]
    statistics = gate_statistics(weights, tasks, TASKS)
    rows = weights.tolist()
    pairs = Counter((task, row.index(max(row))) for task, row in zip(tasks, rows, strict=True))
    assert statistics.confusion == [[pairs[task, expert] for expert in range(3)] for task in TASKS]
    assert sum(map(sum, statistics.confusion)) == 11
    for expert in range(3):
        assert statistics.load[expert] == pytest.approx(math.fsum(row[expert] for row in rows) / 11)
        for index, task in enumerate(TASKS):
            of_task = [row[expert] for row, name in zip(rows, tasks, strict=True) if name == task]
            assert statistics.weights[index][expert] == pytest.approx(math.fsum(of_task) / len(of_task))
    assert statistics.accuracy == pytest.approx(sum(pairs[task, expert] for expert, task in enumerate(TASKS)) / 11)
    entropies = [-math.fsum(g / 3 * math.log(g / 3) for g in row) for row in rows]
    assert statistics.entropy_nats == pytest.approx(math.fsum(entropies) / 11, rel=1e-5)
    assert statistics.domains == list(TASKS)


def test_domains_need_not_be_in_alphabetical_order():
    statistics = gate_statistics(torch.eye(3)[[1, 0]], ["add", "sort"], ("sort", "add", "tell"))
    assert statistics.accuracy == 1
    assert statistics.confusion == [[0, 1, 0], [1, 0, 0]]


def test_without_known_domains_there_is_no_accuracy():
    for domains in ((), ("add", "sort", "other")):
        statistics = gate_statistics(torch.ones(3, 3), list(TASKS), domains)
        assert statistics.accuracy is None
        assert statistics.domains == []
        assert statistics.entropy_nats == pytest.approx(math.log(3))


def test_with_more_groups_than_tasks_there_is_no_accuracy():
    """A shared group of `idp` is one more group to choose."""
    statistics = gate_statistics(torch.eye(4)[[3, 0, 1]], list(TASKS), TASKS)
    assert (statistics.accuracy, statistics.domains) == (None, [])
    assert statistics.confusion == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("weighting", [{}, {"top_k": 1}, {"weight_fn": shuffled_weights}])
def test_the_weights_are_those_of_the_evaluation(tiny_llama, states, monkeypatch, weighting):
    mixture, log_weights = mixture_of(**weighting), []
    compute = MixtureOfPrompts.inference_log_weights

    def record(mixture, instructions):
        log_weights.append(compute(mixture, instructions))
        return log_weights[-1]

    monkeypatch.setattr(MixtureOfPrompts, "inference_log_weights", record)
    evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=4)
    monkeypatch.undo()
    statistics = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert_close(torch.tensor(statistics.load), torch.cat(log_weights).exp().mean(0))
    if "top_k" in weighting:
        assert statistics.entropy_nats == pytest.approx(0)


def test_every_document_is_counted_for_its_own_task(tiny_llama, states):
    """Batches are by length, statistics by document."""
    mixture = mixture_of()
    weights = mixture.gate(states.means).exp().detach()
    expected = gate_statistics(weights, [document.task for document in DOCUMENTS], TASKS)
    statistics = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert statistics.confusion == expected.confusion
    assert_close(torch.tensor(statistics.weights), torch.tensor(expected.weights))


def test_a_choice_of_one_group_is_a_weight_of_1(tiny_llama, states):
    adapter = DynamicPrompts(torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(0)), LAYER)
    statistics = measure_gate(tiny_llama, adapter, states, TASKS, batch_size=4)
    assert sum(statistics.load) == pytest.approx(1)
    assert [sum(column) / 11 for column in zip(*statistics.confusion, strict=True)] == pytest.approx(statistics.load)


def test_a_router_weighs_its_group_by_its_probability(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, 0, batch_size=4)
    adapter = RoutedPrompts(torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(0)))
    statistics = measure_gate(tiny_llama, adapter, states, (), batch_size=4)
    strongest = adapter.router(states.means).softmax(1).max(1)
    expected = torch.zeros(11, 3).scatter(1, strongest.indices[:, None], strongest.values[:, None]).mean(0)
    assert_close(torch.tensor(statistics.load), expected.detach())
    assert (statistics.accuracy, statistics.entropy_nats) == (None, pytest.approx(0))


def test_without_a_gate_there_are_no_statistics(tiny_llama, states):
    for groups in (torch.randn(1, 6, HIDDEN), torch.randn(3, 2, HIDDEN)):
        assert measure_gate(tiny_llama, MixtureOfPrompts(groups, LAYER, None), states, TASKS, batch_size=4) is None


def test_a_shared_expert_is_left_out(tiny_llama, states):
    seeded = torch.Generator().manual_seed(0)
    groups, gate = torch.randn(4, 2, HIDDEN, generator=seeded), Gate(HIDDEN, EXPERTS, generator=seeded)
    mixture = MixtureOfPrompts(groups, LAYER, gate, weighting=ExpertWeighting(shared=True))
    statistics = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert len(statistics.load) == EXPERTS
    assert sum(statistics.load) == pytest.approx(EXPERTS)
