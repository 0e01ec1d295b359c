"""Arms that change weights while they are applied: lora, masklora, ia3, norms."""

import json
from dataclasses import replace

import pytest
import torch
from cli_runner import invoke, write_data
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import BLOCKS, HIDDEN, config_of, generate, network_of, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.evaluation.loss import score_responses
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, trained_parameters
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.peft_export import FORMATS, write_peft
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import load_adapter, save_adapter
from mopcompress.recover.training import TrainingConfig, fit
from mopcompress.storage import artifacts

WEIGHTS = ("lora", "masklora", "ia3", "norms")
KNOWN = ("llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox", "opt")
LAYER = 2
TASKS = ("add", "sort", "tell")
DOCUMENTS = random_documents(6, tasks=TASKS)
START = AdapterInit(gate_pretraining_steps=0, gate_logit_scale=1.0, prompt_log_weight=0.0, seed=0)
NOTHING = InstructionStates(torch.zeros(1, 1, HIDDEN), torch.ones(1, dtype=torch.long), torch.zeros(1, HIDDEN))


def config_for(arm, **changes):
    settings = {"experts": 3, "prompts_per_expert": 2, "layer": LAYER, "hidden_size": HIDDEN}
    return AdapterConfig(**{"arm": arm, "base_sha256": "base", "tasks": [], "rank": 2} | settings | changes)


def states_of(model, layer=LAYER, documents=DOCUMENTS):
    return HiddenStateDataset(model, documents, layer, batch_size=4)


def begun(model, arm, *, seed=0, **changes):
    config = config_for(arm, **changes)
    return RECOVERY_METHODS[arm].initialize(
        config, AdapterInputs(model, states_of(model, config.layer), TASKS), replace(START, seed=seed)
    )


