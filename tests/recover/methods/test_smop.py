"""Routed prompts at the input: the choice, its weight, and the noise in training."""

import pytest
import torch
from factories import response_nll
from tiny_models import HIDDEN, random_documents
from torch.testing import assert_close

from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.recover.methods.prompt_tuning import InputPrompt
from mopcompress.recover.methods.smop import RoutedPrompts

DOCUMENTS = random_documents(9)
EXPERTS, PROMPTS = 3, 2


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, 0, batch_size=4)


def routed_prompts(*, noise=1.0, experts=EXPERTS):
    prompts = torch.randn(experts, PROMPTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    return RoutedPrompts(prompts, seed=0, noise=noise)


def test_only_the_likeliest_prompt_acts_with_its_probability(states):
    adapter, means = routed_prompts(), states.means
    probabilities = (means @ adapter.router.weight.T).softmax(-1)
    weights = adapter.log_gate(means).exp().unflatten(1, (EXPERTS, PROMPTS))
    expected = torch.zeros(len(means), EXPERTS)
    for row, chances in enumerate(probabilities.tolist()):
        expected[row, chances.index(max(chances))] = max(chances)
    assert_close(weights, expected[..., None].expand(-1, -1, PROMPTS))
    assert len(set(probabilities.argmax(1).tolist())) > 1  # else nothing is routed here


def test_the_reported_weights_are_those_that_act(tiny_llama, states):
    adapter, instructions = routed_prompts(), states.batch(range(len(DOCUMENTS))).instructions
    expected = adapter.log_gate(instructions.mean).exp()[:, ::PROMPTS]
    assert torch.equal(adapter.expert_weights(tiny_llama, instructions), expected)


def test_a_single_routed_prompt_is_the_prompt_at_the_input(tiny_llama, states):
    routed = routed_prompts(experts=1)
    plain = InputPrompt(routed.prompts.detach()[0])
    assert torch.equal(response_nll(tiny_llama, states, routed), response_nll(tiny_llama, states, plain))


@torch.no_grad()
def test_a_prompt_that_was_not_chosen_is_absent(tiny_llama, states):
    adapter = routed_prompts(noise=0.0)
    before, expert = response_nll(tiny_llama, states, adapter), adapter.log_gate(states.means)[:, ::PROMPTS].argmax(1)
    adapter.prompts[expert[0]] += 1.0
    changed = response_nll(tiny_llama, states, adapter) != before
    example = states.batch(range(len(DOCUMENTS))).example
    assert torch.equal(changed, expert[example] == expert[0])
    assert 0 < int(changed.sum()) < len(changed)


@torch.no_grad()
def test_noise_multiplies_the_scores_in_training_alone(tiny_llama, states):
    """1 + N(0, 1), different in every step, equal for equal seeds."""
    first, again, quiet = routed_prompts(), routed_prompts(), routed_prompts(noise=0.0)
    steps = [response_nll(tiny_llama, states, first) for _ in range(3)]
    assert all(torch.equal(step, response_nll(tiny_llama, states, again)) for step in steps)
    assert not torch.equal(steps[0], steps[1])
    without = response_nll(tiny_llama, states, quiet)
    assert not torch.equal(steps[0], without)
    assert torch.equal(response_nll(tiny_llama, states, first, compiled=True), without)
    factors = torch.tensor([[2.0, 0.5, -1.0]]).expand(len(states.means), -1)
    scores = (states.means @ first.router.weight.T * factors).log_softmax(-1)
    assert_close(first.log_gate(states.means, factors).amax(1), scores.amax(1))
    noise = torch.cat([first._draw_noise(1000) for _ in range(3)])
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
