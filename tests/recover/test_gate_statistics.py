"""What is said of a gate is what acted when the documents were scored."""

import math
from collections import Counter

import pytest
import torch
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

TASKS = ("add", "sort", "tell")
DOCUMENTS = random_documents(11, tasks=TASKS)
LAYER, EXPERTS = 2, 3


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def mixture_of(**mixing):
    seeded = torch.Generator().manual_seed(0)
    gate = Gate(HIDDEN, EXPERTS, generator=seeded)
    gate.scale_logits(3.0)
    return MixtureOfPrompts(torch.randn(3, 2, HIDDEN, generator=seeded), LAYER, gate, weighting=ExpertWeighting(**mixing))


def test_a_reading_is_its_definition():
    weights = 3 * torch.rand(11, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    task_of = [document.task for document in DOCUMENTS]
    reading = gate_statistics(weights, task_of, TASKS)
    rows = weights.tolist()
    pairs = Counter((task, row.index(max(row))) for task, row in zip(task_of, rows, strict=True))
    assert reading.confusion == [[pairs[task, expert] for expert in range(3)] for task in TASKS]
    assert sum(map(sum, reading.confusion)) == 11
    for expert in range(3):
        assert reading.load[expert] == pytest.approx(math.fsum(row[expert] for row in rows) / 11)
        for place, task in enumerate(TASKS):
            own = [row[expert] for row, name in zip(rows, task_of, strict=True) if name == task]
            assert reading.weights[place][expert] == pytest.approx(math.fsum(own) / len(own))
    assert reading.accuracy == pytest.approx(sum(pairs[task, place] for place, task in enumerate(TASKS)) / 11)
    entropies = [-math.fsum(g / 3 * math.log(g / 3) for g in row) for row in rows]
    assert reading.entropy_nats == pytest.approx(math.fsum(entropies) / 11, rel=1e-5)
    assert reading.domains == list(TASKS)


def test_domains_in_another_order_than_the_alphabets_are_followed():
    reading = gate_statistics(torch.eye(3)[[1, 0]], ["add", "sort"], ("sort", "add", "tell"))
    assert reading.accuracy == 1
    assert reading.confusion == [[0, 1, 0], [1, 0, 0]]


def test_without_a_map_a_gate_is_neither_right_nor_wrong():
    for domains in ((), ("add", "sort", "other")):
        reading = gate_statistics(torch.ones(3, 3), list(TASKS), domains)
        assert reading.accuracy is None
        assert reading.domains == []
        assert reading.entropy_nats == pytest.approx(math.log(3))


def test_a_choice_more_than_there_are_tasks_makes_a_gate_neither_right_nor_wrong():
    """As a shared group of `idp`, which stands beside the others to be chosen."""
    reading = gate_statistics(torch.eye(4)[[3, 0, 1]], list(TASKS), TASKS)
    assert (reading.accuracy, reading.domains) == (None, [])
    assert reading.confusion == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("mixing", [{}, {"top_k": 1}, {"weighing": shuffled_weights}])
def test_the_weights_are_those_of_the_evaluation(tiny_llama, states, monkeypatch, mixing):
    mixture, seen = mixture_of(**mixing), []
    acting = MixtureOfPrompts.acting
    monkeypatch.setattr(MixtureOfPrompts, "acting", lambda self, read: seen.append(acting(self, read)) or seen[-1])
    evaluate(tiny_llama, states, mixture.compile_for_inference(tiny_llama), batch_size=4)
    monkeypatch.undo()
    reading = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert_close(torch.tensor(reading.load), torch.cat(seen).exp().mean(0))
    if "top_k" in mixing:
        assert reading.entropy_nats == pytest.approx(0)


def test_every_document_is_counted_for_its_own_task(tiny_llama, states):
    """Batches are by length, the reading by document."""
    mixture = mixture_of()
    weights = mixture.gate(states.means).exp().detach()
    expected = gate_statistics(weights, [document.task for document in DOCUMENTS], TASKS)
    reading = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert reading.confusion == expected.confusion
    assert_close(torch.tensor(reading.weights), torch.tensor(expected.weights))


def test_one_prompt_of_several_is_a_choice(tiny_llama, states):
    adapter = DynamicPrompts(torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(0)), LAYER)
    reading = measure_gate(tiny_llama, adapter, states, TASKS, batch_size=4)
    assert sum(reading.load) == pytest.approx(1)
    assert [sum(column) / 11 for column in zip(*reading.confusion, strict=True)] == pytest.approx(reading.load)


def test_a_router_chooses_one_prompt_with_its_probability(tiny_llama):
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, 0, batch_size=4)
    adapter = RoutedPrompts(torch.randn(3, 2, HIDDEN, generator=torch.Generator().manual_seed(0)))
    reading = measure_gate(tiny_llama, adapter, states, (), batch_size=4)
    likeliest = adapter.router(states.means).softmax(1).max(1)
    expected = torch.zeros(11, 3).scatter(1, likeliest.indices[:, None], likeliest.values[:, None]).mean(0)
    assert_close(torch.tensor(reading.load), expected.detach())
    assert (reading.accuracy, reading.entropy_nats) == (None, pytest.approx(0))


def test_what_has_no_gate_chooses_nothing(tiny_llama, states):
    for groups in (torch.randn(1, 6, HIDDEN), torch.randn(3, 2, HIDDEN)):
        assert measure_gate(tiny_llama, MixtureOfPrompts(groups, LAYER, None), states, TASKS, batch_size=4) is None


def test_a_shared_expert_is_not_in_it(tiny_llama, states):
    seeded = torch.Generator().manual_seed(0)
    groups, gate = torch.randn(4, 2, HIDDEN, generator=seeded), Gate(HIDDEN, EXPERTS, generator=seeded)
    mixture = MixtureOfPrompts(groups, LAYER, gate, weighting=ExpertWeighting(shared=True))
    reading = measure_gate(tiny_llama, mixture, states, TASKS, batch_size=4)
    assert len(reading.load) == EXPERTS
    assert sum(reading.load) == pytest.approx(EXPERTS)
