"""Arms that take the gate's place: each is what it says."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import HIDDEN, generate, instructions_of, random_documents, random_tokens, tiny_model
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.batching import derangement
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.idp import DynamicPrompts
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.methods.prompt_initialization import kmeans
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.recover.training import TrainingConfig, fit
from mopcompress.storage import artifacts

TASKS = ("add", "sort", "tell")
DOCUMENTS = random_documents(12, tasks=TASKS)
EXPERTS, PROMPTS, LAYER = 3, 2, 2
CONTROLS = ("uniform", "oracle", "shuffled", "idp")
CONFIG = AdapterConfig(
    arm="mop",
    experts=EXPERTS,
    prompts_per_expert=PROMPTS,
    layer=LAYER,
    hidden_size=HIDDEN,
    base_sha256="base",
    tasks=TASKS,
)
START = AdapterInit(gate_pretraining_steps=5, gate_logit_scale=1.0, prompt_log_weight=-1.0, seed=0)


@pytest.fixture(scope="module")
def states(tiny_llama):
    return HiddenStateDataset(tiny_llama, DOCUMENTS, LAYER, batch_size=4)


def begun(model, states, arm, *, start=START, **changes):
    config = replace(CONFIG, arm=arm, **changes)
    return RECOVERY_METHODS[arm].initialize(config, AdapterInputs(model, states, TASKS), start)


def trained(model, states, arm, *, steps=3, gate_learning_rate=1e-2, start=START, **changes):
    adapter = begun(model, states, arm, start=start, **changes)
    settings = {"batch_size": 4, "learning_rate": 0.1, "warmup_fraction": 0.1, "seed": 0}
    settings |= {"max_grad_norm": 1.0, "grad_clip_percentile": 100.0, "clip_gate_separately": True}
    rows = fit(adapter, model, states, TrainingConfig(steps=steps, gate_learning_rate=gate_learning_rate, **settings))
    return adapter.requires_grad_(False), [row.nll for row in rows]


def everything(states):
    return states.batch(range(len(states.documents)))


def nats(model, states, adapter):
    batch = everything(states)
    with adapter.active(model, batch.instructions):
        return score_responses(model, batch, states.layer).nll


# --- all of them


def test_recipes_and_recovery_know_the_same_arms():
    assert ARM_DEFAULTS.keys() == RECOVERY_METHODS.keys()
    assert {name for name, arm in ARM_DEFAULTS.items() if arm.needs_tasks} == {"oracle"}


@pytest.mark.parametrize("arm", CONTROLS)
def test_an_adapter_comes_back_as_it_was(tiny_llama, states, tmp_path, arm):
    adapter = begun(tiny_llama, states, arm, gate_mode="values", shared_expert=True, top_k=2)
    config = replace(CONFIG, arm=arm, gate_mode="values", shared_expert=True, top_k=2)
    with artifacts.publish(tmp_path / "adapter", {}) as scratch:
        save_adapter(adapter, config, scratch)
    again, read = load_adapter(tmp_path / "adapter", tiny_llama, base_sha256="base")
    assert read == replace(config, tasks=list(TASKS))
    scores = [
        evaluate(tiny_llama, states, one.compile_for_inference(tiny_llama), batch_size=4) for one in (again, adapter)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("arm", CONTROLS)
def test_compiled_is_trained(tiny_llama, states, arm):
    adapter, batch = begun(tiny_llama, states, arm), everything(states)
    with adapter.compile_for_inference(tiny_llama)(batch.instructions):
        compiled = score_responses(tiny_llama, batch, LAYER).nll
    assert_close(compiled, nats(tiny_llama, states, adapter))


@pytest.mark.parametrize("arm", ["single", "mop", *CONTROLS])
def test_training_leaves_the_model_and_lowers_the_loss(states, arm):
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    _, losses = trained(model, states, arm, steps=24)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())


@pytest.mark.parametrize("arm", ["mop", "shuffled"])
def test_every_arm_begins_with_the_same_prompts(tiny_llama, states, arm):
    own = begun(tiny_llama, states, arm, shared_expert=True)
    for other in ("single", "uniform", "oracle"):
        same = begun(tiny_llama, states, other, shared_expert=True)
        assert torch.equal(own.prompts.flatten(0, 1), same.prompts.flatten(0, 1))
    assert torch.equal(begun(tiny_llama, states, "idp").prompts, begun(tiny_llama, states, arm).prompts)


def test_parameters_count_the_shared_expert_and_the_gate(tiny_llama, states):
    gate = sum(parameter.numel() for parameter in Gate(HIDDEN, EXPERTS).parameters())
    for arm, own in {"single": 0, "uniform": 0, "oracle": 0, "mop": gate, "shuffled": gate}.items():
        for shared in (False, True):
            adapter = begun(tiny_llama, states, arm, shared_expert=shared)
            assert trained_parameters(adapter) == (EXPERTS + shared) * PROMPTS * HIDDEN + 1 + own
    assert trained_parameters(begun(tiny_llama, states, "idp")) == EXPERTS * PROMPTS * HIDDEN + 1


# --- uniform


@pytest.mark.parametrize("reading", ["renormalised", "values"])
@pytest.mark.parametrize("shared", [False, True])
def test_uniform_is_single_after_training_too(tiny_llama, states, reading, shared):
    settings = {"gate_mode": reading, "shared_expert": shared, "top_k": 1}
    (single, losses), (uniform, same) = (trained(tiny_llama, states, arm, **settings) for arm in ("single", "uniform"))
    assert same == losses
    assert torch.equal(uniform.prompts.flatten(0, 1), single.prompts.flatten(0, 1))
    assert torch.equal(nats(tiny_llama, states, uniform), nats(tiny_llama, states, single))
    scores = [
        evaluate(tiny_llama, states, one.compile_for_inference(tiny_llama), batch_size=4) for one in (uniform, single)
    ]
    assert scores[0] == scores[1]  # without a gate nothing says which experts are the strongest


def test_uniform_groups_that_are_read_separately_are_no_plain_prompt(tiny_llama, states):
    single, uniform = (begun(tiny_llama, states, arm, gate_mode="separate") for arm in ("single", "uniform"))
    assert not torch.allclose(nats(tiny_llama, states, uniform), nats(tiny_llama, states, single), atol=1e-3)


def test_prompts_of_an_expert_begin_as_states_of_its_own_task(tiny_llama, states):
    prompts = begun(tiny_llama, states, "mop").prompts.detach()
    read = states.batch(range(len(states.documents))).instructions
    for expert, task in enumerate(CONFIG.tasks):
        own = read.hidden[[document.task == task for document in states.documents]].flatten(0, 1)
        assert all(bool((own == prompt).all(1).any()) for prompt in prompts[expert])


# --- oracle


def test_the_oracle_gives_all_weight_to_the_true_tasks_expert(tiny_llama, states):
    read = everything(states).instructions
    weights = begun(tiny_llama, states, "oracle").training_log_weights(read).exp()
    expected = torch.tensor([[3.0 * (task == name) for name in TASKS] for task in read.tasks])
    assert_close(weights, expected)


def test_under_the_oracle_an_expert_learns_from_its_own_task_alone(states):
    model = tiny_model()
    adapter = begun(model, states, "oracle")
    rows = [row for row, document in enumerate(DOCUMENTS) if document.task == "sort"]
    batch = states.batch(rows)
    with adapter.active(model, batch.instructions):
        score_responses(model, batch, LAYER).nll.mean().backward()
    assert bool(adapter.prompts.grad[1].any(1).all())
    assert not bool(adapter.prompts.grad[2].any())  # the first is another matter: the second sees it


def test_an_unknown_task_is_no_matter_for_the_oracle(tiny_llama, states):
    adapter = begun(tiny_llama, states, "oracle").requires_grad_(False)
    with pytest.raises(UsageError, match="oracle: it needs the true task"):
        generate(tiny_llama, adapter, ["w5 w6"], max_new_tokens=2)
    with pytest.raises(DataError, match="no expert for the task 'sing', only for add, sort, tell"):
        adapter.training_log_weights(instructions_of(tiny_llama, random_tokens(2, 5), LAYER, tasks=["add", "sing"]))


def test_an_oracle_without_tasks_is_refused(tiny_llama, states):
    with pytest.raises(UsageError, match="oracle: 2 experts are not one for each task"):
        begun(tiny_llama, states, "oracle", experts=2, tasks=())


# --- shuffled


@pytest.mark.parametrize("count", [2, 3, 8, 65])
def test_everyone_reads_another_and_is_read_once(count):
    order = derangement(count)
    assert sorted(order) == list(range(count))
    assert all(place != own for own, place in enumerate(order))
    assert order == derangement(count)
    place, cycle = 0, set()
    for _ in range(count):
        cycle.add(place := order[place])
    assert len(cycle) == count


def test_the_shuffled_gate_gives_anothers_weights(tiny_llama, states):
    read, shuffled = everything(states).instructions, begun(tiny_llama, states, "shuffled")
    mop = begun(tiny_llama, states, "mop")
    weights = mop.training_log_weights(read)
    assert_close(shuffled.training_log_weights(read), weights[derangement(len(DOCUMENTS))])
    assert not torch.allclose(shuffled.training_log_weights(read), weights, atol=1e-2)


def test_whom_a_shuffled_gate_reads_does_not_depend_on_the_batch(tiny_llama, states):
    shuffled = begun(tiny_llama, states, "shuffled")
    together = shuffled.training_log_weights(everything(states).instructions)
    for rows in ([3], [4, 5], [11, 0, 7]):
        assert_close(shuffled.training_log_weights(states.batch(rows).instructions), together[rows])


def test_where_there_are_no_others_it_reads_the_mean_of_the_training_instructions(tiny_llama, states):
    shuffled = begun(tiny_llama, states, "shuffled").requires_grad_(False)
    alone = HiddenStateDataset(tiny_llama, DOCUMENTS[:1], LAYER, batch_size=4)
    mean = states.means.mean(0, keepdim=True)
    assert_close(shuffled.training_log_weights(alone.batch([0]).instructions), shuffled.gate(mean))
    assert generate(tiny_llama, shuffled, ["w5 w6"], max_new_tokens=4)


# --- one prompt of several


def idp_of(*, prompt_log_weight=-0.5, groups=EXPERTS, seed=0):
    seeded = torch.Generator().manual_seed(seed)
    prompts = 2 * torch.randn(groups, PROMPTS, HIDDEN, generator=seeded)
    return DynamicPrompts(prompts, LAYER, prompt_log_weight=prompt_log_weight)


@torch.no_grad()
def attention_slowly(model, adapter, document):
    """Softmax over prompts and text of the adapter's layer, a query head and a token at a time."""
    attention = model.blocks[LAYER].self_attn
    normed = model.blocks[LAYER].input_layernorm
    text = model.run_lower(torch.tensor([document.tokens[: document.context_tokens]]), LAYER)

    def rotated(states, weight):
        split = weight(normed(states)).view(1, states.shape[1], -1, 8).transpose(1, 2)
        cos, sin = model.network.model.rotary_emb(states, torch.arange(states.shape[1])[None])
        return apply_rotary_pos_emb(split, split, cos, sin)[0][0]

    query, key = rotated(text, attention.q_proj), rotated(text, attention.k_proj)
    means = torch.zeros(len(adapter.prompts))
    count = text.shape[1]
    for head, token in itertools.product(range(4), range(count)):
        scores = [query[head, token] @ key[head // 2, : token + 1].T]
        for group in adapter.prompts:
            own = rotated(group[None], attention.k_proj)
            scores.append(query[head, token] @ own[head // 2].T + adapter.prompt_log_weight * 8**0.5)
        weights = (torch.cat(scores) / 8**0.5).softmax(0)[token + 1 :]
        means += weights.view(len(adapter.prompts), PROMPTS).sum(1) / (4 * count)
    return means


def test_attention_to_a_group_is_its_definition(tiny_llama, states):
    adapter = idp_of()
    found = adapter.attention(tiny_llama, adapter.keys_and_values(tiny_llama), everything(states).instructions)
    for row, document in enumerate(DOCUMENTS):
        assert_close(found[row], attention_slowly(tiny_llama, adapter, document), rtol=1e-4, atol=1e-5)


def test_the_group_most_attended_to_acts_alone(tiny_llama, states):
    """Each example is scored as with a plain prompt that is its own group."""
    adapter, batch = idp_of(), everything(states)
    attention = adapter.attention(tiny_llama, adapter.keys_and_values(tiny_llama), batch.instructions)
    chosen = attention.argmax(1)
    assert len(chosen.unique()) > 1  # else the test looks at nothing
    assert_close(adapter.expert_weights(tiny_llama, batch.instructions), torch.eye(EXPERTS)[chosen])
    found = nats(tiny_llama, states, adapter)
    for group in range(EXPERTS):
        alone = MixtureOfPrompts(adapter.prompts[group].detach()[None], LAYER, None, prompt_log_weight=-0.5)
        expected, own = nats(tiny_llama, states, alone), chosen[batch.example] == group
        assert_close(found[own], expected[own], rtol=1e-4, atol=1e-5)


def test_one_group_is_the_single_prompt(tiny_llama, states):
    adapter = idp_of(groups=1)
    single = MixtureOfPrompts(adapter.prompts.detach(), LAYER, None, prompt_log_weight=-0.5)
    assert torch.equal(nats(tiny_llama, states, adapter), nats(tiny_llama, states, single))


def test_gradients_reach_the_group_that_acts_alone(states):
    model, adapter = tiny_model(), idp_of()
    chosen = adapter.expert_weights(model, everything(states).instructions).argmax(1)
    group = int(chosen[0])
    batch = states.batch([row for row in range(len(DOCUMENTS)) if chosen[row] == group])
    with adapter.active(model, batch.instructions):
        score_responses(model, batch, LAYER).nll.mean().backward()
    reached = adapter.prompts.grad.flatten(1).any(1)
    assert reached.tolist() == [expert == group for expert in range(EXPERTS)]
    assert adapter.prompt_log_weight.grad.item() != 0


def test_the_choice_of_a_batch_is_the_choice_of_each(tiny_llama, states):
    adapter, read = idp_of(), everything(states).instructions
    together = adapter.expert_weights(tiny_llama, read)
    for row in range(len(DOCUMENTS)):
        assert torch.equal(adapter.expert_weights(tiny_llama, states.batch([row]).instructions)[0], together[row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_cache_and_the_batch_change_no_answer_of_one_prompt_of_several(family):
    model, adapter = tiny_model(family), idp_of().requires_grad_(False)
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    batched = generate(model, adapter, prompts, max_new_tokens=8)
    assert batched == generate(model, adapter, prompts, max_new_tokens=8, use_cache=False)
    assert batched == [generate(model, adapter, [prompt], max_new_tokens=8)[0] for prompt in prompts]


# --- how a gate starts


def test_no_pretraining_leaves_a_random_gate(tiny_llama, states):
    gate = begun(tiny_llama, states, "mop", start=replace(START, gate_pretraining_steps=0)).gate
    taught = begun(tiny_llama, states, "mop").gate
    assert not bool(gate.outer.bias.any())  # as drawn
    assert not torch.equal(taught.outer.weight, gate.outer.weight)
    assert float(gate(states.means).detach().std(0).min()) > 0.01  # random, not without preference
    assert_close(gate.mean, taught.mean)  # what it measures its inputs by is known all the same


def test_a_gate_tempered_to_nought_starts_as_the_plain_prompt_and_then_learns(tiny_llama, states):
    start = replace(START, gate_logit_scale=0.0)
    mop, single = (begun(tiny_llama, states, arm, start=start) for arm in ("mop", "single"))
    assert_close(nats(tiny_llama, states, mop), nats(tiny_llama, states, single))
    adapter, _ = trained(tiny_llama, states, "mop", start=start)
    assert float(adapter.gate(states.means).detach().abs().max()) > 1e-3


def test_a_gate_without_a_learning_rate_stays_as_it_started(tiny_llama, states):
    before = begun(tiny_llama, states, "mop")
    after, _ = trained(tiny_llama, states, "mop", gate_learning_rate=0.0)
    for name, tensor in before.gate.state_dict().items():
        assert torch.equal(after.gate.state_dict()[name], tensor), name
    assert not torch.equal(after.prompts, before.prompts)
    moved, _ = trained(tiny_llama, states, "mop", gate_learning_rate=1e-2)
    assert not torch.equal(moved.gate.outer.weight, before.gate.outer.weight)


def test_clusters_take_the_place_of_tasks_without_a_name(tiny_llama, states):
    """The same arm with its tasks unknown: k-means chooses the domains, and the gate is taught those, one to one."""
    start = replace(START, gate_pretraining_steps=200)
    gate = begun(tiny_llama, states, "mop", tasks=(), start=start).gate
    found = kmeans(states.means, EXPERTS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(states.means).argmax(1), found)
    assert found.tolist() != [TASKS.index(document.task) for document in DOCUMENTS]
