"""Of several groups of prompts, the one with the most attention acts."""

import itertools

import pytest
import torch
from factories import response_nll
from tiny_models import HIDDEN, generate, random_documents, tiny_model
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.recover.methods.idp import DynamicPrompts
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

DOCUMENTS = random_documents(12)
GROUPS, PROMPTS, LAYER = 3, 2, 2


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def dynamic_prompts(*, prompt_log_weight=-0.5, groups=GROUPS):
    generator = torch.Generator().manual_seed(0)
    prompts = 2 * torch.randn(groups, PROMPTS, HIDDEN, generator=generator)
    return DynamicPrompts(prompts, LAYER, prompt_log_weight=prompt_log_weight)


def all_instructions(states):
    return states.batch(range(len(states.documents))).instructions


@torch.no_grad()
def attention_slowly(model, adapter, document):
    """Softmax over prompts and text of the adapter's layer, one query head and token at a time."""
    attention = model.blocks[LAYER].self_attn
    norm = model.blocks[LAYER].input_layernorm
    text = model.run_lower(torch.tensor([document.tokens[: document.context_tokens]]), LAYER)

    def rotated(states, projection):
        heads = projection(norm(states)).view(1, states.shape[1], -1, 8).transpose(1, 2)
        cos, sin = model.network.model.rotary_emb(states, torch.arange(states.shape[1])[None])
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0]

    query, key = rotated(text, attention.q_proj), rotated(text, attention.k_proj)
    means = torch.zeros(len(adapter.prompts))
    count = text.shape[1]
    for head, token in itertools.product(range(4), range(count)):
        scores = [query[head, token] @ key[head // 2, : token + 1].T]
        for group in adapter.prompts:
            group_key = rotated(group[None], attention.k_proj)
            scores.append(query[head, token] @ group_key[head // 2].T + adapter.prompt_log_weight * 8**0.5)
        weights = (torch.cat(scores) / 8**0.5).softmax(0)[token + 1 :]
        means += weights.view(len(adapter.prompts), PROMPTS).sum(1) / (4 * count)
    return means


def test_attention_to_a_group_is_its_definition(tiny_llama, states):
    adapter = dynamic_prompts()
    attention = adapter.attention(tiny_llama, adapter.keys_and_values(tiny_llama), all_instructions(states))
    for row, document in enumerate(DOCUMENTS):
        assert_close(attention[row], attention_slowly(tiny_llama, adapter, document), rtol=1e-4, atol=1e-5)


def test_only_the_group_with_the_most_attention_acts(tiny_llama, states):
    """Each example is scored as with a plain prompt that is its own group."""
    adapter, batch = dynamic_prompts(), states.batch(range(len(DOCUMENTS)))
    attention = adapter.attention(tiny_llama, adapter.keys_and_values(tiny_llama), batch.instructions)
    strongest = attention.argmax(1)
    assert len(strongest.unique()) > 1  # else the test looks at nothing
    assert_close(adapter.expert_weights(tiny_llama, batch.instructions), torch.eye(GROUPS)[strongest])
    nll = response_nll(tiny_llama, states, adapter)
    for group in range(GROUPS):
        alone = MixtureOfPrompts(adapter.prompts[group].detach()[None], LAYER, None, prompt_log_weight=-0.5)
        expected, in_group = response_nll(tiny_llama, states, alone), strongest[batch.example] == group
        assert_close(nll[in_group], expected[in_group], rtol=1e-4, atol=1e-5)


def test_a_single_group_is_the_single_prompt(tiny_llama, states):
    adapter = dynamic_prompts(groups=1)
    single = MixtureOfPrompts(adapter.prompts.detach(), LAYER, None, prompt_log_weight=-0.5)
    assert torch.equal(response_nll(tiny_llama, states, adapter), response_nll(tiny_llama, states, single))


def test_gradients_reach_the_group_that_acts_alone(states):
    model, adapter = tiny_model(), dynamic_prompts()
    strongest = adapter.expert_weights(model, all_instructions(states)).argmax(1)
    group = int(strongest[0])
    batch = states.batch([row for row in range(len(DOCUMENTS)) if strongest[row] == group])
    with adapter.active(model, batch.instructions):
        score_responses(model, batch, LAYER).nll.mean().backward()
    reached = adapter.prompts.grad.flatten(1).any(1)
    assert reached.tolist() == [expert == group for expert in range(GROUPS)]
    assert adapter.prompt_log_weight.grad.item() != 0


def test_the_choice_of_a_batch_is_the_choice_of_each_row(tiny_llama, states):
    adapter = dynamic_prompts()
    together = adapter.expert_weights(tiny_llama, all_instructions(states))
    for row in range(len(DOCUMENTS)):
        alone = adapter.expert_weights(tiny_llama, states.batch([row]).instructions)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_neither_cache_nor_batch_changes_an_answer(family):
    model, adapter = tiny_model(family), dynamic_prompts().requires_grad_(False)
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    batched = generate(model, adapter, prompts, max_new_tokens=8)
    assert batched == generate(model, adapter, prompts, max_new_tokens=8, use_cache=False)
    assert batched == [generate(model, adapter, [prompt], max_new_tokens=8)[0] for prompt in prompts]
