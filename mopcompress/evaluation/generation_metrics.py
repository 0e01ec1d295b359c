"""ROUGE-L and exact match of answers that a model generates to the test rows.

Rows run in the batches of the perplexity evaluation, and adapters read the same cached instructions. An arm that needs
the true task, or another row's instruction, therefore acts as it does there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import takewhile

import torch

from mopcompress.data.encoding import Document
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.generation import check_fits, encode_prompts, generate_from_contexts
from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset
from mopcompress.evaluation.rouge import rouge_l, same_words
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import Progress
from mopcompress.results import AnswerSample, DocumentScores, GeneratedAnswers

SAMPLES = 3  # per arm; rows alternate between tasks, so samples are of as many tasks


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
    """Generate an answer per document; return `scores` with its ROUGE-L (0 to 1) and exact match added.

    Raises `DataError` when an instruction and its answer exceed the model's context.
    """
    answers = generate_answers(
        model, states, apply_adapter, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    pairs = [(answer, _reference(model, document)) for answer, document in zip(answers, states.documents, strict=True)]
    generated = GeneratedAnswers(
        answers=answers,
        rouge_l=[rouge_l(*pair) for pair in pairs],
        exact=[same_words(*pair) for pair in pairs],
    )
    return replace(scores, written=generated)


def generate_answers(
    model: LanguageModel,
    states: HiddenStateDataset,
    apply_adapter: ApplyAdapter | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress,
) -> list[str]:
    """Return the greedy answer to every document's instruction, in the order of the documents."""
    documents = states.documents
    contexts = [document.tokens[: document.context_tokens] for document in documents]
    check_fits(model.network, contexts, max_new_tokens)
    _, end_tokens = encode_prompts(model.network, model.tokenizer, ["x"])
    answers, done = [""] * len(documents), 0
    for rows in batches_by_length(documents, batch_size, generator=None):
        with torch.inference_mode(), apply_adapter(states.batch(rows).instructions) if apply_adapter else nullcontext():
            batch = generate_from_contexts(
                model.network,
                model.tokenizer,
                [contexts[row] for row in rows],
                end_tokens,
                max_new_tokens=max_new_tokens,
            )
        for row, answer in zip(rows, batch, strict=True):
            answers[row] = answer
        progress.update("writing answers", done := done + len(rows), len(documents))
    return answers


def sample_answers(
    model: LanguageModel, documents: Sequence[Document], scores: DocumentScores
) -> tuple[AnswerSample, ...]:
    """Return the first answers with their instructions and references; none if no answers were generated."""
    if scores.written is None:
        return ()
    (template,), _ = encode_prompts(model.network, model.tokenizer, ["x"])
    return tuple(
        AnswerSample(
            task=document.task,
            instruction=_decode(model, _without_template(template, document.tokens[: document.context_tokens])),
            reference=_reference(model, document),
            answer=answer,
        )
        for document, answer in zip(documents[:SAMPLES], scores.written.answers, strict=False)
    )


def _reference(model: LanguageModel, document: Document) -> str:
    return _decode(model, document.tokens[document.context_tokens :])


def _decode(model: LanguageModel, tokens: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def _without_template(template: Sequence[int], context: Sequence[int]) -> Sequence[int]:
    """Return the context's tokens without the ones around every instruction, which `template` begins and ends with."""
    head = _count_common(template, context)
    tail = _count_common(template[:head:-1], context[:head:-1])
    return context[head : len(context) - tail]


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
