"""Written answers: greedy decoding under the adapter as evaluation applies it, for every arm, and their scores."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from factories import on_progress
from hf.test_model import begun
from tiny_models import generate, random_documents, tiny_model

from mopcompress.data.encoding import Document
from mopcompress.errors import DataError
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.generation import encode_prompts
from mopcompress.evaluation.generation_metrics import generate_answers, sample_answers, score_generation
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, macro_rouge_l, micro_average, task_scores
from mopcompress.evaluation.rouge import rouge_l
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import silent
from mopcompress.recipe import RunSpec
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.results import DocumentScores, GeneratedAnswers

NEW = 5
DOCUMENTS = random_documents(7, tasks=("add", "sort"))


def arm_of(name: str) -> tuple[LanguageModel, Adapter | None]:
    """A model with a begun adapter whose values are large enough to change what is said."""
    model = tiny_model()
    if name == "none":
        return model, None
    adapter, _ = begun(model, name, "")
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
    return generate_answers(model, states, adapter, max_new_tokens=NEW, batch_size=batch_size, progress=silent)


@torch.no_grad()
def token_by_token(
    model: LanguageModel, adapter: Adapter | None, documents: tuple[Document, ...], *, batch_size: int = 3
) -> list[list[int]]:
    """The definition: the most likely token after all before it, each row's states anew for each, without a cache.

    All of a batch go on together, because a shuffled gate reads its neighbour.
    """
    states = states_of(model, adapter, documents)
    found: list[list[int]] = [[] for _ in documents]
    for rows in batches_by_length(documents, batch_size, generator=None):
        read = states.batch(rows).instructions
        for _ in range(NEW):
            texts = [[*documents[row].tokens[: documents[row].context_tokens], *found[row]] for row in rows]
            tokens = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.long)
            for line, text in zip(tokens, texts, strict=True):
                line[: len(text)] = torch.tensor(text)
            hidden = model.run_lower(tokens, states.layer)
            with adapter.compile_for_inference(model)(read) if adapter else nullcontext():
                left = model.run_upper(hidden, states.layer)
                last = torch.stack([line[len(text) - 1] for line, text in zip(left, texts, strict=True)])
                following = model.logits(last).argmax(1).tolist()
            for row, token in zip(rows, following, strict=True):
                found[row].append(token)
    return found


def decoded(model: LanguageModel, tokens: list[int]) -> str:
    end = tokens.index(2) if 2 in tokens else len(tokens)
    return str(model.tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", ["none", *RECOVERY_METHODS])
def test_every_arm_writes_what_its_evaluation_finds_most_likely(name: str) -> None:
    model, adapter = arm_of(name)
    found = token_by_token(model, adapter, DOCUMENTS)
    assert answers(model, adapter) == [decoded(model, tokens) for tokens in found]
    assert name == "none" or answers(model, adapter) != answers(model, None)


@pytest.mark.parametrize("name", ["none", *RECOVERY_METHODS])
def test_what_evaluation_calls_exact_is_written_exactly(name: str) -> None:
    """References are what the arm writes, every second with another word in it."""
    model, adapter = arm_of(name)
    documents = []
    for place, (one, tokens) in enumerate(
        zip(DOCUMENTS, token_by_token(model, adapter, DOCUMENTS, batch_size=1), strict=True)
    ):
        response = tokens[: tokens.index(2)] if 2 in tokens else tokens
        response = response or [7]
        changed = [3 + (response[0] + 7) % 60, *response[1:]] if place % 2 else response
        documents.append(Document(one.task, (*one.tokens[: one.context_tokens], *changed, 2), one.context_tokens))
    states = states_of(model, adapter, tuple(documents))
    scores = evaluate(model, states, adapter.compile_for_inference(model) if adapter else None, batch_size=1)
    run = RunSpec(max_new_tokens=NEW, batch_size=1)
    found = score_generation(scores, model, states, adapter, run, silent).written
    assert found is not None
    assert all(wrote for exact, wrote in zip(scores.exact, found.exact, strict=True) if exact)
    assert [value == 1 for value in found.rouge_l] == found.exact
    assert not any(found.exact[1::2])
    assert any(found.exact)


def test_the_batch_does_not_matter() -> None:
    model, adapter = arm_of("mop")
    assert answers(model, adapter, batch_size=1) == answers(model, adapter, batch_size=7)


def test_the_response_is_not_peeked_at() -> None:
    model, adapter = arm_of("mop")
    others = tuple(
        replace(one, tokens=(*one.tokens[: one.context_tokens], *reversed(one.tokens[one.context_tokens :])))
        for one in DOCUMENTS
    )
    assert others != DOCUMENTS
    assert answers(model, adapter, others) == answers(model, adapter)


def test_instructions_are_answered_as_generate_answers_them() -> None:
    """The same words through tokens of documents, and as text through `generate`."""
    model, adapter = arm_of("mop")
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13"]
    contexts, _ = encode_prompts(model.network, model.tokenizer, prompts)
    documents = tuple(Document("add", (*context, 7, 2), len(context)) for context in contexts)
    assert answers(model, adapter, documents) == generate(model, adapter, prompts, max_new_tokens=NEW)


def test_answers_that_do_not_fit_are_refused_before_the_first() -> None:
    model, _ = arm_of("none")
    told: list[str] = []
    with pytest.raises(DataError, match="context of 64 tokens"):
        generate_answers(
            model,
            states_of(model, None, DOCUMENTS),
            None,
            max_new_tokens=60,
            batch_size=1,
            progress=on_progress(lambda what, _done, _total: told.append(what)),
        )
    assert not told


def test_nothing_is_written_unless_asked_for() -> None:
    model, _ = arm_of("none")
    states = states_of(model, None, DOCUMENTS)
    scores = evaluate(model, states, batch_size=4)
    assert score_generation(scores, model, states, None, RunSpec(), silent) is scores
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
    shown = sample_answers(model, documents, replace(scores, written=written))
    assert [(one.task, one.instruction, one.reference) for one in shown] == [("add", "w5 w6 w5", "w7 w8")] * 3
    assert [one.answer for one in shown] == ["w7", "w7 w8", ""]


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


def test_rouge_is_against_the_response_without_its_end() -> None:
    model, _ = arm_of("none")
    states = states_of(model, None, DOCUMENTS)
    scores = evaluate(model, states, batch_size=4)
    found = score_generation(scores, model, states, None, RunSpec(max_new_tokens=NEW), silent).written
    assert found is not None
    for document, answer, value in zip(DOCUMENTS, found.answers, found.rouge_l, strict=True):
        reference = " ".join(f"w{token}" for token in document.tokens[document.context_tokens : -1])
        assert value == rouge_l(answer, reference)
