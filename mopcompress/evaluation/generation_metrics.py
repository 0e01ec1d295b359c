"""Answers that a model writes to the test rows, and how they compare with the references.

Rows run in the batches of the evaluation, and adapters read the same cached instructions: an arm that is told the task,
or that looks at a neighbour's instruction, does here what it does there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile

import torch

from mopcompress.data.encoding import Document
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.generation import answer_contexts, check_fits, contexts_of
from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset
from mopcompress.evaluation.rouge import rouge_l, same_words
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import Progress
from mopcompress.results import AnswerSample, DocumentScores, GeneratedAnswers

SAMPLES = 3  # samples of an arm; rows come task after task, so they are of as many tasks


def score_generation(
    scores: DocumentScores,
    model: LanguageModel,
    states: HiddenStateDataset,
    apply_adapter: ApplyAdapter | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> DocumentScores:
    """Add the scores of generated answers: ROUGE-L and exact match.

    Raises `DataError` when an instruction and its answer exceed the model's context.
    """
    answers = generate_answers(
        model, states, apply_adapter, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    pairs = [(answer, _reference(model, document)) for answer, document in zip(answers, states.documents, strict=True)]
    written = GeneratedAnswers(
        answers=answers,
        rouge_l=[rouge_l(*pair) for pair in pairs],
        exact=[same_words(*pair) for pair in pairs],
    )
    return replace(scores, written=written)


def generate_answers(
    model: LanguageModel,
    states: HiddenStateDataset,
    apply_adapter: ApplyAdapter | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """The greedy answer to every document's instruction, in their order."""
    documents = states.documents
    contexts = [document.tokens[: document.context_tokens] for document in documents]
    check_fits(model.network, contexts, max_new_tokens)
    _, ends = contexts_of(model.network, model.tokenizer, ["x"])
    answers, done = [""] * len(documents), 0
    for rows in batches_by_length(documents, batch_size, generator=None):
        with torch.inference_mode(), apply_adapter(states.batch(rows).instructions) if apply_adapter else nullcontext():
            some = answer_contexts(
                model.network, model.tokenizer, [contexts[row] for row in rows], ends, max_new_tokens=max_new_tokens
            )
        for row, answer in zip(rows, some, strict=True):
            answers[row] = answer
        progress.update("writing answers", done := done + len(rows), len(documents))
    return answers


def sample_answers(
    model: LanguageModel, documents: Sequence[Document], scores: DocumentScores
) -> tuple[AnswerSample, ...]:
    """The first answers, with what they answer; none where none were written."""
    if scores.written is None:
        return ()
    (template,), _ = contexts_of(model.network, model.tokenizer, ["x"])
    return tuple(
        AnswerSample(
            task=document.task,
            instruction=_decoded(model, _without(template, document.tokens[: document.context_tokens])),
            reference=_reference(model, document),
            answer=answer,
        )
        for document, answer in zip(documents[:SAMPLES], scores.written.answers, strict=False)
    )


def _reference(model: LanguageModel, document: Document) -> str:
    return _decoded(model, document.tokens[document.context_tokens :])


def _decoded(model: LanguageModel, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _without(template: Sequence[int], context: Sequence[int]) -> Sequence[int]:
    """The context's tokens without those that stand around every instruction, as they do in `template`."""
    head = _in_common(template, context)
    tail = _in_common(template[:head:-1], context[:head:-1])
    return context[head : len(context) - tail]


def _in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
