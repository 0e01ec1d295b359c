"""`mop+`: what it computes, what it trains, and how it splits its budget."""

import copy
from dataclasses import astuple, replace

import pytest
import torch
from factories import response_nll, saved_and_loaded, slow_except_llama
from tiny_models import BLOCKS, HIDDEN, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods import mixture_of_prompts, mop_plus
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mop_plus import split_budget
from mopcompress.recover.training import TrainingConfig, fit

TASKS = ("add", "sort", "tell")
LAYER = 2
DOCUMENTS = random_documents(6, tasks=TASKS)
ALL = range(len(DOCUMENTS))
CONFIG = AdapterConfig(
    arm="mop+", experts=3, prompts_per_expert=2, layer=LAYER, hidden_size=HIDDEN, base_sha256="base", tasks=TASKS
)
START = AdapterInit(gate_pretraining_steps=5, gate_logit_scale=3.0, prompt_log_weight=-1.0, seed=0)
FAMILIES = slow_except_llama(("llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "phi", "mixtral"))


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def initialized(model, states):
    return mop_plus.initialize(CONFIG, AdapterInputs(model, states, TASKS), START)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0])
def test_a_gate_without_a_gradient_at_first_still_learns(tiny_llama, states, percentile):
    """Its gradient is 0 until paths and scales have moved: it must not be clipped to a norm of 0."""
    adapter = initialized(tiny_llama, states)
    before = [weight.detach().clone() for weight in adapter.gate.parameters()]
    settings = TrainingConfig(
        steps=4,
        batch_size=4,
        learning_rate=1e-2,
        gate_learning_rate=1e-3,
        warmup_fraction=0.0,
        max_grad_norm=1.0,
        grad_clip_percentile=percentile,
        clip_gate_separately=True,
        seed=0,
    )
    norms = [row.norms["gate"] for row in fit(adapter, tiny_llama, states, settings)]
    assert norms[0] == 0 < norms[-1]
    moves = [
        float((weight.detach() - first).abs().max())
        for weight, first in zip(adapter.gate.parameters(), before, strict=True)
    ]
    assert max(moves) > 2e-4


def perturbed(model, states):
    """Return an adapter as after some training: nothing is zero, and the gate makes a difference."""
    adapter = initialized(model, states)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path in adapter.linears.values():
            path.up.normal_(std=0.1, generator=generator)
            path.scales.normal_(std=0.2, generator=generator)
            path.shifts.normal_(std=0.2, generator=generator)
            if path.neurons is not None:
                path.neurons.normal_(std=0.1, generator=generator)
        for weight in adapter.norms.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return adapter


