"""Perplexity and exact match of a model, with or without an adapter, over the same scored tokens.

Exact match needs no generation: greedy decoding gives exactly the reference tokens (the end of turn included) if and
only if every reference token is the most likely one after those before it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from mopcompress.errors import NumericalError
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.models.language_model import LanguageModel
from mopcompress.results import DocumentScores, TaskScore


def evaluate(
    model: LanguageModel,
    states: HiddenStateDataset,
    applied: ApplyAdapter | None = None,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> DocumentScores:
    """Score every document's response, under a compiled adapter if one is given.

    `progress` is told how many documents are done.

    Raises `NumericalError` when a document's likelihood is not a number.
    """
    documents = states.documents
    nats, exact = [0.0] * len(documents), [False] * len(documents)
    done = 0
    with torch.inference_mode():
        for rows in batches_by_length(documents, batch_size, generator=None):
            batch = states.batch(rows)
            with applied(batch.instructions) if applied else nullcontext():
                scores = score_responses(model, batch, states.layer)
            each = scores.nll.cpu().double()  # not on the device: some have no float64
            sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, batch.example.cpu(), each)
            misses = torch.zeros(len(rows)).index_add_(0, batch.example.cpu(), (~scores.greedy).float().cpu())
            for row, total, missed in zip(rows, sums.tolist(), misses.tolist(), strict=True):
                if math.isnan(total):  # an infinite loss is a result, not a mistake
                    raise NumericalError(
                        f"document {row} ({documents[row].task}): its loss is {total}; the model is broken"
                    )
                nats[row], exact[row] = total, missed == 0
            progress(done := done + len(rows))
    return DocumentScores(
        tasks=[document.task for document in documents],
        nats=nats,
        scored_tokens=[len(document.tokens) - document.context_tokens for document in documents],
        exact=exact,
    )


def task_scores(scores: DocumentScores) -> dict[str, TaskScore]:
    """Per task, in alphabetical order."""
    return {task: _score(scores, [name == task for name in scores.tasks]) for task in sorted(set(scores.tasks))}


def micro_average(scores: DocumentScores) -> TaskScore:
    """Over all documents: perplexity is exp of mean nats over all scored tokens."""
    return _score(scores, [True] * len(scores.tasks))


def macro_perplexity(scores: DocumentScores) -> float:
    """exp of the mean over tasks of each task's mean nats a token: every task counts the same."""
    tasks = task_scores(scores).values()
    return _exp(math.fsum(math.log(task.perplexity) for task in tasks) / len(tasks))


def macro_rouge_l(scores: DocumentScores) -> float | None:
    """The mean over tasks of each task's mean; None where no answers were written."""
    means = [task.rouge_l for task in task_scores(scores).values() if task.rouge_l is not None]
    return math.fsum(means) / len(means) if means else None


def _score(scores: DocumentScores, chosen: Sequence[bool]) -> TaskScore:
    rows, written = [row for row, take in enumerate(chosen) if take], scores.written
    tokens = sum(scores.scored_tokens[row] for row in rows)
    return TaskScore(
        documents=len(rows),
        scored_tokens=tokens,
        perplexity=_exp(math.fsum(scores.nats[row] for row in rows) / tokens),
        exact_match=sum(scores.exact[row] for row in rows) / len(rows),
        rouge_l=math.fsum(written.rouge_l[row] for row in rows) / len(rows) if written else None,
        written_exact_match=sum(written.exact[row] for row in rows) / len(rows) if written else None,
    )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
