"""The closed-form repair as an arm: LoRA's shape, no step."""

import json
from dataclasses import replace

import pytest
import torch
from cli_runner import invoke, set_fields, write_data
from peft import PeftModel
from recover.methods.test_module_patches import (
    DOCUMENTS,
    KNOWN,
    LAYER,
    START,
    TASKS,
    config_for,
    logits,
    pruned,
    states_of,
)
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
from mopcompress.evaluation.loss import score_responses
from mopcompress.models.dense_weights import open_dense_weights
from mopcompress.models.model_loading import load_model
from mopcompress.models.modules import set_weight, weight_of
from mopcompress.models.repair import attach_repairs, write_repairs
from mopcompress.recover.adapter import AdapterInputs, trained_parameters
from mopcompress.recover.methods import eora
from mopcompress.recover.peft_export import write_peft
from mopcompress.recover.registry import RECOVERY_METHODS

CPU = torch.device("cpu")
ALL = range(len(DOCUMENTS))


def weights(model):
    return lambda name: weight_of(model.network.get_submodule(name))


def begun(model, dense, **changes):
    config = config_for("eora", **changes)
    return RECOVERY_METHODS["eora"].initialize(config, AdapterInputs(model, states_of(model), TASKS, weights(dense)), START)


def inputs_of(model, name, documents=DOCUMENTS):
    """Every token's input of one linear, each document by itself in the whole network."""
    seen = []
    handle = model.network.get_submodule(name).register_forward_pre_hook(
        lambda _linear, given: seen.append(given[0].flatten(0, -2))
    )
    with torch.no_grad():
        for document in documents:
            model.network(torch.tensor([document.tokens]))
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("family", KNOWN)
def test_its_factors_are_the_definitions_for_the_inputs_of_the_training_rows(family):
    dense, model = tiny_model(family), pruned(family)
    adapter = begun(model, dense)
    for name, change in adapter.patches_by_name().items():
        inputs = inputs_of(model, name)
        weight, compressed = (weight_of(one.network.get_submodule(name)).double() for one in (dense, model))
        expected = eora_slowly(weight, compressed, inputs.T @ inputs / len(inputs), rank=2)
        shown = inputs @ (change.up.double() @ change.down.double()).T
        assert_close(shown, inputs @ expected.T, rtol=1e-2, atol=1e-3 * float(shown.detach().abs().max()))


def test_at_full_rank_its_linears_are_the_dense_ones():
    dense, model = tiny_model(), pruned()
    targets = ("re:.*q_proj", "re:.*o_proj")
    adapter = begun(model, dense, rank=32, targets=targets)
    for name, change in adapter.patches_by_name().items():
        compressed, whole = (weight_of(one.network.get_submodule(name)) for one in (model, dense))
        assert_close(compressed + change.up @ change.down, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 30, 2048])
def test_every_token_of_every_row_counts_once_in_however_many_batches(tiny_llama, monkeypatch, tokens):
    monkeypatch.setattr(eora, "_TOKENS", tokens)
    documents, name = random_documents(40), "model.layers.3.mlp.down_proj"
    linears = {name: tiny_llama.network.get_submodule(name)}
    with torch.no_grad():
        found = eora.input_grams(tiny_llama, states_of(tiny_llama, documents=documents), linears)
    inputs = inputs_of(tiny_llama, name, documents)
    assert_close(found[name].double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", KNOWN)
def test_where_nothing_is_missing_it_is_none_exactly_and_no_row_is_looked_at(family, monkeypatch):
    model = tiny_model(family)
    with monkeypatch.context() as patch:
        patch.setattr(model, "require_separable", lambda layer: None)
        patch.setattr(model, "run_upper", None)
        adapter = begun(model, tiny_model(family))
    batch = states_of(model).batch(ALL)
    bare = score_responses(model, batch, LAYER).nll
    for acting in (adapter.active(model, batch.instructions), adapter.compile_for_inference(model)(batch.instructions)):
        with torch.no_grad(), acting:
            assert torch.equal(score_responses(model, batch, LAYER).nll, bare)


def test_only_linears_that_were_changed_are_repaired_and_nothing_is_left_on_the_network():
    dense, model = tiny_model(), pruned()
    name = f"model.layers.{LAYER}.self_attn.o_proj"
    set_weight(model.network.get_submodule(name), weights(dense)(name), None)
    first, again = (begun(model, dense) for _ in range(2))
    changed = {one: bool(change.up.any()) for one, change in first.patches_by_name().items()}
    assert not changed.pop(name)
    assert all(changed.values())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))
    assert hooks(model.network) == 0


