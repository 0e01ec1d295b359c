"""Accuracy, entropy and load of a gate on the scored rows, in the very batches of the evaluation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.methods.expert_weights import ReportsExpertWeights
from mopcompress.results import GateStatistics


def measure_gate(
    model: LanguageModel, adapter: Adapter, states: HiddenStateDataset, domains: Sequence[str], *, batch_size: int
) -> GateStatistics | None:
    """Return statistics of the experts' weights for these documents; None for an adapter without such weights.

    `domains` are the experts' tasks, [experts], or empty.
    """
    if not isinstance(adapter, ReportsExpertWeights):
        return None
    by_row: dict[int, Tensor] = {}
    with torch.inference_mode():
        for rows in batches_by_length(states.documents, batch_size, generator=None):
            weights = adapter.expert_weights(model, states.batch(rows).instructions)
            if weights is None:
                return None
            by_row |= zip(rows, weights.cpu(), strict=True)
    in_order = torch.stack([by_row[row] for row in range(len(states.documents))])
    return gate_statistics(in_order, [document.task for document in states.documents], domains)


def gate_statistics(
    weights: Float[Tensor, "documents experts"], document_tasks: Sequence[str], domains: Sequence[str]
) -> GateStatistics:
    """Return means and counts of the weights of each document's experts, 1 being the weight of a plain prompt."""
    tasks = sorted(set(document_tasks))
    strongest = weights.argmax(1).tolist()
    # a gate is neither right nor wrong on tasks that it was not made for, nor if a group belongs to no task
    expert_tasks = domains if len(domains) == weights.shape[1] and set(tasks) <= set(domains) else ()
    pairs = list(zip(strongest, document_tasks, strict=True))
    correct = [expert_tasks[expert] == task for expert, task in pairs] if expert_tasks else []
    counts = torch.zeros(len(tasks), weights.shape[1], dtype=torch.long)
    for expert, task in pairs:
        counts[tasks.index(task), expert] += 1
    fractions = weights / weights.sum(1, keepdim=True)
    return GateStatistics(
        tasks=tasks,
        weights=[weights[[name == task for name in document_tasks]].mean(0).tolist() for task in tasks],
        accuracy=math.fsum(correct) / len(correct) if correct else None,
        entropy_nats=float(-torch.special.xlogy(fractions, fractions).sum(1).mean()),
        confusion=counts.tolist(),
        load=weights.mean(0).tolist(),
        domains=list(expert_tasks),
    )
