"""EoRA as an arm: LoRA's factors in closed form, without a step."""

import json
from dataclasses import replace

import pytest
import torch
from cli_runner import invoke, set_fields, write_data
from factories import TASKS, adapter_config, adapter_init, pruned_model, response_nll, slow_except_llama
from peft import PeftModel
from reference import eora_slowly
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    HIDDEN,
    config_of,
    hooks,
    network_of,
    random_documents,
    random_tokens,
    saved,
    tiny_model,
)
from torch.testing import assert_close

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError, NumericalError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.models.dense_weights import open_dense_weights
from mopcompress.models.model_loading import load_model
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.models.repair import attach_repairs, write_repairs
from mopcompress.recover.adapter import AdapterInputs, trained_parameters
from mopcompress.recover.methods import eora
from mopcompress.recover.peft_export import write_peft
from mopcompress.recover.registry import RECOVERY_METHODS

CPU = torch.device("cpu")
LAYER = 2
DOCUMENTS = random_documents(6)
EORA_FAMILIES = slow_except_llama(("llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox", "opt"))


def eora_config(model, **changes):
    return adapter_config("eora", model, **{"layer": LAYER, "rank": 2, "tasks": []} | changes)


def states_of(model, documents=DOCUMENTS):
    return HiddenStateDataset(model, documents, LAYER, batch_size=4)


def weights_of(model):
    return lambda name: weight_of(model.network.get_submodule(name))


def initialized(model, dense, **changes):
    inputs = AdapterInputs(model, states_of(model), TASKS, weights_of(dense))
    return eora.initialize(eora_config(model, **changes), inputs, adapter_init())


def inputs_of(model, name, documents=DOCUMENTS):
    """Return every token's input of a linear, each document by itself in the whole network."""
    recorded = []
    handle = model.network.get_submodule(name).register_forward_pre_hook(
        lambda _linear, inputs: recorded.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        for document in documents:
            model.network(torch.tensor([document.tokens]))
    handle.remove()
    return torch.cat(recorded).double()


@pytest.mark.parametrize("family", EORA_FAMILIES)
def test_factors_are_the_definitions_on_the_training_rows(family):
    dense, model = tiny_model(family), pruned_model(family)
    adapter = initialized(model, dense)
    for name, patch in adapter.patches_by_name().items():
        inputs = inputs_of(model, name)
        weight, compressed = (weight_of(source.network.get_submodule(name)).double() for source in (dense, model))
        expected = eora_slowly(weight, compressed, inputs.T @ inputs / len(inputs), rank=2)
        outputs = inputs @ (patch.up.double() @ patch.down.double()).T
        assert_close(outputs, inputs @ expected.T, rtol=1e-2, atol=1e-3 * float(outputs.detach().abs().max()))


def test_at_full_rank_its_linears_are_the_dense_ones():
    dense, model = tiny_model(), pruned_model()
    targets = ("re:.*q_proj", "re:.*o_proj")
    adapter = initialized(model, dense, rank=32, targets=targets)
    for name, patch in adapter.patches_by_name().items():
        compressed, dense_weight = (weight_of(source.network.get_submodule(name)) for source in (model, dense))
        assert_close(compressed + patch.up @ patch.down, dense_weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 30, 2048])
def test_every_token_of_every_row_counts_once(tiny_llama, monkeypatch, tokens):
    monkeypatch.setattr(eora, "_TOKENS", tokens)
    documents, name = random_documents(40), "model.layers.3.mlp.down_proj"
    linears = {name: tiny_llama.network.get_submodule(name)}
    with torch.no_grad():
        grams = eora.input_grams(tiny_llama, states_of(tiny_llama, documents=documents), linears)
    inputs = inputs_of(tiny_llama, name, documents)
    assert_close(grams[name].double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EORA_FAMILIES)
