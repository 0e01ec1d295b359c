"""Arms that act from the embeddings on, and deep mixtures: what they are, and what they equal."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import BLOCKS, HIDDEN, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.data.encoding import Document
from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.prefix_tuning import TrainedPrefix
from mopcompress.recover.methods.prompt_kv import zero_prompt_kv
from mopcompress.recover.methods.prompt_tuning import InputPrompt
from mopcompress.recover.methods.smop import RoutedPrompts
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.recover.training import TrainingConfig, fit
from mopcompress.storage import artifacts

TASKS = ("add", "sort", "tell")
DOCUMENTS = random_documents(9, tasks=TASKS)
EXPERTS, PROMPTS, MIDDLE = 3, 2, 2
AT_INPUT = ("input", "smop", "prefix")
EVERY = [*((arm, False) for arm in AT_INPUT), ("mop", True), ("single", True)]


def config_of_arm(arm, model, *, experts=EXPERTS, prompts=PROMPTS, deep=False):
    return AdapterConfig(
        arm=arm,
        experts=experts,
        prompts_per_expert=prompts,
        layer=0 if arm in AT_INPUT else MIDDLE,
        hidden_size=model.hidden_size,
        base_sha256="base",
        tasks=[],
        per_layer_prompts=deep,
    )


def begun(arm, model, states, *, seed=0, **changes):
    """An adapter before its first step, and its config."""
    config = config_of_arm(arm, model, **changes)
    start = AdapterInit(gate_pretraining_steps=20, gate_logit_scale=3.0, prompt_log_weight=-1.0, seed=seed)
    return RECOVERY_METHODS[arm].initialize(config, AdapterInputs(model, states, TASKS), start), config


@pytest.fixture(scope="module")
def states_of(tiny_llama):
    """The states that an arm reads."""
    cached = {layer: HiddenStateDataset(tiny_llama, DOCUMENTS, layer, batch_size=4) for layer in (0, MIDDLE)}
    return lambda arm: cached[0 if arm in AT_INPUT else MIDDLE]


def nats(model, states, adapter, *, compiled=False):
    batch = states.batch(range(len(states.documents)))
    applied = (
        adapter.compile_for_inference(model) if compiled else lambda instructions: adapter.active(model, instructions)
    )
    with applied(batch.instructions):
        return score_responses(model, batch, states.layer).nll


# --- one prompt at the input


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_a_prompt_at_the_input_is_longer_input(family):
    """The definition: embeddings put before the text's own, and the whole network run on both (Lester et al.)."""
    model, count = tiny_model(family, sliding_window=32) if family == "gemma3" else tiny_model(family), 5
    prompts = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(0))
    states = HiddenStateDataset(model, DOCUMENTS, 0, batch_size=4)
    found = nats(model, states, InputPrompt(prompts)).split([len(d.tokens) - d.context_tokens for d in DOCUMENTS])
    for document, ours in zip(DOCUMENTS, found, strict=True):
        text = model.network.get_input_embeddings()(torch.tensor([document.tokens]))
        logits = model.network(inputs_embeds=torch.cat([prompts[None], text], dim=1)).logits[0, count:]
        scored = torch.arange(document.context_tokens, len(document.tokens))
        slowly = -logits.log_softmax(-1)[scored - 1, torch.tensor(document.tokens)[scored]]
        assert_close(ours, slowly, rtol=1e-4, atol=1e-4)


