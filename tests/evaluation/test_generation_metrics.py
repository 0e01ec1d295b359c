"""Generated answers: greedy decoding under the adapter as evaluation applies it, for every arm, and their scores."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from factories import on_progress, perturbed_adapter
from tiny_models import generate, random_documents, tiny_model

from mopcompress.data.encoding import Document
from mopcompress.errors import DataError
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.generation import encode_prompts
from mopcompress.evaluation.generation_metrics import generate_answers, sample_answers, score_generation
from mopcompress.evaluation.hidden_states import ApplyAdapter, HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, macro_rouge_l, micro_average, task_scores
from mopcompress.evaluation.rouge import rouge_l
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import silent
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.results import DocumentScores, GeneratedAnswers

NEW = 5
DOCUMENTS = random_documents(7, tasks=("add", "sort"))


def arm_of(name: str) -> tuple[LanguageModel, Adapter | None]:
    """Return a model and an adapter whose values are large enough to change answers."""
    model = tiny_model()
    if name == "none":
        return model, None
    adapter, _ = perturbed_adapter(name, model, layer=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in adapter.parameter_groups().values():
            for parameter in group:
                parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator)).requires_grad_(False)
    return model, adapter


def states_of(model: LanguageModel, adapter: Adapter | None, documents: tuple[Document, ...]) -> HiddenStateDataset:
    return HiddenStateDataset(model, documents, adapter.layer if adapter else 1, batch_size=4)


def answers(
    model: LanguageModel, adapter: Adapter | None, documents: tuple[Document, ...] = DOCUMENTS, *, batch_size: int = 3
) -> list[str]:
    states = states_of(model, adapter, documents)
    return generate_answers(
        model, states, compiled(model, adapter), max_new_tokens=NEW, batch_size=batch_size, progress=silent
    )


def compiled(model: LanguageModel, adapter: Adapter | None) -> ApplyAdapter | None:
    return adapter.compile_for_inference(model) if adapter else None


def generation_scores(
    model: LanguageModel,
    adapter: Adapter | None,
    states: HiddenStateDataset,
    scores: DocumentScores,
    *,
    batch_size: int = 4,
) -> GeneratedAnswers:
    with_answers = score_generation(
        scores,
        model,
        states,
        compiled(model, adapter),
        max_new_tokens=NEW,
        batch_size=batch_size,
        progress=silent,
    )
    assert with_answers.written is not None
    return with_answers.written


@torch.no_grad()
def token_by_token(
    model: LanguageModel, adapter: Adapter | None, documents: tuple[Document, ...], *, batch_size: int = 3
) -> list[list[int]]:
    """Decode greedily by the definition: all states are computed again for each token, without a cache.

    The rows of a batch go on together.
    """
    states = states_of(model, adapter, documents)
    generated: list[list[int]] = [[] for _ in documents]
    for rows in batches_by_length(documents, batch_size, generator=None):
        instructions = states.batch(rows).instructions
        for _ in range(NEW):
            texts = [[*documents[row].tokens[: documents[row].context_tokens], *generated[row]] for row in rows]
            tokens = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.long)
            for row_tokens, text in zip(tokens, texts, strict=True):
                row_tokens[: len(text)] = torch.tensor(text)
            hidden = model.run_lower(tokens, states.layer)
            with adapter.compile_for_inference(model)(instructions) if adapter else nullcontext():
                outputs = model.run_upper(hidden, states.layer)
                last = torch.stack([output[len(text) - 1] for output, text in zip(outputs, texts, strict=True)])
                next_tokens = model.logits(last).argmax(1).tolist()
            for row, token in zip(rows, next_tokens, strict=True):
                generated[row].append(token)
    return generated


def decoded(model: LanguageModel, tokens: list[int]) -> str:
    end = tokens.index(2) if 2 in tokens else len(tokens)
    return str(model.tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", ["none", *RECOVERY_METHODS])
def test_every_arm_generates_its_most_likely_tokens(name: str) -> None:
    model, adapter = arm_of(name)
    generated = token_by_token(model, adapter, DOCUMENTS)
    assert answers(model, adapter) == [decoded(model, tokens) for tokens in generated]
    assert name == "none" or answers(model, adapter) != answers(model, None)


@pytest.mark.parametrize("name", ["none", *RECOVERY_METHODS])
def test_exact_match_of_evaluation_is_that_of_generation(name: str) -> None:
    """References are the arm's own answers, every second with another word in it."""
    model, adapter = arm_of(name)
    documents = []
    for index, (document, tokens) in enumerate(
        zip(DOCUMENTS, token_by_token(model, adapter, DOCUMENTS, batch_size=1), strict=True)
    ):
        response = tokens[: tokens.index(2)] if 2 in tokens else tokens
        response = response or [7]
        changed = [3 + (response[0] + 7) % 60, *response[1:]] if index % 2 else response
        context = document.tokens[: document.context_tokens]
        documents.append(Document(document.task, (*context, *changed, 2), len(context)))
    states = states_of(model, adapter, tuple(documents))
    scores = evaluate(model, states, adapter.compile_for_inference(model) if adapter else None, batch_size=1)
    written = generation_scores(model, adapter, states, scores, batch_size=1)
    assert all(same for exact, same in zip(scores.exact, written.exact, strict=True) if exact)
    assert [value == 1 for value in written.rouge_l] == written.exact
    assert not any(written.exact[1::2])
    assert any(written.exact)


