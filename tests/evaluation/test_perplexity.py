import math
from collections import defaultdict

import pytest
import torch
from tiny_models import (
    HIDDEN,
    VOCABULARY,
    counting_model,
    instructions_of,
    next_of,
    random_documents,
    random_tokens,
    tiny_model,
)

from mopcompress.data.encoding import Document
from mopcompress.errors import NumericalError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, macro_perplexity, micro_average, task_scores
from mopcompress.models.attention import attend_to
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.results import DocumentScores

LAYER = 2
DOCUMENTS = random_documents(9)


def mixture_of(prompt_log_weight=0.0, hidden=HIDDEN):
    seeded = torch.Generator().manual_seed(0)
    gate = Gate(hidden, 3, generator=seeded)
    gate.scale_logits(5.0)
    return MixtureOfPrompts(
        torch.randn(3, 2, hidden, generator=seeded), LAYER, gate, prompt_log_weight=prompt_log_weight
    )


def scored(model, documents, mixture=None, *, batch_size=4):
    applied = mixture.compile_for_inference(model) if mixture else None
    return evaluate(model, HiddenStateDataset(model, documents, LAYER, batch_size=4), applied, batch_size=batch_size)


def counting_documents(count=5):
    """Documents in which every token is `next_of` the one before."""
    documents = []
    for start in random_tokens(count):
        tokens = [start]
        while len(tokens) < 9:
            tokens.append(next_of(tokens[-1]))
        documents.append(Document("count", tuple(map(int, tokens)), 4))
    return tuple(documents)


# --- neutral elements


@pytest.mark.parametrize("mixture", [None, mixture_of()], ids=["bare", "prompted"])
def test_a_model_that_knows_nothing_has_the_vocabularys_size_for_perplexity(mixture):
    model = tiny_model()
    model.network.lm_head.weight.zero_()
    scores = scored(model, DOCUMENTS, mixture)
    assert micro_average(scores).perplexity == pytest.approx(VOCABULARY)
    assert macro_perplexity(scores) == pytest.approx(VOCABULARY)
    assert micro_average(scores).exact_match == 0


def test_a_model_that_knows_all_has_perplexity_one():
    scores = scored(counting_model(), counting_documents())
    assert micro_average(scores).perplexity == 1
    assert micro_average(scores).exact_match == 1


def test_one_wrong_token_is_no_exact_match():
    documents = list(counting_documents())
    for place in (4, 8):
        tokens = list(documents[0].tokens)
        tokens[place] = 3 + (tokens[place] + 7) % 60
        documents.append(Document("slip", tuple(tokens), 4))
    scores = scored(counting_model(), documents)
    assert scores.exact == [True] * 5 + [False] * 2
    assert min(scores.nats[5:]) > 100


def test_unopened_prompts_score_as_no_prompts(tiny_llama):
    closed = scored(tiny_llama, DOCUMENTS, mixture_of(prompt_log_weight=-1e4))
    assert closed.nats == pytest.approx(scored(tiny_llama, DOCUMENTS).nats, rel=1e-4)


# --- definitions


def slowly(model, document, mixture):
    """Nats of the response from one document's own forward, prompts or not."""
    tokens = torch.tensor([document.tokens])
    with torch.no_grad():
        read = instructions_of(model, tokens[:, : document.context_tokens], LAYER)
        if mixture is None:
            logits = model.network(input_ids=tokens).logits[0]
        else:
            with attend_to(mixture.prefix(model, read)):
                logits = model.network(input_ids=tokens).logits[0]
    total = 0.0
    for place in range(document.context_tokens, len(document.tokens)):
        exponentials = [math.exp(value) for value in logits[place - 1].double().tolist()]
        total -= math.log(exponentials[document.tokens[place]] / math.fsum(exponentials))
    return total