def test_for_dense_weights_it_is_zero_and_runs_no_row(family, monkeypatch):
    model = tiny_model(family)
    with monkeypatch.context() as patch:
        patch.setattr(model, "require_separable", lambda layer: None)
        patch.setattr(model, "run_upper", None)
        adapter = initialized(model, tiny_model(family))
    states = states_of(model)
    bare = response_nll(model, states)
    with torch.no_grad():
        assert torch.equal(response_nll(model, states, adapter), bare)
        assert torch.equal(response_nll(model, states, adapter, compiled=True), bare)


def test_only_compressed_linears_are_repaired_and_no_hook_stays():
    dense, model = tiny_model(), pruned_model()
    name = f"model.layers.{LAYER}.self_attn.o_proj"
    set_weight(model.network.get_submodule(name), weights_of(dense)(name), None)
    first, again = (initialized(model, dense) for _ in range(2))
    changed = {linear: bool(patch.up.any()) for linear, patch in first.patches_by_name().items()}
    assert not changed.pop(name)
    assert all(changed.values())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))
    assert hooks(model.network) == 0


def test_the_output_of_a_repair_is_not_repaired_again():
    dense, model = tiny_model(), pruned_model()
    name = "model.layers.3.self_attn.o_proj"
    lost = (weights_of(dense)(name) - weights_of(model)(name)).detach()
    attach_repairs(model, {name: LowRankFactors(lost, torch.eye(HIDDEN))})
    patches = initialized(model, dense).patches_by_name()
    updates = {linear: patch.up @ patch.down for linear, patch in patches.items()}
    assert updates.pop(name).abs().max() < 1e-5
    assert all(update.abs().max() > 1e-2 for update in updates.values())


def test_it_stores_no_more_than_mop_trains(tiny_llama):
    config = eora_config(tiny_llama, rank=None, experts=12, prompts_per_expert=40)
    adapter = RECOVERY_METHODS["eora"].build(tiny_llama, config)
    assert trained_parameters(adapter) <= trained_parameters(
        RECOVERY_METHODS["mop"].build(tiny_llama, replace(config, arm="mop"))
    )


def test_an_unknown_or_other_dense_model_raises(tiny_llama, tmp_path):
    config, states = eora_config(tiny_llama), states_of(tiny_llama)
    with pytest.raises(UsageError, match=r"recovery\.teacher"):
        eora.initialize(config, AdapterInputs(tiny_llama, states, TASKS), adapter_init())
    other, shallow = tiny_model(num_attention_heads=2), tiny_model(num_hidden_layers=3)
    for model, message in (
        (other, r"o_proj is 32 x 32, and 32 x 16 in the dense model, .* recovery.teacher"),
        (shallow, r"has no linear model\.layers\.3\..* recovery.teacher"),
    ):
        folder = saved(model, tmp_path / str(len(model.blocks)))
        dense = open_dense_weights(folder, tiny_llama.tokenizer, device=CPU)
        with pytest.raises(DataError, match=message):
            eora.initialize(config, AdapterInputs(tiny_llama, states, TASKS, dense), adapter_init())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_folder_are_those_of_the_loaded_model(family, tmp_path):
    folder = saved(tiny_model(family), tmp_path / "dense", torch.float16)
    whole = load_model(folder, device=CPU)
    weight = open_dense_weights(folder, whole.tokenizer, device=CPU)
    names = list(
        RECOVERY_METHODS["eora"].build(whole, eora_config(whole, layer=0, targets=["Linear"], rank=1)).patches_by_name()
    )
    pairs = [(weight(name), weights_of(whole)(name)) for name in [*names, names[0]]]  # back to an earlier block
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_repair_in_the_folder_is_part_of_its_weights(tmp_path):
    folder, name = saved(tiny_model(), tmp_path / "dense"), "model.layers.1.self_attn.q_proj"
    repair = LowRankFactors(torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN))
    write_repairs(folder / "repair.safetensors", {name: repair})
    weight, other = open_dense_weights(folder, tiny_model().tokenizer, device=CPU), "model.layers.2.self_attn.q_proj"
    assert_close(weight(name), weights_of(tiny_model())(name) + repair.up @ repair.down)
    assert torch.equal(weight(other), weights_of(tiny_model())(other))


