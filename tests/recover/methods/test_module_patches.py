"""Arms that patch the network's modules while they are active: lora, masklora, ia3, norms."""

import json

import pytest
import torch
from cli_runner import invoke, write_data
from factories import (
    adapter_init,
    initialized_adapter,
    pairwise,
    pruned_model,
    response_nll,
    saved_and_loaded,
    training_config,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import BLOCKS, HIDDEN, config_of, generate, network_of, random_documents, random_tokens, tiny_model
from torch.testing import assert_close

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.evaluation.perplexity import evaluate
from mopcompress.models.modules import weight_of
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.peft_export import FORMATS, write_peft
from mopcompress.recover.training import fit

ARMS = ("lora", "masklora", "ia3", "norms")
FAMILIES = ("llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox", "opt")
LAYER = 2
DOCUMENTS = random_documents(6)
NO_INSTRUCTION = InstructionStates(torch.zeros(1, 1, HIDDEN), torch.ones(1, dtype=torch.long), torch.zeros(1, HIDDEN))


def states_of(model, layer=LAYER):
    return HiddenStateDataset(model, DOCUMENTS, layer, batch_size=4)


def initialized(model, arm, *, layer=LAYER, **changes):
    """Return an adapter before its first step, and its config."""
    changes = {"rank": 2, "tasks": [], "base_sha256": "base"} | changes
    return initialized_adapter(arm, model, states_of(model, layer), **changes)


def perturbed(model, arm, *, scale=0.2, **changes):
    """Return an adapter far from its first values, and its config."""
    adapter, config = initialized(model, arm, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return adapter, config


def logits(model, adapter=None):
    """Return the logits of the whole network."""
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        if adapter is None:
            return model.network(input_ids=tokens, use_cache=False).logits
        with adapter.active(model, NO_INSTRUCTION):
            return model.network(input_ids=tokens, use_cache=False).logits


# --- neutral at first, gone afterwards


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize(("family", "arm"), pairwise(FAMILIES, ARMS))
def test_before_training_it_is_the_bare_model_to_the_bit(family, arm, layer):
    model = tiny_model(family)
    adapter, bare = initialized(model, arm, layer=layer)[0], logits(model)
    assert torch.equal(logits(model, adapter), bare)
    with adapter.compile_for_inference(model)(NO_INSTRUCTION):
        assert torch.equal(logits(model), bare)
    changed = logits(model, perturbed(model, arm, layer=layer)[0])
    assert not torch.allclose(changed, bare, atol=1e-2)
    assert torch.equal(logits(model), bare)


def interrupt(model, context, modules):
    with context:
        assert dict(model.network.named_modules()) != modules
        raise KeyboardInterrupt


@pytest.mark.parametrize("arm", ARMS)
def test_after_an_interrupt_the_network_is_unchanged(arm):
    model = tiny_model()
    modules, weights = dict(model.network.named_modules()), model.network.state_dict()
    weights = {name: weight.clone() for name, weight in weights.items()}
    adapter, _ = perturbed(model, arm)
    for context in (adapter.active(model, NO_INSTRUCTION), adapter.compile_for_inference(model)(NO_INSTRUCTION)):
        with pytest.raises(KeyboardInterrupt):
            interrupt(model, context, modules)
        assert dict(model.network.named_modules()) == modules
        assert all(torch.equal(weight, weights[name]) for name, weight in model.network.state_dict().items())


@pytest.mark.parametrize("arm", ARMS)
def test_every_block_from_the_layer_up_changes_and_none_below(arm):
    model = tiny_model()
    adapter, tokens = perturbed(model, arm)[0], random_tokens(2, 9)
    blocks = {int(name.split(".")[2]) for name in adapter.patches_by_name() if "layers" in name}
    assert blocks == set(range(LAYER, BLOCKS))
    bare = model.run_lower(tokens, LAYER)
    with adapter.active(model, NO_INSTRUCTION):
        assert torch.equal(model.run_lower(tokens, LAYER), bare)
        upper = model.logits(model.run_upper(bare, LAYER).flatten(0, 1)).view(2, 9, -1)
    assert_close(upper, logits(model, adapter))


# --- the equations


def merged_by_hand(model, adapter, arm):
    """Return the weights of the arm's equation, by dotted name, and biases with them."""
    expected = {}
    for name, patch in adapter.patches_by_name().items():
        module = model.network.get_submodule(name)
        if arm == "norms":
            expected |= {f"{name}.{parameter}": value for parameter, value in patch.own.items()}
            continue
        weight, bias = weight_of(module).double(), module.bias
        if arm == "ia3" and any(end in name for end in ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")):
            weight = weight @ torch.diag(patch.scale.double())
        elif arm == "ia3":
            weight = torch.diag(patch.scale.double()) @ weight
            if bias is not None:
                expected[f"{name}.bias"] = bias * patch.scale
        else:
            update = sum(
                torch.outer(up, down) for up, down in zip(patch.up.T.double(), patch.down.double(), strict=True)
            )
            weight = weight + (update.where(weight != 0, torch.zeros(())) if arm == "masklora" else update)
        expected[f"{name}.weight"] = (weight.T if type(module).__name__ == "Conv1D" else weight).float()
    return expected


@pytest.mark.parametrize(("family", "arm"), pairwise(FAMILIES, ARMS))
@torch.no_grad()
def test_it_is_the_model_with_the_weights_of_its_equation(family, arm):
    model, other = pruned_model(family), pruned_model(family)
    adapter, _ = perturbed(model, arm)
    expected = merged_by_hand(model, adapter, arm)
    merged = adapter.merged(model)
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        other.network.get_parameter(name).copy_(expected[name])
    assert_close(logits(model, adapter), logits(other), rtol=1e-4, atol=1e-4)
    with adapter.compile_for_inference(model)(NO_INSTRUCTION):
        assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_a_linear_with_hooks_still_runs_them(arm):
    model = tiny_model()
    for block in model.blocks:
        for linear in (block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda _module, inputs, output: output + 0.1 * inputs[0].mean())
    adapter, _ = perturbed(model, arm)
    active = logits(model, adapter)
    with adapter.compile_for_inference(model)(NO_INSTRUCTION):
        assert_close(logits(model), active, rtol=1e-4, atol=1e-4)


# --- training


@pytest.mark.parametrize(("family", "arm"), pairwise(FAMILIES, ARMS))
def test_gradients_reach_the_trained_parameters_and_no_others(family, arm):
    model = tiny_model(family)
    adapter, _ = perturbed(model, arm)
    trained = [id(parameter) for parameter in adapter.parameter_groups()["adapter"]]
    assert trained == [id(parameter) for parameter in adapter.parameters()]
    assert list(adapter.parameter_groups()["gate"]) == []
    response_nll(model, states_of(model), adapter).mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(weight.grad is None for weight in model.network.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_training_lowers_the_loss_and_keeps_the_network(arm):
    model = pruned_model()
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    states, adapter = states_of(model), initialized(model, arm)[0]
    rows = fit(adapter, model, states, rival_config(steps=60, batch_size=6))
    assert rows[-1].nll < 0.8 * rows[0].nll
    assert model.network.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())


def rival_config(**changes):
    return training_config(**{"steps": 4, "learning_rate": 0.05, "gate_learning_rate": 0.0} | changes)


@pytest.mark.parametrize("arm", ARMS)
def test_equal_seeds_give_equal_results(tiny_llama, arm):
    results = []
    for seed in (0, 0, 1):
        adapter, _ = initialized(tiny_llama, arm, init=adapter_init(seed=seed))
        fit(adapter, tiny_llama, states_of(tiny_llama), rival_config(seed=seed))
        results.append([parameter.detach().clone() for parameter in adapter.parameters()])
    first, again, other = results
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.parametrize(("family", "arm"), pairwise(["llama", "gpt2"], ARMS))
def test_generation_with_a_cache_is_generation_without(family, arm):
    model = tiny_model(family)
    adapter = perturbed(model, arm, scale=0.4)[0].requires_grad_(False)
    prompts = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
    answers = generate(model, adapter, prompts, max_new_tokens=8)
    assert answers == generate(model, adapter, prompts, max_new_tokens=8, use_cache=False)
    assert answers != generate(model, None, prompts, max_new_tokens=8)


COUNTS = {  # rank 2; two blocks
    "lora": 2 * 2 * ((32 + 32) + (32 + 48)),  # outputs of attention and of the MLP
    "masklora": 2 * 2 * ((32 + 32) + (32 + 48)),
    "ia3": 2 * (16 + 16 + 48),
    "norms": 2 * 2 * 32 + 32,
}


@pytest.mark.parametrize("arm", ARMS)
def test_trained_parameters_are_those_of_the_paper(tiny_llama, arm):
    assert trained_parameters(initialized(tiny_llama, arm)[0]) == COUNTS[arm]


# --- folders


@pytest.mark.parametrize("arm", ARMS)
def test_a_saved_adapter_loads_unchanged(tiny_llama, tmp_path, arm):
    adapter, config = perturbed(tiny_llama, arm, rank=None, targets=["k_proj"])
    loaded, loaded_config = saved_and_loaded(adapter, config, tiny_llama, tmp_path / "adapter")
    assert loaded_config == config
    assert isinstance(loaded, PatchedModules)
    assert loaded.layer == LAYER
    assert torch.equal(logits(tiny_llama, loaded), logits(tiny_llama, adapter))
    states = states_of(tiny_llama)
    scores = [
        evaluate(tiny_llama, states, compiled.compile_for_inference(tiny_llama), batch_size=4)
        for compiled in (loaded, adapter)
    ]
    assert scores[0] == scores[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize(("family", "arm"), pairwise(FAMILIES, [arm for arm in FORMATS if arm in ARMS]))
def test_peft_computes_the_same_with_an_exported_adapter(family, arm, layer, tmp_path):
    model = tiny_model(family)
    adapter, config = perturbed(model, arm, layer=layer)
    write_peft(adapter, config, model, "somewhere", tmp_path)
    stock = network_of(config_of(family), attention="sdpa")
    theirs = PeftModel.from_pretrained(stock, tmp_path)
    with torch.no_grad():
        exported = theirs(input_ids=random_tokens(2, 9)).logits
    assert_close(exported, logits(model, adapter), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(exported, logits(model), atol=1e-2)
    counts = [weight.numel() for name, weight in theirs.named_parameters() if "lora_" in name or "ia3_" in name]
    assert sum(counts) == trained_parameters(adapter)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize(("family", "arm"), pairwise(FAMILIES, ["lora", "ia3"]))
def test_exported_files_are_those_that_peft_writes(family, arm, tmp_path):
    model = tiny_model(family)
    adapter, config = perturbed(model, arm)
    write_peft(adapter, config, model, "somewhere", tmp_path)
    theirs = PeftModel.from_pretrained(network_of(config_of(family), attention="sdpa"), tmp_path)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # asks no hub then
    our_tensors, their_tensors = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs")
    )
    assert our_tensors.keys() == their_tensors.keys()
    assert all(torch.equal(tensor, their_tensors[name]) for name, tensor in our_tensors.items())
    our_settings, their_settings = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "theirs")
    )
    for name, value in our_settings.items():
        assert (sorted(their_settings[name]) if isinstance(value, list) else their_settings[name]) == (
            sorted(value) if isinstance(value, list) else value
        ), name


@pytest.mark.parametrize("arm", ["masklora", "norms"])
def test_export_of_an_arm_that_peft_lacks_raises(tiny_llama, tmp_path, arm):
    with pytest.raises(DataError, match=f"arm {arm}: PEFT has no such adapter, only"):
        write_peft(*initialized(tiny_llama, arm), tiny_llama, "somewhere", tmp_path)


# --- in a recipe


@pytest.mark.parametrize(("arm", "flags"), [("masklora", ("--rank", 2)), ("norms", ())])
def test_a_rival_trains_and_scores_from_the_command_line(stories, tmp_path, arm, flags):
    folder = tmp_path / "adapter"
    common = (stories, "--data", write_data(tmp_path / "data"), "--device", "cpu", "--json")
    flags = (*flags, "--set", "recovery.layer=0", "--output-dir", folder)
    trained = invoke("recover", *common, "--steps", 2, "--arm", arm, *flags)
    assert trained.code == 0, trained.err
    stored = json.loads((folder / "adapter.json").read_text())
    assert (stored["layer"], stored["rank"]) == (0, 2 if arm == "masklora" else None)
    alone, with_adapter = invoke("evaluate", *common), invoke("evaluate", *common, "--adapter", folder)
    assert (with_adapter.code, with_adapter.json["arm"]) == (0, arm), with_adapter.err
    assert alone.json["perplexity"] != with_adapter.json["perplexity"]


def test_only_arms_that_patch_modules_may_begin_at_layer_0(tiny_llama):
    for arm in (*ARMS, "none"):
        assert first_layer(arm, 0, tiny_llama) == 0
        assert first_layer(arm, None, tiny_llama) == first_layer("mop", None, tiny_llama)
    with pytest.raises(UsageError, match="0 is not 1 to 3"):
        first_layer("mop", 0, tiny_llama)
