"""Methods with prompts at the input or prompts per layer: the properties that all of them share."""

import math
from dataclasses import replace

import pytest
import torch
from factories import (
    adapter_config,
    adapter_init,
    initialized_adapter,
    response_nll,
    saved_and_loaded,
    training_config,
)
from tiny_models import HIDDEN, random_documents, tiny_model

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.training import fit

DOCUMENTS = random_documents(9)
EXPERTS, PROMPTS, MIDDLE = 3, 2, 2
AT_INPUT = ("input", "smop", "prefix")
METHODS = [*((arm, False) for arm in AT_INPUT), ("mop", True), ("single", True)]


@pytest.fixture(scope="module")
def states_of(tiny_llama):
    """Return the states that an arm reads."""
    cached = {layer: HiddenStateDataset(tiny_llama, DOCUMENTS, layer, batch_size=4) for layer in (0, MIDDLE)}
    return lambda arm: cached[0 if arm in AT_INPUT else MIDDLE]


def initialized(arm, model, states, *, seed=0, per_layer=False):
    """Return an adapter before its first step, and its config."""
    init = adapter_init(gate_pretraining_steps=20, seed=seed)
    return initialized_adapter(arm, model, states, init=init, tasks=[], base_sha256="base", per_layer_prompts=per_layer)


@pytest.mark.parametrize(("arm", "per_layer"), METHODS)
def test_compiled_adapters_are_the_trained_ones(tiny_llama, states_of, arm, per_layer):
    adapter, _ = initialized(arm, tiny_llama, states_of(arm), per_layer=per_layer)
    adapter.noise = 0.0
    compiled = response_nll(tiny_llama, states_of(arm), adapter, compiled=True)
    assert torch.equal(compiled, response_nll(tiny_llama, states_of(arm), adapter))


@pytest.mark.parametrize(("arm", "per_layer"), METHODS)
def test_gradients_reach_the_trained_parameters_and_no_others(states_of, arm, per_layer):
    model = tiny_model()
    adapter, _ = initialized(arm, model, states_of(arm), per_layer=per_layer)
    response_nll(model, states_of(arm), adapter).mean().backward()
    trained = [parameter for group in adapter.parameter_groups().values() for parameter in group]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in adapter.parameters()}
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize(("arm", "per_layer"), METHODS)
def test_the_seed_decides_the_first_values(tiny_llama, states_of, arm, per_layer):
    first, again, other = (
        initialized(arm, tiny_llama, states_of(arm), per_layer=per_layer, seed=seed)[0].state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize(("arm", "per_layer"), METHODS)
def test_a_small_problem_is_memorized(tiny_llama, states_of, arm, per_layer):
    states = states_of(arm)
    adapter, _ = initialized(arm, tiny_llama, states, per_layer=per_layer)
    rows = fit(adapter, tiny_llama, states, training_config(steps=40, batch_size=9))
    assert rows[-1].nll < 0.75 * rows[0].nll


@pytest.mark.parametrize(("arm", "per_layer"), METHODS)
def test_a_saved_adapter_loads_unchanged(tiny_llama, states_of, tmp_path, arm, per_layer):
    adapter, config = initialized(arm, tiny_llama, states_of(arm), per_layer=per_layer)
    loaded, loaded_config = saved_and_loaded(adapter, config, tiny_llama, tmp_path / "adapter")
    assert (loaded_config, loaded.layer) == (config, states_of(arm).layer)
    scores = [
        evaluate(tiny_llama, states_of(arm), trained.compile_for_inference(tiny_llama), batch_size=4)
        for trained in (adapter, loaded)
    ]
    assert scores[0] == scores[1]
    assert math.isfinite(sum(scores[0].nats))


@pytest.mark.parametrize("arm", ["input", "smop", "idp"])
def test_a_shared_expert_is_one_more_group_of_prompts(tiny_llama, arm):
    config = adapter_config(arm, tiny_llama, layer=0 if arm in AT_INPUT else MIDDLE)
    sizes = [
        RECOVERY_METHODS[arm].build(tiny_llama, replace(config, shared_expert=shared)).prompts.numel()
        for shared in (False, True)
    ]
    assert sizes == [groups * PROMPTS * HIDDEN for groups in (EXPERTS, EXPERTS + 1)]


@pytest.mark.parametrize("arm", ["input", "smop"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_without_rotary_positions_raise(arm, family):
    model = tiny_model(family)
    with pytest.raises(DataError, match="no rotary positions"):
        RECOVERY_METHODS[arm].build(model, adapter_config(arm, model))


def count_rows(monkeypatch):
    """Return lists that grow by the rows of each run through the upper blocks, and of each run of the head."""
    upper_rows, head_rows = [], []
    run_upper, logits = LanguageModel.run_upper, LanguageModel.logits

    def counted_upper(self, hidden, *rest, **more):
        upper_rows.append(len(hidden))
        return run_upper(self, hidden, *rest, **more)

    def counted_head(self, hidden):
        head_rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(LanguageModel, "run_upper", counted_upper)
    monkeypatch.setattr(LanguageModel, "logits", counted_head)
    return upper_rows, head_rows


@pytest.mark.parametrize(("arm", "groups"), [("input", 1), ("smop", EXPERTS), ("single", 1), ("mop", 1)])
def test_prompts_run_once_per_step_and_the_head_on_responses(tiny_llama, states_of, monkeypatch, arm, groups):
    """Not once per example, and after training not at all."""
    adapter, _ = initialized(arm, tiny_llama, states_of(arm))
    upper_rows, head_rows = count_rows(monkeypatch)
    response_nll(tiny_llama, states_of(arm), adapter)
    assert upper_rows == [groups, len(DOCUMENTS)]
    assert head_rows == [sum(len(document.tokens) - document.context_tokens for document in DOCUMENTS)]
    apply = adapter.compile_for_inference(tiny_llama)
    upper_rows.clear()
    batch = states_of(arm).batch(range(len(DOCUMENTS)))
    with apply(batch.instructions):
        score_responses(tiny_llama, batch, states_of(arm).layer)
    assert upper_rows == [len(DOCUMENTS)]


def test_input_and_smop_begin_with_the_same_tokens(tiny_llama, states_of):
    plain, routed = (initialized(arm, tiny_llama, states_of(arm))[0].prompts for arm in ("input", "smop"))
    assert torch.equal(routed.flatten(0, 1), plain)
    table = tiny_llama.network.get_input_embeddings().weight
    instructed = {token for document in DOCUMENTS for token in document.tokens[: document.context_tokens]}
    assert {int((table == prompt).all(1).nonzero()[0]) for prompt in plain} <= instructed
