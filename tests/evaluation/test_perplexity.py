import math
from collections import defaultdict
from dataclasses import replace

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


def score(model, documents, mixture=None, *, batch_size=4):
    states = HiddenStateDataset(model, documents, LAYER, batch_size=4)
    apply_adapter = mixture.compile_for_inference(model) if mixture else None
    return evaluate(model, states, apply_adapter, batch_size=batch_size)


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
def test_an_ignorant_model_has_the_vocabulary_for_perplexity(mixture):
    model = tiny_model()
    model.network.lm_head.weight.zero_()
    scores = score(model, DOCUMENTS, mixture)
    assert micro_average(scores).perplexity == pytest.approx(VOCABULARY)
    assert macro_perplexity(scores) == pytest.approx(VOCABULARY)
    assert micro_average(scores).exact_match == 0


def test_a_model_that_knows_all_has_perplexity_1():
    scores = score(counting_model(), counting_documents())
    assert micro_average(scores).perplexity == 1
    assert micro_average(scores).exact_match == 1


def test_one_wrong_token_is_no_exact_match():
    documents = list(counting_documents())
    for index in (4, 8):
        tokens = list(documents[0].tokens)
        tokens[index] = 3 + (tokens[index] + 7) % 60
        documents.append(Document("slip", tuple(tokens), 4))
    scores = score(counting_model(), documents)
    assert scores.exact == [True] * 5 + [False] * 2
    assert min(scores.nats[5:]) > 100


def test_closed_prompts_score_as_no_prompts(tiny_llama):
    closed = score(tiny_llama, DOCUMENTS, mixture_of(prompt_log_weight=-1e4))
    assert closed.nats == pytest.approx(score(tiny_llama, DOCUMENTS).nats, rel=1e-4)


# --- definitions


def slow_nats(model, document, mixture):
    """Return the NLL of a document's response by the network's own forward, with prompts or without, in nats."""
    tokens = torch.tensor([document.tokens])
    with torch.no_grad():
        instructions = instructions_of(model, tokens[:, : document.context_tokens], LAYER)
        if mixture is None:
            logits = model.network(input_ids=tokens).logits[0]
        else:
            with attend_to(mixture.prefix(model, instructions)):
                logits = model.network(input_ids=tokens).logits[0]
    total = 0.0
    for position in range(document.context_tokens, len(document.tokens)):
        exponentials = [math.exp(value) for value in logits[position - 1].double().tolist()]
        total -= math.log(exponentials[document.tokens[position]] / math.fsum(exponentials))
    return total


@pytest.mark.parametrize("mixture", [None, mixture_of()], ids=["bare", "prompted"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nats_are_of_the_response_tokens_alone(family, mixture):
    model = tiny_model(family)
    scores = score(model, DOCUMENTS, mixture)
    assert scores.nats == pytest.approx([slow_nats(model, document, mixture) for document in DOCUMENTS], rel=1e-4)
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
                instructions = instructions_of(tiny_llama, tokens, LAYER)
                with attend_to(prompts.prefix(tiny_llama, instructions)):
                    answer = network.generate(tokens, **inputs)[0].tolist()
            if number % 2:
                answer[-1 - number // 2] = 3 + (answer[-1 - number // 2] + 1) % 60
            documents.append(Document("generated", tuple(answer), document.context_tokens))
            matches.append(number % 2 == 0)
        assert score(tiny_llama, documents, prompts).exact == matches


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_does_not_matter(tiny_llama, batch_size):
    expected = score(tiny_llama, DOCUMENTS, mixture_of(), batch_size=4)
    scores = score(tiny_llama, DOCUMENTS, mixture_of(), batch_size=batch_size)
    assert scores.nats == pytest.approx(expected.nats, rel=1e-4)
    assert scores.exact == expected.exact


def random_scores(count=20):
    seeded = torch.Generator().manual_seed(0)
    tasks = [("add", "sort", "tell")[int(torch.randint(3, (), generator=seeded))] for _ in range(count)]
    nats = (10 * torch.rand(count, generator=seeded)).tolist()
    tokens = torch.randint(1, 9, (count,), generator=seeded).tolist()
    exact = (torch.rand(count, generator=seeded) < 0.4).tolist()
    return DocumentScores(tasks=tasks, nats=nats, scored_tokens=tokens, exact=exact)


def test_micro_weighs_tokens_and_macro_weighs_tasks():
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
    for task, of_task in task_scores(scores).items():
        assert of_task.perplexity == pytest.approx(math.exp(per_token[task]))
        assert of_task.exact_match == sum(exact[task]) / len(exact[task])
        assert (of_task.documents, of_task.scored_tokens) == (len(tokens[task]), sum(tokens[task]))


# --- behaviour


def test_progress_counts_documents(tiny_llama):
    counts = []
    states = HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)
    evaluate(tiny_llama, states, batch_size=4, progress=counts.append)
    assert counts == [4, 8, 9]


def test_a_likelihood_that_is_nan_names_the_document():
    model = tiny_model()
    model.network.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"document \d \((add|sort|tell)\).*nan"):
        score(model, DOCUMENTS)


def test_an_infinite_loss_is_a_result():
    scores = DocumentScores(tasks=["add", "sort"], nats=[math.inf, 1.0], scored_tokens=[1, 1], exact=[False, False])
    assert micro_average(scores).perplexity == math.inf
    assert macro_perplexity(scores) == math.inf
    assert task_scores(replace(scores, nats=[1e4, 1.0]))["add"].perplexity == math.inf  # exp overflows