def test_embedded_text_before_the_text_is_that_text(tiny_llama):
    """Prompts that are embeddings of tokens do what those tokens do."""
    tokens = random_tokens(1, 12)
    longer = Document("add", tuple(tokens[0].tolist()), 8)
    shorter = Document("add", tuple(tokens[0, 4:].tolist()), 4)
    with torch.no_grad():
        before = InputPrompt(tiny_llama.run_lower(tokens[:, :4], 0)[0])
        found = nats(tiny_llama, HiddenStateDataset(tiny_llama, [shorter], 0, batch_size=1), before)
        states = HiddenStateDataset(tiny_llama, [longer], 0, batch_size=1)
        expected = score_responses(tiny_llama, states.batch([0]), 0).nll
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ["input", "smop"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_without_rotary_positions_are_refused(arm, family):
    model = tiny_model(family)
    with pytest.raises(DataError, match="no rotary positions"):
        RECOVERY_METHODS[arm].build(model, config_of_arm(arm, model))


@pytest.mark.parametrize(("arm", "groups"), [("input", 1), ("smop", EXPERTS), ("single", 1), ("mop", 1)])
def test_the_prompts_run_once_a_step_and_the_head_on_response_tokens_alone(
    tiny_llama, states_of, monkeypatch, arm, groups
):
    """Not once an example, and after training not at all."""
    adapter, rows, heads = begun(arm, tiny_llama, states_of(arm))[0], [], []
    whole, head = LanguageModel.run_upper, LanguageModel.logits

    def counted(self, hidden, *rest, **more):
        rows.append(len(hidden))
        return whole(self, hidden, *rest, **more)

    def read(self, hidden):
        heads.append(len(hidden))
        return head(self, hidden)

    monkeypatch.setattr(LanguageModel, "run_upper", counted)
    monkeypatch.setattr(LanguageModel, "logits", read)
    nats(tiny_llama, states_of(arm), adapter)
    assert rows == [groups, len(DOCUMENTS)]
    assert heads == [sum(len(one.tokens) - one.context_tokens for one in DOCUMENTS)]
    compiled = adapter.compile_for_inference(tiny_llama)
    rows.clear()
    batch = states_of(arm).batch(range(len(DOCUMENTS)))
    with compiled(batch.instructions):
        score_responses(tiny_llama, batch, states_of(arm).layer)
    assert rows == [len(DOCUMENTS)]


# --- routed prompts


def routed_of(*, noise=1.0, experts=EXPERTS):
    prompts = torch.randn(experts, PROMPTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    return RoutedPrompts(prompts, seed=0, noise=noise)


def test_the_likeliest_prompt_alone_is_heard_and_weighs_its_probability(states_of):
    adapter, summary = routed_of(), states_of("smop").summaries
    probabilities = (summary @ adapter.router.weight.T).softmax(-1)
    weights = adapter.log_gate(summary).exp().unflatten(1, (EXPERTS, PROMPTS))
    expected = torch.zeros(len(summary), EXPERTS)
    for row, chances in enumerate(probabilities.tolist()):
        expected[row, chances.index(max(chances))] = max(chances)
    assert_close(weights, expected[..., None].expand(-1, -1, PROMPTS))
    assert len(set(probabilities.argmax(1).tolist())) > 1  # else nothing is routed here


def test_one_routed_prompt_is_the_prompt_at_the_input(tiny_llama, states_of):
    states, one = states_of("smop"), routed_of(experts=1)
    plain = InputPrompt(one.prompts.detach()[0])
    assert torch.equal(nats(tiny_llama, states, one), nats(tiny_llama, states, plain))


@torch.no_grad()
def test_a_prompt_that_was_not_chosen_is_absent(tiny_llama, states_of):
    states, adapter = states_of("smop"), routed_of(noise=0.0)
    before, chosen = nats(tiny_llama, states, adapter), adapter.log_gate(states.means)[:, ::PROMPTS].argmax(1)
    adapter.prompts[chosen[0]] += 1.0
    changed = nats(tiny_llama, states, adapter) != before
    example = states.batch(range(len(DOCUMENTS))).example
    assert torch.equal(changed, chosen[example] == chosen[0])
    assert 0 < int(changed.sum()) < len(changed)


@torch.no_grad()
def test_noise_multiplies_the_routers_scores_in_training_alone(tiny_llama, states_of):
    """1 + N(0, 1), other in every step, equal for equal seeds."""
    states, first, again, quiet = states_of("smop"), routed_of(), routed_of(), routed_of(noise=0.0)
    steps = [nats(tiny_llama, states, first) for _ in range(3)]
    assert all(torch.equal(step, nats(tiny_llama, states, again)) for step in steps)
    assert not torch.equal(steps[0], steps[1])
    without = nats(tiny_llama, states, quiet)
    assert not torch.equal(steps[0], without)
    assert torch.equal(nats(tiny_llama, states, first, compiled=True), without)
    factors = torch.tensor([[2.0, 0.5, -1.0]]).expand(len(states.means), -1)
    scores = (states.means @ first.router.weight.T * factors).log_softmax(-1)
    assert_close(first.log_gate(states.means, factors).amax(1), scores.amax(1))
    drawn = torch.cat([first._draw_noise(1000) for _ in range(3)])
    assert float(drawn.mean()) == pytest.approx(0, abs=0.05)
    assert float(drawn.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("arm", ["input", "smop", "idp"])
def test_with_a_shared_expert_there_is_one_more_group_of_prompts_as_in_a_mixture(tiny_llama, arm):
    config = config_of_arm(arm, tiny_llama)
    sizes = [
        RECOVERY_METHODS[arm].build(tiny_llama, replace(config, shared_expert=shared)).prompts.numel()
        for shared in (False, True)
    ]
    assert sizes == [groups * PROMPTS * HIDDEN for groups in (EXPERTS, EXPERTS + 1)]


# --- prefixes


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_prefix_is_worth_as_many_parameters_as_mop_and_not_more(tiny_llama, prompts, deep):
    """As the mop whose states flow, also in a bench whose other arms are deep."""
    sizes = {
        arm: trained_parameters(
            RECOVERY_METHODS[arm].build(tiny_llama, config_of_arm(arm, tiny_llama, prompts=prompts, deep=also))
        )
        for arm, also in (("prefix", deep), ("mop", False))
    }
    token = 2 * BLOCKS * 2 * 8  # keys and values, layers, heads, numbers
    assert sizes["mop"] - token < sizes["prefix"] <= sizes["mop"]
    assert sizes["prefix"] % token == 0


def test_a_prefix_that_cannot_be_small_enough_is_refused(tiny_llama, monkeypatch):
    narrow = partial(Gate, width=1)
    monkeypatch.setattr("mopcompress.recover.methods.mixture_of_prompts.gates.Gate", narrow)
    with pytest.raises(DataError, match="one token has 128 parameters here, and mop with the same settings"):
        RECOVERY_METHODS["prefix"].build(tiny_llama, config_of_arm("prefix", tiny_llama, experts=1, prompts=1))


def test_a_prefix_begins_as_the_prompt_of_the_same_tokens(tiny_llama, states_of):
    states = states_of("prefix")
    prefix, _ = begun("prefix", tiny_llama, states)
    tokens = prefix.prefix()[0][0].shape[1]
    plain, _ = begun("input", tiny_llama, states, experts=1, prompts=tokens)
    assert torch.equal(nats(tiny_llama, states, prefix), nats(tiny_llama, states, plain))


def test_a_prefix_needs_no_rotary_positions():
    model = tiny_model("gpt2")
    states = HiddenStateDataset(model, DOCUMENTS, 0, batch_size=4)
    adapter, _ = begun("prefix", model, states)
    assert sorted(adapter.prefix()[0]) == list(range(BLOCKS))
    bare = score_responses(model, states.batch(range(len(DOCUMENTS))), 0).nll
    assert not torch.allclose(nats(model, states, adapter), bare, atol=1e-2)


def test_a_prefix_has_the_keys_of_every_layer_in_their_shapes(tiny_llama):
    keys, values = TrainedPrefix(*zero_prompt_kv(tiny_llama, 0, 7)).prefix()
    assert {layer: key.shape for layer, key in keys.items()} == dict.fromkeys(range(BLOCKS), (2, 7, 8))
    assert {layer: value.shape for layer, value in values.items()} == dict.fromkeys(range(BLOCKS), (2, 7, 8))


# --- deep mixtures


@pytest.mark.parametrize("arm", ["mop", "single"])
def test_a_deep_mixture_begins_as_the_flowing_one(tiny_llama, states_of, arm):
    states = states_of(arm)
    flowing, deep = (begun(arm, tiny_llama, states, per_layer_prompts=deep)[0] for deep in (False, True))
    assert torch.equal(nats(tiny_llama, states, deep), nats(tiny_llama, states, flowing))
    read = states.batch(range(len(DOCUMENTS))).instructions
    assert torch.equal(deep.training_log_weights(read), flowing.training_log_weights(read))


def test_a_deep_mixture_is_counted_whole(tiny_llama, states_of):
    flowing, deep = (begun("mop", tiny_llama, states_of("mop"), per_layer_prompts=deep)[0] for deep in (False, True))
    tokens, numbers = EXPERTS * PROMPTS, 2 * 2 * 8
    grown = tokens * numbers * (BLOCKS - MIDDLE) - tokens * HIDDEN
    assert trained_parameters(deep) == trained_parameters(flowing) + grown
    assert trained_parameters(deep) == sum(one.numel() for one in deep.parameters())


def test_a_deep_mixtures_layers_are_trained_by_themselves(tiny_llama, states_of):
    deep, _ = begun("mop", tiny_llama, states_of("mop"), deep=True)
    before, _ = deep.keys_and_values(tiny_llama)
    kept = {layer: key.clone() for layer, key in before.items()}
    with torch.no_grad():
        deep.layer_key_values.keys[str(MIDDLE)].add_(1.0)
    after, _ = deep.keys_and_values(tiny_llama)
    assert sorted(after) == list(range(MIDDLE, BLOCKS))
    assert [layer for layer in after if not torch.equal(after[layer], kept[layer])] == [MIDDLE]


# --- what holds for all of them


def test_arms_that_can_be_named_are_arms_that_can_be_built():
    assert list(ARM_DEFAULTS) == list(RECOVERY_METHODS)


@pytest.mark.parametrize(("arm", "deep"), EVERY)
def test_compiled_adapters_are_the_trained_ones(tiny_llama, states_of, arm, deep):
    adapter, _ = begun(arm, tiny_llama, states_of(arm), per_layer_prompts=deep)
    adapter.noise = 0.0
    compiled = nats(tiny_llama, states_of(arm), adapter, compiled=True)
    assert torch.equal(compiled, nats(tiny_llama, states_of(arm), adapter))


@pytest.mark.parametrize(("arm", "deep"), EVERY)
def test_a_gradient_reaches_what_is_learned_and_nothing_else(states_of, arm, deep):
    model = tiny_model()
    adapter, _ = begun(arm, model, states_of(arm), per_layer_prompts=deep)
    nats(model, states_of(arm), adapter).mean().backward()
    learned = [one for group in adapter.parameter_groups().values() for one in group]
    assert {id(one) for one in learned} == {id(one) for one in adapter.parameters()}
    assert all(one.grad is not None and bool(one.grad.any()) for one in learned)
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize(("arm", "deep"), EVERY)
def test_the_seed_decides_where_an_adapter_begins(tiny_llama, states_of, arm, deep):
    first, again, other = (
        begun(arm, tiny_llama, states_of(arm), per_layer_prompts=deep, seed=seed)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_input_and_smop_begin_with_the_same_tokens(tiny_llama, states_of):
    plain, routed = (begun(arm, tiny_llama, states_of(arm))[0].prompts for arm in ("input", "smop"))
    assert torch.equal(routed.flatten(0, 1), plain)
    table = tiny_llama.network.get_input_embeddings().weight
    instructed = {token for document in DOCUMENTS for token in document.tokens[: document.context_tokens]}
    assert {int((table == row).all(1).nonzero()[0]) for row in plain} <= instructed


@pytest.mark.parametrize(("arm", "deep"), EVERY)
def test_a_small_problem_is_learnt_by_heart(tiny_llama, states_of, arm, deep):
    states = states_of(arm)
    adapter, _ = begun(arm, tiny_llama, states, per_layer_prompts=deep)
    settings = TrainingConfig(
        steps=40,
        batch_size=9,
        learning_rate=0.1,
        gate_learning_rate=1e-2,
        warmup_fraction=0.1,
        max_grad_norm=1.0,
        grad_clip_percentile=100.0,
        clip_gate_separately=True,
        seed=0,
    )
    rows = fit(adapter, tiny_llama, states, settings)
    assert rows[-1].nll < 0.75 * rows[0].nll


@pytest.mark.parametrize(("arm", "deep"), EVERY)
def test_an_adapter_comes_back_as_it_was(tiny_llama, states_of, tmp_path, arm, deep):
    adapter, config = begun(arm, tiny_llama, states_of(arm), per_layer_prompts=deep)
    with artifacts.publish(tmp_path / "adapter", {}) as scratch:
        save_adapter(adapter, config, scratch)
    again, found = load_adapter(tmp_path / "adapter", tiny_llama, base_sha256="base")
    assert (found, again.layer) == (config, states_of(arm).layer)
    scores = [
        evaluate(tiny_llama, states_of(arm), one.compile_for_inference(tiny_llama), batch_size=4)
        for one in (adapter, again)
    ]
    assert scores[0] == scores[1]
    assert math.isfinite(sum(scores[0].nats))
