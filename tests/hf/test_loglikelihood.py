"""Likelihoods and continuations of a recovered model, as an evaluation harness uses them, without the harness."""

import pytest
import torch
from recovered_models import LAYER, gated_model, recorded_gate
from tiny_models import next_of, random_tokens, word_tokenizer

from mopcompress.errors import DataError
from mopcompress.hf.loglikelihood import generate_continuations, score_continuations
from mopcompress.hf.model import MopForCausalLM

PAIRS = [
    (random_tokens(context, seed=context).tolist(), random_tokens(rest, seed=100 + rest).tolist())
    for context, rest in ((9, 2), (3, 5), (5, 1), (1, 3))
]


@pytest.fixture(scope="module")
def model() -> MopForCausalLM:
    return gated_model()


@torch.no_grad()
def by_definition(model: MopForCausalLM, context: list[int], rest: list[int]) -> tuple[float, bool]:
    """One row, every position: the context is the instruction, and each token is scored on those before it."""
    tokens = torch.tensor([context + rest])
    labels = torch.tensor([[-100] * len(context) + rest])
    log_probs = model(input_ids=tokens, labels=labels).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return sum(float(row[token]) for row, token in zip(log_probs, rest, strict=True)), log_probs.argmax(
        -1
    ).tolist() == rest


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_score_is_the_likelihood_after_the_context(model: MopForCausalLM, batch_size: int) -> None:
    scores = score_continuations(model, PAIRS, batch_size=batch_size, max_length=64)
    for score, pair in zip(scores, PAIRS, strict=True):
        log_likelihood, greedy = by_definition(model, *pair)
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=1e-4)
        assert score.greedy == greedy


def test_without_an_adapter_it_is_the_bare_network(model: MopForCausalLM) -> None:
    (score,) = score_continuations(model.network, PAIRS[:1], batch_size=1, max_length=64)
    context, rest = PAIRS[0]
    with torch.no_grad():
        log_probs = model.network(torch.tensor([context + rest])).logits[0].log_softmax(-1)
    expected = sum(float(log_probs[len(context) - 1 + index, token]) for index, token in enumerate(rest))
    assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_greedy_is_the_answer_of_the_model(model: MopForCausalLM) -> None:
    context = PAIRS[0][0]
    tokens = torch.tensor([context])
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(context) :]
    other = [*answer[:3].tolist(), int(next_of(answer[3]))]
    scores = score_continuations(model, [(context, answer.tolist()), (context, other)], batch_size=2, max_length=64)
    assert [score.greedy for score in scores] == [True, False]


def test_the_gate_reads_the_context_only(model: MopForCausalLM) -> None:
    other = [(context, next_of(torch.tensor(rest)).tolist()) for context, rest in PAIRS]
    with recorded_gate(model) as gates:
        for pairs in (PAIRS, other):
            score_continuations(model, pairs, batch_size=4, max_length=64)
        for context, _ in sorted(PAIRS, key=lambda pair: sum(map(len, pair))):
            with torch.no_grad():
                model(input_ids=torch.tensor([context]))
    assert torch.equal(gates[0], gates[1])
    torch.testing.assert_close(gates[0], torch.cat(gates[2:]))
    assert model.adapter.layer == LAYER


def test_contexts_lose_their_beginning_continuations_nothing(model: MopForCausalLM) -> None:
    context, rest = PAIRS[0]
    short, long = (
        score_continuations(model, [(tokens, rest)], batch_size=1, max_length=5)[0]
        for tokens in (context[-4:], context)
    )
    assert short == long
    assert long.log_likelihood == pytest.approx(by_definition(model, context[-4:], rest)[0], rel=1e-4)
    with pytest.raises(DataError, match="a continuation of 6 tokens"):
        score_continuations(model, [(context, rest * 3)], batch_size=1, max_length=5)


def test_an_answer_ends_before_the_first_stop(model: MopForCausalLM) -> None:
    tokenizer = word_tokenizer()
    settings = {"max_new_tokens": 8, "max_length": 64, "eos_token_id": None}
    contexts = [context for context, _ in PAIRS]
    whole = generate_continuations(model, tokenizer, contexts, until=[], **settings)
    alone = [generate_continuations(model, tokenizer, [context], until=[], **settings)[0] for context in contexts]
    assert whole == alone
    stop = whole[0].split()[3]
    cut = generate_continuations(model, tokenizer, contexts, until=[stop], **settings)
    assert cut[0].split() == whole[0].split()[: whole[0].split().index(stop)]