def test_an_error_of_an_infinite_input_names_the_linear(tiny_llama):
    states, name = states_of(tiny_llama), "model.layers.2.self_attn.q_proj"
    linear = tiny_llama.network.get_submodule(name)

    def overflow(_linear, inputs):
        return (inputs[0] * float("inf"),)

    handle = linear.register_forward_pre_hook(overflow)
    try:
        with pytest.raises(NumericalError, match=rf"^{name}, on the training rows: .* not finite"):
            eora.input_grams(tiny_llama, states, {name: linear})
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_peft_computes_the_same_with_an_exported_adapter(tmp_path):
    model, dense = tiny_model(), tiny_model(seed=1)
    adapter = initialized(model, dense)
    write_peft(adapter, eora_config(model), model, "somewhere", tmp_path)
    theirs = PeftModel.from_pretrained(network_of(config_of("llama"), attention="sdpa"), tmp_path)
    tokens, instructions = random_tokens(2, 9), states_of(model).batch([0, 1]).instructions
    with torch.no_grad():
        exported, bare = theirs(input_ids=tokens).logits, model.network(input_ids=tokens).logits
        with adapter.active(model, instructions):
            assert_close(exported, model.network(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(exported, bare, atol=1e-2)


def test_recover_and_bench_take_no_step_and_sweep_nothing(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data = write_data(tmp_path / "data")
    run = [stories, "--data", data]
    flags = [
        "--num-calibration-samples",
        2,
        "--max-seq-length",
        32,
        "--calibration",
        "data",
        "--ratios",
        "0.5",
        "--arms",
        "none,eora,single",
        "--set",
        "run.dense_arms=[eora]",
    ]
    short = ["--steps", 1, "--sweep", "--seeds", "0", *set_fields("recovery", sweep_steps=1, prompts_per_expert=20)]
    outcome = invoke("bench", *run, *flags, *short, "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    by_arm = {(row["method"], row["arm"]): row for row in rows}
    assert by_arm["sparsegpt", "eora"]["train_steps"] == 0
    assert by_arm["sparsegpt", "eora"]["perplexity"] != by_arm["sparsegpt", "none"]["perplexity"]
    assert by_arm["dense", "eora"]["perplexity"] == by_arm["dense", "none"]["perplexity"]
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["sweeps"]) == ["sparsegpt-50-single"]
    protocol = json.loads((tmp_path / "run" / "run.json").read_text())["protocol"]
    assert [line for line in protocol if line.startswith("eora is computed from the dense model's weights")]
    pruned_folder = tmp_path / "run" / "models" / "sparsegpt-50"
    again = [
        "--arm",
        "eora",
        *set_fields("recovery", prompts_per_expert=20),
        "--output-dir",
        tmp_path / "adapter",
        "--json",
    ]
    refused = invoke("recover", pruned_folder, "--data", data, *again, "--distill", 1)
    assert (refused.code, refused.errors[0].split(",")[0]) == (2, "error: --distill: has no effect on eora")
    assert invoke("recover", pruned_folder, "--data", data, *again, "--dry-run").json["steps"] == 0
    assert invoke("bench", "--arms", "none,eora", "--ratios", 0.5, "--dry-run", "--json").json["steps"] == 0
    (tmp_path / "taught.yaml").write_text("r_stage: {r_modifiers: {PromptRecoveryModifier: {distill: 1.0}}}")
    outcome = invoke("recover", pruned_folder, "--data", data, *again, "--recipe", tmp_path / "taught.yaml")
    assert outcome.code == 0, outcome.err
    assert "teacher" not in outcome.err  # a recipe for all arms may have one: nothing to learn from it here
    assert "closed form" in outcome.err
    stored = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert all(factor.any() for factor in stored.values())  # of the model that was pruned, not of what it became
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert (manifest["train_steps"], manifest["learning_rate"], manifest["sweep"]) == (0, None, None)
    outcome = invoke("recover", stories, "--data", data, "--arm", "eora", "--output-dir", tmp_path / "none")
    assert outcome.code == 66
    assert "recovery.teacher" in outcome.err
