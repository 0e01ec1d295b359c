"""Perplexity and exact match of a model, with or without an adapter, over the same scored tokens.

Exact match needs no generation. Greedy decoding gives exactly the reference tokens (the end of turn included) if and
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
    apply_adapter: ApplyAdapter | None = None,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> DocumentScores:
    """Score the response tokens of every document, under a compiled adapter if one is given.

    Args:
        model: The frozen model.
        states: The documents' hidden states at the adapter's layer, [documents, tokens, hidden]. Without an adapter,
            those at any layer.
        apply_adapter: The result of an adapter's `compile_for_inference`; None scores the model alone.
        batch_size: Documents that run at once. It changes scores by rounding only.
        progress: Receives the number of documents that are done, after each batch.

    Returns:
        An entry per document, in the order of `states.documents`: its negative log-likelihood in nats, summed over its
        scored tokens, the number of these tokens, and whether greedy decoding gives exactly the reference.

    Raises:
        NumericalError: A document's likelihood is not a number. An infinite loss is no error.

    Example:
        >>> from mopcompress import evaluate
        >>> from mopcompress.data.encoding import Document
        >>> from mopcompress.evaluation.hidden_states import HiddenStateDataset
        >>> from mopcompress.evaluation.perplexity import micro_average
        >>> from mopcompress.models.language_model import LanguageModel
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        >>> model = LanguageModel(LlamaForCausalLM(config).eval())
        >>> documents = [Document(task="count", tokens=(1, 2, 3, 4, 5), context_tokens=3)]  # instruction: 1, 2, 3
        >>> states = HiddenStateDataset(model, documents, layer=1, batch_size=1)
        >>> scores = evaluate(model, states, batch_size=1)
        >>> scores.scored_tokens
        [2]
        >>> 50 < micro_average(scores).perplexity < 80  # an untrained model: about its vocabulary
        True
    """
    documents = states.documents
    nats, exact = [0.0] * len(documents), [False] * len(documents)
    done = 0
    with torch.inference_mode():
        for rows in batches_by_length(documents, batch_size, generator=None):
            batch = states.batch(rows)
            with apply_adapter(batch.instructions) if apply_adapter else nullcontext():
                scores = score_responses(model, batch, states.layer)
            nll = scores.nll.cpu().double()  # not on the device: some have no float64
            sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, batch.example.cpu(), nll)
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
    """Return the scores of each task's documents, by task in alphabetical order."""
    return {task: _score(scores, [name == task for name in scores.tasks]) for task in sorted(set(scores.tasks))}


def micro_average(scores: DocumentScores) -> TaskScore:
    """Return the scores over all documents; perplexity is exp of the mean nats per scored token."""
    return _score(scores, [True] * len(scores.tasks))


def macro_perplexity(scores: DocumentScores) -> float:
    """Return exp of the mean over tasks of each task's mean nats per token: every task weighs the same."""
    tasks = task_scores(scores).values()
    return _exp(math.fsum(math.log(task.perplexity) for task in tasks) / len(tasks))


def macro_rouge_l(scores: DocumentScores) -> float | None:
    """Return the mean over tasks of each task's mean ROUGE-L, 0 to 1; None if no answers were generated."""
    means = [task.rouge_l for task in task_scores(scores).values() if task.rouge_l is not None]
    return math.fsum(means) / len(means) if means else None


def _score(scores: DocumentScores, selected: Sequence[bool]) -> TaskScore:
    rows, written = [row for row, is_selected in enumerate(selected) if is_selected], scores.written
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
