import copy
from dataclasses import astuple, replace

import pytest
import torch
from tiny_models import BLOCKS, HIDDEN, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods import mixture_of_prompts, mop_plus
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mop_plus import split_budget
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.recover.training import TrainingConfig, fit
from mopcompress.storage import artifacts

TASKS = ("add", "sort", "tell")
LAYER = 2
DOCUMENTS = random_documents(6, tasks=TASKS)
ALL = range(len(DOCUMENTS))
CONFIG = AdapterConfig(
    arm="mop+", experts=3, prompts_per_expert=2, layer=LAYER, hidden_size=HIDDEN, base_sha256="base", tasks=TASKS
)
START = AdapterInit(gate_pretraining_steps=5, gate_logit_scale=3.0, prompt_log_weight=-1.0, seed=0)
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "phi", "mixtral")


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def begun(model, states):
    return mop_plus.initialize(CONFIG, AdapterInputs(model, states, TASKS), START)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 50.0])
def test_a_gate_that_has_no_gradient_at_first_still_learns(tiny_llama, states, percentile):
    """Its gradient is 0 until paths and scales have moved: norms of 0 must not become what it is clipped to."""
    adapter = begun(tiny_llama, states)
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
    moved = [
        float((now.detach() - then).abs().max()) for now, then in zip(adapter.gate.parameters(), before, strict=True)
    ]
    assert max(moved) > 2e-4


def trained(model, states):
    """As after some training: nothing is zero, and the gate decides something."""
    adapter = begun(model, states)
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


def nats(model, states, adapter, rows=ALL):
    batch = states.batch(rows)
    with torch.no_grad(), adapter.active(model, batch.instructions):
        return score_responses(model, batch, states.layer).nll