def test_what_a_repair_beside_the_weight_gives_already_is_not_given_again():
    dense, model = tiny_model(), pruned()
    name = "model.layers.3.self_attn.o_proj"
    lost = (weights(dense)(name) - weights(model)(name)).detach()
    attach_repairs(model, {name: LowRankFactors(lost, torch.eye(HIDDEN))})
    found = {one: change.up @ change.down for one, change in begun(model, dense).patches_by_name().items()}
    assert found.pop(name).abs().max() < 1e-5
    assert all(product.abs().max() > 1e-2 for product in found.values())


def test_it_stores_no_more_than_mop_trains(tiny_llama):
    config = config_for("eora", rank=None, experts=12, prompts_per_expert=40)
    adapter = RECOVERY_METHODS["eora"].build(tiny_llama, config)
    assert trained_parameters(adapter) <= trained_parameters(
        RECOVERY_METHODS["mop"].build(tiny_llama, replace(config, arm="mop"))
    )


def test_a_dense_model_that_is_unknown_or_another_is_refused(tiny_llama, tmp_path):
    config, states = config_for("eora"), states_of(tiny_llama)
    with pytest.raises(UsageError, match=r"recovery\.teacher"):
        RECOVERY_METHODS["eora"].initialize(config, AdapterInputs(tiny_llama, states, TASKS), START)
    other, shallow = tiny_model(num_attention_heads=2), tiny_model(num_hidden_layers=3)
    for model, message in (
        (other, r"o_proj is 32 x 32, and 32 x 16 in the dense model: .* --teacher"),
        (shallow, r"has no linear model\.layers\.3\..* --teacher"),
    ):
        folder = saved(model, tmp_path / str(len(model.blocks)))
        dense = open_dense_weights(folder, tiny_llama.tokenizer, device=CPU)
        with pytest.raises(DataError, match=message):
            RECOVERY_METHODS["eora"].initialize(config, AdapterInputs(tiny_llama, states, TASKS, dense), START)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_folder_are_those_of_the_loaded_model(family, tmp_path):
    folder = saved(tiny_model(family), tmp_path / "dense", torch.float16)
    whole = load_model(folder, device=CPU)
    weight = open_dense_weights(folder, whole.tokenizer, device=CPU)
    names = list(
        RECOVERY_METHODS["eora"].build(whole, config_for("eora", layer=0, targets=["Linear"], rank=1)).patches_by_name()
    )
    found = [(weight(name), weights(whole)(name)) for name in [*names, names[0]]]  # back to a block that was left
    assert all(torch.equal(*pair) for pair in found)


def test_a_repair_in_the_folder_is_part_of_its_weights(tmp_path):
    folder, name = saved(tiny_model(), tmp_path / "dense"), "model.layers.1.self_attn.q_proj"
    repair = LowRankFactors(torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN))
    write_repairs(folder / "repair.safetensors", {name: repair})
    weight, other = open_dense_weights(folder, tiny_model().tokenizer, device=CPU), "model.layers.2.self_attn.q_proj"
    assert_close(weight(name), weights(tiny_model())(name) + repair.up @ repair.down)
    assert torch.equal(weight(other), weights(tiny_model())(other))


def test_an_input_that_is_not_finite_is_told_by_its_linear(tiny_llama):
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
def test_peft_reads_the_very_same_adapter(tmp_path):
    model, dense = tiny_model(), tiny_model(seed=1)
    adapter = begun(model, dense)
    write_peft(adapter, config_for("eora"), model, "somewhere", tmp_path)
    theirs = PeftModel.from_pretrained(network_of(config_of("llama"), attention="sdpa"), tmp_path)
    with torch.no_grad():
        found = theirs(input_ids=random_tokens(2, 9)).logits
    assert_close(found, logits(model, adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(model), atol=1e-2)


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
    found = {(row["method"], row["arm"]): row for row in rows}
    assert found["sparsegpt", "eora"]["train_steps"] == 0
    assert found["sparsegpt", "eora"]["perplexity"] != found["sparsegpt", "none"]["perplexity"]
    assert found["dense", "eora"]["perplexity"] == found["dense", "none"]["perplexity"]
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["sweeps"]) == ["sparsegpt-50-single"]
    protocol = json.loads((tmp_path / "run" / "run.json").read_text())["protocol"]
    assert [line for line in protocol if line.startswith("eora is computed from the dense model's weights")]
    pruned_folder = tmp_path / "run" / "models" / "sparsegpt-50"
    again = ["--arm", "eora", *set_fields("recovery", prompts_per_expert=20), "--output-dir", tmp_path / "adapter", "--json"]
    refused = invoke("recover", pruned_folder, "--data", data, *again, "--distill", 1)
    assert (refused.code, refused.errors[0].split(",")[0]) == (2, "error: --distill: says nothing to eora")
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