# --- what it computes


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_bare_model_exactly(family):
    model = tiny_model(family)
    states = HiddenStateDataset(model, DOCUMENTS, LAYER, batch_size=4)
    bare = response_nll(model, states)
    assert torch.equal(response_nll(model, states, initialized(model, states)), bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_differ_per_example_and_norms_are_shared(family):
    """Slowly: a merged network per example, with B (diag(1 + g_e s_e) A x + g_e t_e), the mean over e.

    The neurons that an MLP's last linear reads are scaled for the linear, not for its low-rank path.
    """
    model = tiny_model(family)
    states = HiddenStateDataset(model, DOCUMENTS, LAYER, batch_size=4)
    adapter = perturbed(model, states)
    expected = []
    for row in ALL:
        merged = tiny_model(family)
        merged.network.load_state_dict(model.network.state_dict())
        gates = adapter.gate(states.means[row : row + 1])[0].exp()
        for key, path in adapter.linears.items():
            linear = merged.network.get_submodule(key.replace("/", "."))
            scale = sum(1 + gate * 10 * s for gate, s in zip(gates, path.scales, strict=True)) / len(gates)
            shift = sum(gate * 10 * t for gate, t in zip(gates, path.shifts, strict=True)) / len(gates)
            neurons = 1 if path.neurons is None else 1 + 3 * path.neurons
            weight = weight_of(linear) * neurons + (3 * path.up) @ torch.diag(scale) @ path.down
            set_weight(linear, weight.detach(), None)
            constant = (3 * path.up @ shift).detach()
            linear.register_forward_hook(lambda _linear, _inputs, output, constant=constant: output + constant)
        for key, norm in adapter.norms.items():
            merged.network.get_submodule(key.replace("/", ".")).load_state_dict(norm.state_dict())
        expected.append(score_responses(merged, states.batch([row]), LAYER).nll)
    nll = response_nll(model, states, adapter).detach()
    assert_close(nll, torch.cat(expected), rtol=1e-4, atol=1e-4)
    for row, alone in zip(ALL, expected, strict=True):
        batch = states.batch([row])
        with torch.no_grad(), adapter.active(model, batch.instructions):
            assert_close(score_responses(model, batch, LAYER).nll, alone, rtol=1e-4, atol=1e-4)
    bare = response_nll(model, states)
    assert float((nll - bare).abs().min()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_scaled_where_a_linear_reads_them(family):
    model = tiny_model(family)
    adapter = mop_plus.build(model, CONFIG)
    scaled = {name: len(path.neurons) for name, path in adapter.linears.items() if path.neurons is not None}
    stacked = family == "mixtral"  # its experts' matrices are no linears
    assert len(scaled) == (0 if stacked else BLOCKS - LAYER)
    assert all("mlp" in name or name.endswith("fc2") for name in scaled)
    readers = {name: model.network.get_submodule(name.replace("/", ".")) for name in scaled}
    assert scaled == {name: weight_of(linear).shape[1] for name, linear in readers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_known_linears_of_attention_have_paths(family):
    adapter = mop_plus.build(tiny_model(family), replace(CONFIG, experts=12, prompts_per_expert=20, tasks=()))
    names = {name.rpartition("/")[2] for name in adapter.linears}
    fused = {"gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}.get(family, {"q_proj", "k_proj", "v_proj"})
    assert fused < names


def test_without_scales_and_shifts_the_gate_does_nothing(tiny_llama, states):
    adapter, other = perturbed(tiny_llama, states), perturbed(tiny_llama, states)
    with torch.no_grad():
        for repair in (adapter, other):
            for path in repair.linears.values():
                path.scales.zero_()
                path.shifts.zero_()
        other.gate.outer.bias.copy_(torch.tensor([5.0, -5.0, 0.0]))
    assert torch.equal(response_nll(tiny_llama, states, adapter), response_nll(tiny_llama, states, other))


def test_the_experts_make_examples_differ(tiny_llama, states):
    adapter = perturbed(tiny_llama, states)
    before = response_nll(tiny_llama, states, adapter).detach()
    with torch.no_grad():
        adapter.gate.outer.bias.copy_(torch.tensor([9.0, -9.0, 0.0]))
    assert float((response_nll(tiny_llama, states, adapter).detach() - before).abs().min()) > 1e-4


def test_the_beams_of_an_example_share_its_gate(tiny_llama, states):
    adapter, tokens = perturbed(tiny_llama, states), random_tokens(2, 5)
    instructions = states.batch([0, 1]).instructions
    with torch.no_grad(), adapter.active(tiny_llama, instructions):
        single = tiny_llama.network(tokens).logits
        beams = tiny_llama.network(tokens.repeat_interleave(3, dim=0)).logits
    assert_close(beams, single.repeat_interleave(3, dim=0))


def test_compiled_adapters_are_the_trained_ones(tiny_llama, states):
    adapter = perturbed(tiny_llama, states)
    compiled = response_nll(tiny_llama, states, adapter, compiled=True)
    assert torch.equal(compiled, response_nll(tiny_llama, states, adapter))


def test_blocks_below_its_layer_are_not_changed(tiny_llama, states):
    adapter = perturbed(tiny_llama, states)
    tokens = random_tokens(6, 7)
    with torch.no_grad(), adapter.active(tiny_llama, states.batch(ALL).instructions):
        entered = tiny_llama.run_lower(tokens, LAYER)
    assert torch.equal(entered, tiny_llama.run_lower(tokens, LAYER))


# --- training


def test_training_changes_the_whole_adapter_and_no_network(states):
    model = tiny_model()
    before = copy.deepcopy(model.network.state_dict())
    modules = [type(module) for module in model.network.modules()]
    adapter = initialized(model, states)
    started = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    settings = TrainingConfig(
        steps=8,
        batch_size=6,
        learning_rate=0.01,
        gate_learning_rate=0.01,
        warmup_fraction=0.0,
        max_grad_norm=1.0,
        grad_clip_percentile=100.0,
        clip_gate_separately=True,
        seed=0,
    )
    rows = fit(adapter, model, states, settings)
    assert rows[-1].nll < rows[0].nll - 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())
    assert [type(module) for module in model.network.modules()] == modules
    changed = {name for name, tensor in adapter.state_dict().items() if not torch.equal(tensor, started[name])}
    drawn = {name for name in started if name.endswith(".down")}
    assert changed == started.keys() - {"gate.mean", "gate.deviation"} - drawn
    assert len(drawn) == len(adapter.linears)


def test_every_parameter_is_trained_once(tiny_llama, states):
    adapter = initialized(tiny_llama, states)
    trained = [id(parameter) for group in adapter.parameter_groups().values() for parameter in group]
    assert sorted(trained) == sorted(map(id, adapter.parameters()))
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_the_gate_has_its_own_parameter_group(tiny_llama, states):
    adapter = initialized(tiny_llama, states)
    assert list(map(id, adapter.parameter_groups()["gate"])) == list(map(id, adapter.gate.parameters()))


def test_the_gate_begins_pretrained_and_scaled(tiny_llama, states):
    full, scaled = (
        mop_plus.initialize(
            CONFIG,
            AdapterInputs(tiny_llama, states, TASKS),
            replace(START, gate_pretraining_steps=50, gate_logit_scale=scale),
        ).gate
        for scale in (1.0, 0.25)
    )
    assert_close(scaled.logits(states.means), 0.25 * full.logits(states.means))
    experts = torch.tensor([TASKS.index(document.task) for document in DOCUMENTS])
    assert torch.equal(full(states.means).argmax(1), experts)
    assert_close(full.mean, states.means.mean(0))


def test_fixed_matrices_keep_the_deviation_of_their_inputs(tiny_llama, states):
    for path in initialized(tiny_llama, states).linears.values():
        assert float(path.down.std()) * path.down.shape[1] ** 0.5 == pytest.approx(1, abs=0.3)


# --- the budget


@pytest.mark.parametrize("experts", [1, 3, 12])
@pytest.mark.parametrize("prompts_per_expert", [1, 10])
@pytest.mark.parametrize("layer", [1, 3])
def test_it_is_the_largest_repair_within_the_budget_of_mop(tiny_llama, experts, prompts_per_expert, layer):
    config = replace(CONFIG, experts=experts, prompts_per_expert=prompts_per_expert, layer=layer, tasks=())
    adapter = mop_plus.build(tiny_llama, config)
    mop = trained_parameters(mixture_of_prompts.build(tiny_llama, replace(config, arm="mop")))
    assert trained_parameters(adapter) <= mop
    rank_cost = (BLOCKS - layer) * (32 + 32 + 4 * experts)
    narrowest = sum(weight.numel() for weight in Gate(HIDDEN, experts, width=16).parameters())
    gate = sum(weight.numel() for weight in adapter.gate.parameters())
    ranks = {name.rpartition("/")[2]: len(path.down) for name, path in adapter.linears.items()}
    assert ranks["o_proj"] == ranks["down_proj"]
    assert {ranks.get(name) for name in ("q_proj", "k_proj", "v_proj")} <= {None, 1}
    highest = ranks["o_proj"] == HIDDEN
    assert highest or trained_parameters(adapter) - gate + narrowest + rank_cost > mop


def test_the_budget_goes_to_neurons_attention_ranks_and_gate():
    def sizes(budget: int, **more: int) -> tuple[int, int, bool, bool]:
        costs = {"rank_cost": 300, "attention_cost": 350, "neuron_cost": 400, "width_cost": 10}
        costs |= {"gate_bias_cost": 5, "max_rank": 9}
        return astuple(split_budget(budget, **(costs | more)))  # rank, width of the gate, neurons, attention

    assert sizes(465) == (1, 16, False, False)
    assert sizes(814) == (2, 20, False, False)
    assert sizes(815) == (1, 16, False, True)
    assert sizes(864) == (1, 20, False, True)
    assert sizes(865) == (1, 16, True, False)
    assert sizes(1214) == (2, 20, True, False)
    assert sizes(1215) == (1, 16, True, True)
    assert sizes(1514) == (1, 45, True, True)
    assert sizes(1515) == (2, 16, True, True)
    assert sizes(1515, max_rank=1) == (1, 46, True, True)
    assert sizes(3349, rank_cost=1500) == (1, 109, True, True)
    assert sizes(5999, rank_cost=3000) == (1, 128, True, True)
    assert sizes(465, neuron_cost=0, attention_cost=0) == (1, 16, True, True)  # parts without parameters


def test_no_path_has_a_higher_rank_than_its_linear(tiny_llama):
    adapter = mop_plus.build(tiny_llama, replace(CONFIG, experts=12, prompts_per_expert=100, tasks=()))
    assert {len(path.down) for path in adapter.linears.values()} == {HIDDEN, 1}


def test_a_budget_without_room_for_a_rank_raises():
    with pytest.raises(DataError, match="leaves 1664"):
        split_budget(1664, rank_cost=1500, attention_cost=0, neuron_cost=0, width_cost=10, gate_bias_cost=5, max_rank=9)


# --- folders


def test_a_saved_adapter_loads_unchanged(tiny_llama, states, tmp_path):
    adapter = perturbed(tiny_llama, states)
    loaded, config = saved_and_loaded(adapter, CONFIG, tiny_llama, tmp_path / "adapter")
    assert config == replace(CONFIG, tasks=list(TASKS))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    scores = [
        evaluate(tiny_llama, states, repair.compile_for_inference(tiny_llama), batch_size=4)
        for repair in (loaded, adapter)
    ]
    assert scores[0] == scores[1]


def test_a_family_with_unknown_linears_raises():
    with pytest.raises(DataError):
        mop_plus.build(tiny_model("bloom"), CONFIG)