def moved(model, arm, *, seed=0, size=0.2, **changes):
    """An adapter far from its start."""
    adapter = begun(model, arm, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def pruned(family="llama", *, seed=0):
    """A model with half of every block's weights at zero."""
    model = tiny_model(family, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.blocks.modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            weight = weight_of(module)
            set_weight(module, weight * (torch.rand(weight.shape, generator=generator) < 0.5), None)
    return model


def logits(model, adapter=None, *, tokens=None):
    """Of the whole network."""
    tokens = random_tokens(2, 9) if tokens is None else tokens
    with torch.no_grad():
        if adapter is None:
            return model.network(input_ids=tokens, use_cache=False).logits
        with adapter.active(model, NOTHING):
            return model.network(input_ids=tokens, use_cache=False).logits


def nats(model, adapter, states):
    batch = states.batch(range(len(DOCUMENTS)))
    with adapter.active(model, batch.instructions):
        return score_responses(model, batch, states.layer).nll


# --- neutral at the start, gone afterwards


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("arm", WEIGHTS)
@pytest.mark.parametrize("family", KNOWN)
def test_before_the_first_step_it_is_the_bare_model_to_the_bit(family, arm, layer):
    model = tiny_model(family)
    adapter, bare = begun(model, arm, layer=layer), logits(model)
    assert torch.equal(logits(model, adapter), bare)
    with torch.no_grad(), adapter.compile_for_inference(model)(NOTHING):
        assert torch.equal(model.network(input_ids=random_tokens(2, 9), use_cache=False).logits, bare)
    far = logits(model, moved(model, arm, layer=layer))
    assert not torch.allclose(far, bare, atol=1e-2)
    assert torch.equal(logits(model), bare)


def interrupted(model, acting, modules):
    with acting:
        assert dict(model.network.named_modules()) != modules
        raise KeyboardInterrupt


@pytest.mark.parametrize("arm", WEIGHTS)
def test_the_network_is_what_it_was_also_after_a_failure(arm):
    model = tiny_model()
    modules, weights = dict(model.network.named_modules()), model.network.state_dict()
    weights = {name: weight.clone() for name, weight in weights.items()}
    adapter = moved(model, arm)
    for acting in (adapter.active(model, NOTHING), adapter.compile_for_inference(model)(NOTHING)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(model, acting, modules)
        assert dict(model.network.named_modules()) == modules
        assert all(torch.equal(weight, weights[name]) for name, weight in model.network.state_dict().items())


@pytest.mark.parametrize("arm", WEIGHTS)
def test_nothing_below_the_layer_changes_and_every_block_above_does(arm):
    model = tiny_model()
    adapter, tokens = moved(model, arm), random_tokens(2, 9)
    blocks = {int(name.split(".")[2]) for name in adapter.patches_by_name() if "layers" in name}
    assert blocks == set(range(LAYER, BLOCKS))
    bare = model.run_lower(tokens, LAYER)
    with adapter.active(model, NOTHING):
        assert torch.equal(model.run_lower(tokens, LAYER), bare)
        upper = model.logits(model.run_upper(bare, LAYER).flatten(0, 1)).view(2, 9, -1)
    assert_close(upper, logits(model, adapter))


# --- what each of them computes, by its equation


def merged_by_hand(model, adapter, arm):
    """The weights that the arm's equation gives, by dotted name, and biases with them."""
    expected = {}
    for name, change in adapter.patches_by_name().items():
        module = model.network.get_submodule(name)
        if arm == "norms":
            expected |= {f"{name}.{own}": value for own, value in change.own.items()}
            continue
        weight, bias = weight_of(module).double(), module.bias
        if arm == "ia3" and any(end in name for end in ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")):
            weight = weight @ torch.diag(change.scale.double())
        elif arm == "ia3":
            weight = torch.diag(change.scale.double()) @ weight
            if bias is not None:
                expected[f"{name}.bias"] = bias * change.scale
        else:
            update = sum(
                torch.outer(up, down) for up, down in zip(change.up.T.double(), change.down.double(), strict=True)
            )
            weight = weight + (update.where(weight != 0, torch.zeros(())) if arm == "masklora" else update)
        expected[f"{name}.weight"] = (weight.T if type(module).__name__ == "Conv1D" else weight).float()
    return expected


@pytest.mark.parametrize("arm", WEIGHTS)
@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_it_is_the_model_with_the_weights_of_its_equation(family, arm):
    model, other = pruned(family), pruned(family)
    adapter = moved(model, arm)
    expected = merged_by_hand(model, adapter, arm)
    merged = adapter.merged(model)
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        other.network.get_parameter(name).copy_(expected[name])
    assert_close(logits(model, adapter), logits(other), rtol=1e-4, atol=1e-4)
    with adapter.compile_for_inference(model)(NOTHING):
        assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_pruned_stays_pruned(family):
    model = pruned(family)
    states = states_of(model)
    for arm, stay in (("masklora", True), ("ia3", True), ("lora", False)):
        adapter = begun(model, arm)
        fit(adapter, model, states, training())
        merged = adapter.merged(model)
        changed = 0
        for name, value in merged.items():
            before = model.network.get_parameter(name)
            zeros = before == 0
            if value.ndim == 2:
                assert 0.4 < float(zeros.float().mean()) < 0.6
                assert bool((value[zeros] == 0).all()) == stay, (arm, name)
            changed += int((value != before).sum())
        assert changed > 1000


@pytest.mark.parametrize("arm", WEIGHTS)
@torch.no_grad()
def test_a_linear_that_does_more_than_its_weight_says_does_so_still(arm):
    model = tiny_model()
    for block in model.blocks:
        for linear in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda _module, inputs, output: output + 0.1 * inputs[0].mean())
    adapter = moved(model, arm)
    acting = logits(model, adapter)
    with adapter.compile_for_inference(model)(NOTHING):
        assert_close(logits(model), acting, rtol=1e-4, atol=1e-4)


# --- training


def training(**changes):
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 0.05, "gate_learning_rate": 0.0}
    settings |= {
        "warmup_fraction": 0.1,
        "seed": 0,
        "max_grad_norm": 1.0,
        "grad_clip_percentile": 100.0,
        "clip_gate_separately": True,
    }
    return TrainingConfig(**settings | changes)


@pytest.mark.parametrize("arm", WEIGHTS)
@pytest.mark.parametrize("family", KNOWN)
def test_a_gradient_reaches_every_trained_parameter_and_nothing_else(family, arm):
    model = tiny_model(family)
    adapter = moved(model, arm)
    assert [id(one) for one in adapter.parameter_groups()["adapter"]] == [id(one) for one in adapter.parameters()]
    assert list(adapter.parameter_groups()["gate"]) == []
    nats(model, adapter, states_of(model)).mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize("arm", WEIGHTS)
def test_training_lowers_the_loss_and_leaves_the_network_as_it_was(arm):
    model = pruned()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    states, adapter = states_of(model), begun(model, arm)
    rows = fit(adapter, model, states, training(steps=60, batch_size=6))
    assert rows[-1].nll < 0.8 * rows[0].nll
    assert model.network.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())


@pytest.mark.parametrize("arm", WEIGHTS)
def test_equal_seeds_give_equal_results(tiny_llama, arm):
    results = []
    for seed in (0, 0, 1):
        adapter = begun(tiny_llama, arm, seed=seed)
        fit(adapter, tiny_llama, states_of(tiny_llama), training(seed=seed))
        results.append([parameter.detach().clone() for parameter in adapter.parameters()])
    first, again, other = results
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("arm", WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(family, arm):
    model = tiny_model(family)
    adapter = moved(model, arm, size=0.4).requires_grad_(False)
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    written = generate(model, adapter, prompts, max_new_tokens=8)
    assert written == generate(model, adapter, prompts, max_new_tokens=8, use_cache=False)
    assert written != generate(model, None, prompts, max_new_tokens=8)


# --- the budget


def test_without_a_rank_it_is_the_largest_that_trains_no_more_than_mop(tiny_llama):
    budget = trained_parameters(RECOVERY_METHODS["mop"].build(tiny_llama, config_for("mop")))
    targets = ["Linear"]  # with these the budget decides, not the smallest linear
    for arm in ("lora", "masklora"):
        trained = {
            rank: trained_parameters(
                RECOVERY_METHODS[arm].build(tiny_llama, config_for(arm, rank=rank, targets=targets))
            )
            for rank in (*range(1, 8), None)
        }
        assert trained[None] == max(count for count in trained.values() if count <= budget)
        assert trained[6] == 6 * trained[1] > budget > trained[None] == trained[5]


def test_without_a_rank_no_linear_has_more_than_it_can(tiny_llama):
    adapter = RECOVERY_METHODS["lora"].build(tiny_llama, config_for("lora", rank=None, targets=["v_proj"]))
    assert {len(change.down) for change in adapter.patches_by_name().values()} == {16}  # a value projection is 16 x 32


def test_the_budget_grows_with_the_experts(tiny_llama):
    sizes = [
        trained_parameters(
            RECOVERY_METHODS["lora"].build(
                tiny_llama, config_for("lora", rank=None, targets=["Linear"], experts=experts)
            )
        )
        for experts in (1, 40)
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 33}, r"rank: 33 is more than model\.layers\.2\.self_attn\.o_proj can have, .* 32 x 32"),
        (
            {"rank": None, "layer": 0, "targets": ["Linear"]},
            r"rank 1 on 28 linears trains 6080 numbers, and mop with 3 experts of 2 prompts 4",
        ),
        ({"targets": ["query"]}, r"no linear .* is 'query'; there are self_attn\.q_proj, .*name some"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_why(changes, message):
    model = tiny_model(intermediate_size=400) if changes.get("layer") == 0 else tiny_model()
    with pytest.raises(DataError, match=message):
        RECOVERY_METHODS["lora"].build(model, config_for("lora", **changes))


def test_a_family_without_mop_needs_a_rank():
    model = tiny_model("bloom")
    with pytest.raises(DataError, match=r"trains as much as mop where no rank is given; .*; or give one"):
        RECOVERY_METHODS["lora"].build(model, config_for("lora", rank=None))
    adapter = RECOVERY_METHODS["lora"].build(model, config_for("lora", rank=1))
    writers = ("self_attention.dense", "mlp.dense_4h_to_h")
    assert set(adapter.patches_by_name()) == {f"transformer.h.{block}.{name}" for block in (2, 3) for name in writers}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_have_no_linear_that_ia3_could_scale(family):
    with pytest.raises(DataError, match="no linears down_proj, or fc2"):
        RECOVERY_METHODS["ia3"].build(tiny_model(family), config_for("ia3"))


def test_targets_are_ends_of_names_or_patterns(tiny_llama):
    def changed(*targets):
        names = RECOVERY_METHODS["lora"].build(tiny_llama, config_for("lora", targets=list(targets))).patches_by_name()
        return {name.removeprefix("model.layers.") for name in names}

    assert changed("q_proj") == {"2.self_attn.q_proj", "3.self_attn.q_proj"}
    assert changed("mlp.up_proj", "re:.*3.self_attn.o") == {"2.mlp.up_proj", "3.mlp.up_proj", "3.self_attn.o_proj"}
    assert changed("model.layers.3.mlp.down_proj") == {"3.mlp.down_proj"}
    assert len(changed("Linear")) == 14


COUNTS = {  # rank 2; two blocks
    "lora": 2 * 2 * ((32 + 32) + (32 + 48)),  # what attention and the MLP write
    "masklora": 2 * 2 * ((32 + 32) + (32 + 48)),
    "ia3": 2 * (16 + 16 + 48),
    "norms": 2 * 2 * 32 + 32,
}


@pytest.mark.parametrize("arm", WEIGHTS)
def test_trained_parameters_are_those_of_the_paper(tiny_llama, arm):
    assert trained_parameters(begun(tiny_llama, arm)) == COUNTS[arm]


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("llama", 2 * 2 * 32 + 32),
        ("qwen3", 2 * (2 * 32 + 2 * 8) + 32),  # queries and keys have norms too
        ("gpt2", 2 * 2 * 64 + 64),  # weights and biases
        ("bloom", 2 * 2 * 64 + 64),  # not the norm of its embeddings
        ("opt", 2 * 2 * 64 + 64),
    ],
)
def test_norms_are_those_from_the_layer_up_with_the_last(family, count):
    assert trained_parameters(RECOVERY_METHODS["norms"].build(tiny_model(family), config_for("norms"))) == count