@pytest.mark.parametrize("mixture", [None, mixture_of()], ids=["bare", "prompted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nats_are_those_of_the_response_tokens_alone(family, mixture):
    model = tiny_model(family)
    scores = scored(model, DOCUMENTS, mixture)
    assert scores.nats == pytest.approx([slowly(model, document, mixture) for document in DOCUMENTS], rel=1e-4)
    assert scores.scored_tokens == [len(document.tokens) - document.context_tokens for document in DOCUMENTS]
    assert scores.tasks == [document.task for document in DOCUMENTS]


def test_exact_match_is_greedy_generation(tiny_llama):
    """Half of the references are what the model generates; the others differ in one token."""
    mixture, network = mixture_of(), tiny_llama.network
    for prompts in (None, mixture):
        documents, matches = [], []
        for number, document in enumerate(random_documents(8, seed=5)):
            tokens = torch.tensor([document.tokens[: document.context_tokens]])
            settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            inputs = {"attention_mask": torch.ones_like(tokens)} | settings
            if prompts is None:
                answer = network.generate(tokens, **inputs)[0].tolist()
            else:
                read = instructions_of(tiny_llama, tokens, LAYER)
                with attend_to(prompts.prefix(tiny_llama, read)):
                    answer = network.generate(tokens, **inputs)[0].tolist()
            if number % 2:
                answer[-1 - number // 2] = 3 + (answer[-1 - number // 2] + 1) % 60
            documents.append(Document("generated", tuple(answer), document.context_tokens))
            matches.append(number % 2 == 0)
        assert scored(tiny_llama, documents, prompts).exact == matches


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_does_not_matter(tiny_llama, batch_size):
    expected = scored(tiny_llama, DOCUMENTS, mixture_of(), batch_size=4)
    found = scored(tiny_llama, DOCUMENTS, mixture_of(), batch_size=batch_size)
    assert found.nats == pytest.approx(expected.nats, rel=1e-4)
    assert found.exact == expected.exact


def random_scores(count=20):
    seeded = torch.Generator().manual_seed(0)
    tasks = [("add", "sort", "tell")[int(torch.randint(3, (), generator=seeded))] for _ in range(count)]
    nats = (10 * torch.rand(count, generator=seeded)).tolist()
    tokens = torch.randint(1, 9, (count,), generator=seeded).tolist()
    exact = (torch.rand(count, generator=seeded) < 0.4).tolist()
    return DocumentScores(tasks=tasks, nats=nats, scored_tokens=tokens, exact=exact)


def test_micro_counts_every_token_and_macro_every_task():
    scores = random_scores()
    nats, tokens, exact = defaultdict(list), defaultdict(list), defaultdict(list)
    for task, *values in zip(scores.tasks, scores.nats, scores.scored_tokens, scores.exact, strict=True):
        for column, value in zip((nats, tokens, exact), values, strict=True):
            column[task].append(value)
    per_token = {task: sum(nats[task]) / sum(tokens[task]) for task in nats}
    assert macro_perplexity(scores) == pytest.approx(math.exp(sum(per_token.values()) / 3))
    assert micro_average(scores).perplexity == pytest.approx(math.exp(sum(scores.nats) / sum(scores.scored_tokens)))
    assert micro_average(scores).exact_match == sum(scores.exact) / 20
    assert (micro_average(scores).documents, micro_average(scores).scored_tokens) == (20, sum(scores.scored_tokens))
    assert list(task_scores(scores)) == ["add", "sort", "tell"]
    for task, score in task_scores(scores).items():
        assert score.perplexity == pytest.approx(math.exp(per_token[task]))
        assert score.exact_match == sum(exact[task]) / len(exact[task])
        assert (score.documents, score.scored_tokens) == (len(tokens[task]), sum(tokens[task]))


# --- behaviour


def test_progress_counts_documents(tiny_llama):
    told = []
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    evaluate(tiny_llama, states, batch_size=4, progress=told.append)
    assert told == [4, 8, 9]


def test_a_likelihood_that_is_no_number_names_the_document():
    model = tiny_model()
    model.network.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"document \d \((add|sort|tell)\).*nan"):
        scored(model, DOCUMENTS)
