"""What a gate does on the rows that are scored: measured on the very batches of the evaluation."""

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
    """What the adapter chose for these documents; None when it chooses nothing.

    `domains` are the experts' tasks, if they have any.
    """
    if not isinstance(adapter, ReportsExpertWeights):
        return None
    weights: dict[int, Tensor] = {}
    with torch.inference_mode():
        for rows in batches_by_length(states.documents, batch_size, generator=None):
            chosen = adapter.expert_weights(model, states.batch(rows).instructions)
            if chosen is None:
                return None
            weights |= zip(rows, chosen.cpu(), strict=True)
    in_order = torch.stack([weights[row] for row in range(len(states.documents))])
    return gate_statistics(in_order, [document.task for document in states.documents], domains)


def gate_statistics(
    weights: Float[Tensor, "documents experts"], task_of: Sequence[str], domains: Sequence[str]
) -> GateStatistics:
    """Means and counts of the weights of each document's experts."""
    tasks = sorted(set(task_of))
    strongest = weights.argmax(1).tolist()
    # on tasks that it was not made for a gate is neither right nor wrong, nor where a group is of no task
    known = domains if len(domains) == weights.shape[1] and set(tasks) <= set(domains) else ()
    right = [known[expert] == task for expert, task in zip(strongest, task_of, strict=True)] if known else []
    counts = torch.zeros(len(tasks), weights.shape[1], dtype=torch.long)
    for expert, task in zip(strongest, task_of, strict=True):
        counts[tasks.index(task), expert] += 1
    shares = weights / weights.sum(1, keepdim=True)
    return GateStatistics(
        tasks=tasks,
        weights=[weights[[name == task for name in task_of]].mean(0).tolist() for task in tasks],
        accuracy=math.fsum(right) / len(right) if right else None,
        entropy_nats=float(-torch.special.xlogy(shares, shares).sum(1).mean()),
        confusion=counts.tolist(),
        load=weights.mean(0).tolist(),
        domains=list(known),
    )