def test_norms_of_what_stands_beside_the_decoder_are_not_trained():
    """Such as of a tower for images."""
    model = tiny_model()
    count = trained_parameters(RECOVERY_METHODS["norms"].build(model, config_for("norms")))
    model.network.tower = torch.nn.LayerNorm(HIDDEN)
    assert trained_parameters(RECOVERY_METHODS["norms"].build(model, config_for("norms"))) == count


def test_the_low_rank_start_is_that_of_a_linear(tiny_llama):
    for change in begun(tiny_llama, "lora", rank=16).patches_by_name().values():
        assert not change.up.any()
        down = change.down.detach()
        bound = down.shape[1] ** -0.5
        assert 0.9 * bound < float(down.abs().max()) <= bound
        assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


# --- folders


@pytest.mark.parametrize("arm", WEIGHTS)
def test_an_adapter_comes_back_as_it_was(tiny_llama, tmp_path, arm):
    config = config_for(arm, rank=None, targets=["k_proj"])
    adapter = moved(tiny_llama, arm, rank=None, targets=["k_proj"])
    with artifacts.publish(tmp_path / "adapter", {}) as scratch:
        save_adapter(adapter, config, scratch)
    again, stored = load_adapter(tmp_path / "adapter", tiny_llama, base_sha256="base")
    assert stored == config
    assert isinstance(again, PatchedModules)
    assert again.layer == LAYER
    assert torch.equal(logits(tiny_llama, again), logits(tiny_llama, adapter))
    states = states_of(tiny_llama)
    scores = [
        evaluate(tiny_llama, states, one.compile_for_inference(tiny_llama), batch_size=4) for one in (again, adapter)
    ]
    assert scores[0] == scores[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("arm", [arm for arm in FORMATS if arm in WEIGHTS])
@pytest.mark.parametrize("family", KNOWN)
def test_peft_reads_the_very_same_adapter(family, arm, layer, tmp_path):
    model = tiny_model(family)
    adapter = moved(model, arm, layer=layer)
    write_peft(adapter, config_for(arm, layer=layer), model, "somewhere", tmp_path)
    stock = network_of(config_of(family), attention="sdpa")
    theirs = PeftModel.from_pretrained(stock, tmp_path)
    with torch.no_grad():
        found = theirs(input_ids=random_tokens(2, 9)).logits
    assert_close(found, logits(model, adapter), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits(model), atol=1e-2)
    held = sum(one.numel() for name, one in theirs.named_parameters() if "lora_" in name or "ia3_" in name)
    assert held == trained_parameters(adapter)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("arm", ["lora", "ia3"])
@pytest.mark.parametrize("family", KNOWN)
def test_the_files_are_those_that_peft_writes(family, arm, tmp_path):
    model = tiny_model(family)
    adapter = moved(model, arm)
    write_peft(adapter, config_for(arm), model, "somewhere", tmp_path)
    theirs = PeftModel.from_pretrained(network_of(config_of(family), attention="sdpa"), tmp_path)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # asks no hub then
    ours, written = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs"))
    assert ours.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in ours.items())
    settings, whole = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "theirs")
    )
    for name, value in settings.items():
        assert (sorted(whole[name]) if isinstance(value, list) else whole[name]) == (
            sorted(value) if isinstance(value, list) else value
        ), name