def test_the_batch_does_not_matter() -> None:
    model, adapter = arm_of("mop")
    assert answers(model, adapter, batch_size=1) == answers(model, adapter, batch_size=7)


def test_the_response_is_not_peeked_at() -> None:
    model, adapter = arm_of("mop")
    others = tuple(
        replace(
            document,
            tokens=(
                *document.tokens[: document.context_tokens],
                *reversed(document.tokens[document.context_tokens :]),
            ),
        )
        for document in DOCUMENTS
    )
    assert others != DOCUMENTS
    assert answers(model, adapter, others) == answers(model, adapter)


def test_documents_are_answered_as_their_texts_are() -> None:
    """Documents hold tokens; `generate` takes text."""
    model, adapter = arm_of("mop")
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13"]
    contexts, _ = encode_prompts(model.network, model.tokenizer, prompts)
    documents = tuple(Document("add", (*context, 7, 2), len(context)) for context in contexts)
    assert answers(model, adapter, documents) == generate(model, adapter, prompts, max_new_tokens=NEW)


def test_answers_beyond_the_context_are_refused_at_once() -> None:
    model, _ = arm_of("none")
    messages: list[str] = []
    with pytest.raises(DataError, match="context of 64 tokens"):
        generate_answers(
            model,
            states_of(model, None, DOCUMENTS),
            None,
            max_new_tokens=60,
            batch_size=1,
            progress=on_progress(lambda what, _done, _total: messages.append(what)),
        )
    assert not messages


def test_scores_without_answers_have_no_samples() -> None:
    model, _ = arm_of("none")
    scores = evaluate(model, states_of(model, None, DOCUMENTS), batch_size=4)
    assert sample_answers(model, DOCUMENTS, scores) == ()
    assert (micro_average(scores).rouge_l, macro_rouge_l(scores)) == (None, None)


def test_samples_leave_the_template_out() -> None:
    model, _ = arm_of("none")
    (context,), _ = encode_prompts(model.network, model.tokenizer, ["w5 w6 w5"])
    documents = [Document("add", (*context, 7, 8, 2), len(context))] * 4
    written = GeneratedAnswers(
        answers=["w7", "w7 w8", "", "w9"], rouge_l=[0.5, 1.0, 0.0, 0.0], exact=[False, True, False, False]
    )
    scores = DocumentScores(tasks=["add"] * 4, nats=[1.0] * 4, scored_tokens=[3] * 4, exact=[False] * 4)
    samples = sample_answers(model, documents, replace(scores, written=written))
    assert [(sample.task, sample.instruction, sample.reference) for sample in samples] == [
        ("add", "w5 w6 w5", "w7 w8")
    ] * 3
    assert [sample.answer for sample in samples] == ["w7", "w7 w8", ""]


def test_micro_is_over_documents_and_macro_over_tasks() -> None:
    written = GeneratedAnswers(answers=["a b", "b", "c"], rouge_l=[0.5, 1.0, 0.0], exact=[False, True, False])
    scores = DocumentScores(
        tasks=["add", "add", "sort"], nats=[1.0] * 3, scored_tokens=[9, 1, 1], exact=[False] * 3, written=written
    )
    assert micro_average(scores).rouge_l == pytest.approx(1.5 / 3)
    assert macro_rouge_l(scores) == pytest.approx((0.75 + 0.0) / 2)
    assert micro_average(scores).written_exact_match == pytest.approx(1 / 3)
    assert task_scores(scores)["add"].rouge_l == 0.75
    assert task_scores(scores)["add"].written_exact_match == 0.5


def test_rouge_ignores_the_end_token_of_the_response() -> None:
    model, _ = arm_of("none")
    states = states_of(model, None, DOCUMENTS)
    scores = evaluate(model, states, batch_size=4)
    written = generation_scores(model, None, states, scores)
    for document, answer, value in zip(DOCUMENTS, written.answers, written.rouge_l, strict=True):
        reference = " ".join(f"w{token}" for token in document.tokens[document.context_tokens : -1])
        assert value == rouge_l(answer, reference)