# --- what it computes


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_bare_model_exactly(family):
    model = tiny_model(family)
    states = HiddenStateDataset(model, DOCUMENTS, LAYER, batch_size=4)
    bare = score_responses(model, states.batch(ALL), LAYER).nll
    assert torch.equal(nats(model, states, begun(model, states)), bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_example_gets_weights_of_its_own_and_norms_that_all_share(family):
    """Slowly: a network of its own for each example, with B (diag(1 + g_e s_e) A x + g_e t_e), the mean over e.

    The neurons that an MLP's last linear reads are scaled for the linear, not for what stands beside it.
    """
    model = tiny_model(family)
    states = HiddenStateDataset(model, DOCUMENTS, LAYER, batch_size=4)
    adapter = trained(model, states)
    expected = []
    for row in ALL:
        merged = tiny_model(family)
        merged.network.load_state_dict(model.network.state_dict())
        gates = adapter.gate(states.means[row : row + 1])[0].exp()
        for key, path in adapter.linears.items():
            linear = merged.network.get_submodule(key.replace("/", "."))
            scale = sum(1 + gate * 10 * own for gate, own in zip(gates, path.scales, strict=True)) / len(gates)
            shift = sum(gate * 10 * own for gate, own in zip(gates, path.shifts, strict=True)) / len(gates)
            neurons = 1 if path.neurons is None else 1 + 3 * path.neurons
            weight = weight_of(linear) * neurons + (3 * path.up) @ torch.diag(scale) @ path.down
            set_weight(linear, weight.detach(), None)
            constant = (3 * path.up @ shift).detach()
            linear.register_forward_hook(lambda _linear, _inputs, output, constant=constant: output + constant)
        for key, norm in adapter.norms.items():
            merged.network.get_submodule(key.replace("/", ".")).load_state_dict(norm.state_dict())
        expected.append(score_responses(merged, states.batch([row]), LAYER).nll)
    found = nats(model, states, adapter)
    assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    for row, alone in zip(ALL, expected, strict=True):
        batch = states.batch([row])
        with torch.no_grad(), adapter.active(model, batch.instructions):
            assert_close(score_responses(model, batch, LAYER).nll, alone, rtol=1e-4, atol=1e-4)
    bare = score_responses(model, states.batch(ALL), LAYER).nll
    assert float((found - bare).abs().min()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_neurons_of_every_mlp_are_scaled_where_a_linear_reads_them(family):
    model = tiny_model(family)
    adapter = mop_plus.build(model, CONFIG)
    scaled = {name: len(path.neurons) for name, path in adapter.linears.items() if path.neurons is not None}
    stacked = family == "mixtral"  # its experts' matrices are no linears
    assert len(scaled) == (0 if stacked else BLOCKS - LAYER)
    assert all("mlp" in name or name.endswith("fc2") for name in scaled)
    readers = {name: model.network.get_submodule(name.replace("/", ".")) for name in scaled}
    assert scaled == {name: weight_of(linear).shape[1] for name, linear in readers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_has_paths_wherever_queries_keys_and_values_are_linears_of_a_known_name(family):
    adapter = mop_plus.build(tiny_model(family), replace(CONFIG, experts=12, prompts_per_expert=20, tasks=()))
    names = {name.rpartition("/")[2] for name in adapter.linears}
    fused = {"gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}.get(family, {"q_proj", "k_proj", "v_proj"})
    assert fused < names


def test_without_preferences_of_the_experts_the_gate_does_nothing(tiny_llama, states):
    adapter, other = trained(tiny_llama, states), trained(tiny_llama, states)
    with torch.no_grad():
        for one in (adapter, other):
            for path in one.linears.values():
                path.scales.zero_()
                path.shifts.zero_()
        other.gate.outer.bias.copy_(torch.tensor([5.0, -5.0, 0.0]))
    assert torch.equal(nats(tiny_llama, states, adapter), nats(tiny_llama, states, other))


def test_the_experts_make_examples_differ(tiny_llama, states):
    adapter = trained(tiny_llama, states)
    before = nats(tiny_llama, states, adapter)
    with torch.no_grad():
        adapter.gate.outer.bias.copy_(torch.tensor([9.0, -9.0, 0.0]))
    assert float((nats(tiny_llama, states, adapter) - before).abs().min()) > 1e-4


def test_beams_that_stand_next_to_each_other_have_one_gate(tiny_llama, states):
    adapter, tokens = trained(tiny_llama, states), random_tokens(2, 5)
    instructions = states.batch([0, 1]).instructions
    with torch.no_grad(), adapter.active(tiny_llama, instructions):
        single = tiny_llama.network(tokens).logits
        beams = tiny_llama.network(tokens.repeat_interleave(3, dim=0)).logits
    assert_close(beams, single.repeat_interleave(3, dim=0))


def test_compiled_it_is_the_same(tiny_llama, states):
    adapter = trained(tiny_llama, states)
    batch = states.batch(ALL)
    with torch.no_grad(), adapter.compile_for_inference(tiny_llama)(batch.instructions):
        found = score_responses(tiny_llama, batch, LAYER).nll
    assert torch.equal(found, nats(tiny_llama, states, adapter))


def test_blocks_below_its_layer_are_not_changed(tiny_llama, states):
    adapter = trained(tiny_llama, states)
    tokens = random_tokens(6, 7)
    with torch.no_grad(), adapter.active(tiny_llama, states.batch(ALL).instructions):
        entered = tiny_llama.run_lower(tokens, LAYER)
    assert torch.equal(entered, tiny_llama.run_lower(tokens, LAYER))


# --- training


def test_training_reaches_all_of_it_and_leaves_the_model_bitwise_as_it_was(states):
    model = tiny_model()
    before = copy.deepcopy(model.network.state_dict())
    modules = [type(module) for module in model.network.modules()]
    adapter = begun(model, states)
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


def test_what_is_learned_is_every_parameter_once(tiny_llama, states):
    adapter = begun(tiny_llama, states)
    learned = [id(one) for group in adapter.parameter_groups().values() for one in group]
    assert sorted(learned) == sorted(map(id, adapter.parameters()))
    assert all(one.requires_grad for one in adapter.parameters())


def test_the_gate_has_a_rate_of_its_own(tiny_llama, states):
    adapter = begun(tiny_llama, states)
    assert list(map(id, adapter.parameter_groups()["gate"])) == list(map(id, adapter.gate.parameters()))


def test_it_begins_with_a_gate_that_knows_the_tasks_and_is_tempered(tiny_llama, states):
    full, tempered = (
        mop_plus.initialize(
            CONFIG,
            AdapterInputs(tiny_llama, states, TASKS),
            replace(START, gate_pretraining_steps=50, gate_logit_scale=temper),
        ).gate
        for temper in (1.0, 0.25)
    )
    assert_close(tempered.logits(states.means), 0.25 * full.logits(states.means))
    right = full(states.means).argmax(1) == torch.tensor([TASKS.index(one.task) for one in DOCUMENTS])
    assert bool(right.all())
    assert_close(full.mean, states.means.mean(0))


def test_inputs_of_deviation_1_begin_as_low_rank_ones_of_deviation_1(tiny_llama, states):
    for path in begun(tiny_llama, states).linears.values():
        assert float(path.down.std()) * path.down.shape[1] ** 0.5 == pytest.approx(1, abs=0.3)


# --- the budget


@pytest.mark.parametrize("experts", [1, 3, 12])
@pytest.mark.parametrize("prompts_per_expert", [1, 10])
@pytest.mark.parametrize("layer", [1, 3])
def test_it_trains_at_most_what_mop_does_and_a_rank_more_would_not_fit(tiny_llama, experts, prompts_per_expert, layer):
    config = replace(CONFIG, experts=experts, prompts_per_expert=prompts_per_expert, layer=layer, tasks=())
    adapter = mop_plus.build(tiny_llama, config)
    mop = trained_parameters(mixture_of_prompts.build(tiny_llama, replace(config, arm="mop")))
    assert trained_parameters(adapter) <= mop
    of_a_rank = (BLOCKS - layer) * (32 + 32 + 4 * experts)
    narrowest = sum(one.numel() for one in Gate(HIDDEN, experts, width=16).parameters())
    gate = sum(one.numel() for one in adapter.gate.parameters())
    ranks = {name.rpartition("/")[2]: len(path.down) for name, path in adapter.linears.items()}
    assert ranks["o_proj"] == ranks["down_proj"]
    assert {ranks.get(name) for name in ("q_proj", "k_proj", "v_proj")} <= {None, 1}
    highest = ranks["o_proj"] == HIDDEN
    assert highest or trained_parameters(adapter) - gate + narrowest + of_a_rank > mop


def test_within_the_budget_neurons_go_before_attention_that_before_ranks_and_ranks_before_a_wider_gate():
    def sizes(budget: int, **more: int) -> tuple[int, int, bool, bool]:
        costs = {"of_a_rank": 300, "of_attention": 350, "of_neurons": 400, "of_a_width": 10, "fixed": 5, "most": 9}
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
    assert sizes(1515, most=1) == (1, 46, True, True)
    assert sizes(3349, of_a_rank=1500) == (1, 109, True, True)
    assert sizes(5999, of_a_rank=3000) == (1, 128, True, True)
    assert sizes(465, of_neurons=0, of_attention=0) == (1, 16, True, True)  # of none there are


def test_no_path_has_a_higher_rank_than_its_linear_can_have(tiny_llama):
    adapter = mop_plus.build(tiny_llama, replace(CONFIG, experts=12, prompts_per_expert=100, tasks=()))
    assert {len(path.down) for path in adapter.linears.values()} == {HIDDEN, 1}


def test_a_budget_without_room_for_a_rank_is_refused():
    with pytest.raises(DataError, match="leaves 1664"):
        split_budget(1664, of_a_rank=1500, of_attention=0, of_neurons=0, of_a_width=10, fixed=5, most=9)


# --- as an arm


def test_a_recipe_knows_the_arms_that_can_be_trained():
    assert RECOVERY_METHODS.keys() == ARM_DEFAULTS.keys()


def test_it_comes_back_as_it_was(tiny_llama, states, tmp_path):
    adapter = trained(tiny_llama, states)
    with artifacts.publish(tmp_path / "adapter", {}) as folder:
        save_adapter(adapter, CONFIG, folder)
    again, config = load_adapter(tmp_path / "adapter", tiny_llama, base_sha256="base")
    assert config == replace(CONFIG, tasks=list(TASKS))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in adapter.state_dict().items())
    scores = [
        evaluate(tiny_llama, states, one.compile_for_inference(tiny_llama), batch_size=4) for one in (again, adapter)
    ]
    assert scores[0] == scores[1]


def test_a_family_whose_linears_are_not_known_is_refused():
    with pytest.raises(DataError):
        mop_plus.build(tiny_model("bloom"), CONFIG)