@pytest.mark.parametrize("arm", ["masklora", "norms"])
def test_what_peft_does_not_have_is_refused(tiny_llama, tmp_path, arm):
    with pytest.raises(DataError, match=f"arm {arm}: PEFT has no such adapter, only"):
        write_peft(begun(tiny_llama, arm), config_for(arm), tiny_llama, "somewhere", tmp_path)


# --- in a recipe


def test_every_arm_has_a_learning_rate():
    assert ARM_DEFAULTS.keys() == RECOVERY_METHODS.keys()


@pytest.mark.parametrize(("arm", "flags"), [("masklora", ("--rank", 2)), ("norms", ())])
def test_a_rival_is_trained_and_scored_from_the_command_line(stories, tmp_path, arm, flags):
    folder = tmp_path / "adapter"
    common = (stories, "--data", write_data(tmp_path / "data"), "--device", "cpu", "--json")
    trained = invoke("recover", *common, "--steps", 2, "--arm", arm, *flags, "--layer", 0, "--output-dir", folder)
    assert trained.code == 0, trained.err
    stored = json.loads((folder / "adapter.json").read_text())
    assert (stored["layer"], stored["rank"]) == (0, 2 if flags else None)
    alone, with_it = invoke("evaluate", *common), invoke("evaluate", *common, "--adapter", folder)
    assert (with_it.code, with_it.json["arm"]) == (0, arm), with_it.err
    assert alone.json["perplexity"] != with_it.json["perplexity"]


def test_layer_0_is_the_whole_network_for_these_arms_alone(tiny_llama):
    for arm in (*WEIGHTS, "none"):
        assert first_layer(arm, 0, tiny_llama) == 0
        assert first_layer(arm, None, tiny_llama) == first_layer("mop", None, tiny_llama)
    with pytest.raises(UsageError, match="0 is not 1 to 3"):
        first_layer("mop", 0, tiny_llama)
