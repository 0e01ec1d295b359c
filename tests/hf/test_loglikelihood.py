"""What an evaluation harness asks of a recovered model, without the harness."""

import pytest
import torch
from hf.test_model import LAYER, gates_of, made
from tiny_models import next_of, random_tokens, word_tokenizer

from mopcompress.errors import DataError
from mopcompress.hf.loglikelihood import score_continuations, write_continuations
from mopcompress.hf.model import MopForCausalLM

PAIRS = [
    (random_tokens(context, seed=context).tolist(), random_tokens(rest, seed=100 + rest).tolist())
    for context, rest in ((9, 2), (3, 5), (5, 1), (1, 3))
]


@pytest.fixture(scope="module")
def model() -> MopForCausalLM:
    return made()


@torch.no_grad()
def by_definition(model: MopForCausalLM, context: list[int], rest: list[int]) -> tuple[float, bool]:
    """One row, every position: the context is the instruction, and each token is scored on those before it."""
    tokens = torch.tensor([context + rest])
    labels = torch.tensor([[-100] * len(context) + rest])
    said = model(input_ids=tokens, labels=labels).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(said, rest, strict=True)), said.argmax(-1).tolist() == rest


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_continuation_is_as_likely_as_its_tokens_after_the_context(model: MopForCausalLM, batch_size: int) -> None:
    scores = score_continuations(model, PAIRS, batch_size=batch_size, longest=64)
    for score, pair in zip(scores, PAIRS, strict=True):
        log_likelihood, greedy = by_definition(model, *pair)
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)
        assert score.greedy == greedy


def test_without_an_adapter_it_is_the_bare_network(model: MopForCausalLM) -> None:
    (score,) = score_continuations(model.network, PAIRS[:1], batch_size=1, longest=64)
    context, rest = PAIRS[0]
    with torch.no_grad():
        said = model.network(torch.tensor([context + rest])).logits[0].log_softmax(-1)
    expected = sum(float(said[len(context) - 1 + place, token]) for place, token in enumerate(rest))
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_greedy_is_what_the_model_would_write(model: MopForCausalLM) -> None:
    context = PAIRS[0][0]
    tokens = torch.tensor([context])
    asked = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), **asked)[0, len(context) :]
    other = [*written[:3].tolist(), int(next_of(written[3]))]
    scores = score_continuations(model, [(context, written.tolist()), (context, other)], batch_size=2, longest=64)
    assert [score.greedy for score in scores] == [True, False]


def test_the_gate_reads_the_context_only(model: MopForCausalLM) -> None:
    other = [(context, next_of(torch.tensor(rest)).tolist()) for context, rest in PAIRS]
    with gates_of(model) as said:
        for pairs in (PAIRS, other):
            score_continuations(model, pairs, batch_size=4, longest=64)
        for context, _ in sorted(PAIRS, key=lambda pair: sum(map(len, pair))):
            with torch.no_grad():
                model(input_ids=torch.tensor([context]))
    assert torch.equal(said[0], said[1])
    torch.testing.assert_close(said[0], torch.cat(said[2:]))
    assert model.adapter.layer == LAYER


def test_contexts_lose_their_beginning_and_continuations_nothing(model: MopForCausalLM) -> None:
    context, rest = PAIRS[0]
    short, long = (
        score_continuations(model, [(one, rest)], batch_size=1, longest=5)[0] for one in (context[-4:], context)
    )
    assert short == long
    assert long.log_likelihood == pytest.approx(by_definition(model, context[-4:], rest)[0], rel=1e-4)
    with pytest.raises(DataError, match="a continuation of 6 tokens"):
        score_continuations(model, [(context, rest * 3)], batch_size=1, longest=5)


def test_writing_ends_before_the_first_stop(model: MopForCausalLM) -> None:
    tokenizer = word_tokenizer()
    asked = {"max_new_tokens": 8, "longest": 64, "eos_token_id": None}
    contexts = [context for context, _ in PAIRS]
    whole = write_continuations(model, tokenizer, contexts, until=[], **asked)
    alone = [write_continuations(model, tokenizer, [context], until=[], **asked)[0] for context in contexts]
    assert whole == alone
    stop = whole[0].split()[3]
    cut = write_continuations(model, tokenizer, contexts, until=[stop], **asked)
    assert cut[0].split() == whole[0].split()[: whole[0].split().index(stop)]
