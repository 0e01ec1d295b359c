"""The closed-form repair as an arm: LoRA's shape, no step."""

import json
from dataclasses import replace

import pytest
import torch
from invoking import invoke, write_data
from test_eora import by_definition
from test_weights import DOCUMENTS, KNOWN, LAYER, START, TASKS, config_for, pruned, states_of
from tiny import tiny_model
from torch.testing import assert_close

from mopcompress.errors import DataError
from mopcompress.models.linears import weight_of
from mopcompress.models.repair import LowRank, attach
from mopcompress.recover import eora
from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.arms import ARMS
from mopcompress.recover.start import Material
from mopcompress.scoring import score_responses

ALL = range(len(DOCUMENTS))


def weights(model):
    return lambda name: weight_of(model.network.get_submodule(name))


def begun(model, dense, **changes):
    config = config_for("eora", **changes)
    return ARMS["eora"].begin(config, Material(model, states_of(model), TASKS, weights(dense)), START)


def inputs_of(model, name):
    """Every token's input of one linear, each document by itself in the whole network."""
    seen = []
    handle = model.network.get_submodule(name).register_forward_pre_hook(
        lambda _linear, given: seen.append(given[0][0])
    )
    with torch.no_grad():
        for document in DOCUMENTS:
            model.network(torch.tensor([document.tokens]))
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("family", KNOWN)
def test_its_factors_are_the_definitions_for_the_inputs_of_the_training_rows(family, monkeypatch):
    monkeypatch.setattr(eora, "ROWS", 4)
    dense, model = tiny_model(family), pruned(family)
    adapter = begun(model, dense)
    for name, change in adapter.by_name().items():
        inputs = inputs_of(model, name)
        weight, compressed = (weight_of(one.network.get_submodule(name)).double() for one in (dense, model))
        expected = by_definition(weight, compressed, inputs.T @ inputs / len(inputs), rank=2)
        shown = inputs @ (change.up.double() @ change.down.double()).T
        assert_close(shown, inputs @ expected.T, rtol=1e-2, atol=1e-3 * float(shown.detach().abs().max()))


def test_at_full_rank_its_linears_are_the_dense_ones():
    dense, model = tiny_model(), pruned()
    targets = ("re:.*q_proj", "re:.*o_proj")
    adapter = begun(model, dense, rank=32, targets=targets)
    for name, change in adapter.by_name().items():
        compressed, whole = (weight_of(one.network.get_submodule(name)) for one in (model, dense))
        assert_close(compressed + change.up @ change.down, whole, rtol=1e-3, atol=1e-4)


def test_where_nothing_is_missing_it_is_none_exactly(tiny_llama):
    adapter, batch = begun(tiny_llama, tiny_llama), states_of(tiny_llama).batch(ALL)
    bare = score_responses(tiny_llama, batch, LAYER).nats
    with torch.no_grad(), adapter.applied(tiny_llama, batch.instructions):
        assert torch.equal(score_responses(tiny_llama, batch, LAYER).nats, bare)


def test_it_stores_no_more_than_mop_trains(tiny_llama):
    config = config_for("eora", rank=None, experts=12, prompts_per_expert=40)
    adapter = ARMS["eora"].build(tiny_llama, config)
    assert trained_parameters(adapter) <= trained_parameters(ARMS["mop"].build(tiny_llama, replace(config, arm="mop")))


def test_a_dense_model_that_is_unknown_or_another_and_a_second_repair_are_refused(tiny_llama):
    config = config_for("eora")
    with pytest.raises(DataError, match="--teacher"):
        ARMS["eora"].begin(config, Material(tiny_llama, states_of(tiny_llama), TASKS), START)
    small = Material(tiny_llama, states_of(tiny_llama), TASKS, lambda _name: torch.zeros(3, 3))
    with pytest.raises(DataError, match=r"in the dense model \(3, 3\)"):
        ARMS["eora"].begin(config, small, START)
    model = pruned()
    name = next(iter(ARMS["eora"].build(model, config).by_name()))
    rows, columns = weight_of(model.network.get_submodule(name)).shape
    attach(model, {name: LowRank(torch.zeros(rows, 1), torch.zeros(1, columns))})
    with pytest.raises(DataError, match="has a low-rank repair already"):
        begun(model, tiny_model())


def test_recover_and_bench_take_no_step_and_sweep_nothing(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    data = write_data(tmp_path / "data")
    run = ["--model", stories, "--data", data]
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
        "--dense-arms",
        "eora",
    ]
    short = ["--steps", 1, "--sweep", "--sweep-steps", 1, "--seeds", "0", "--prompts-per-expert", 20]
    outcome = invoke("bench", *run, *flags, *short, "--output-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    found = {(row["method"], row["arm"]): row for row in rows}
    assert found["sparsegpt", "eora"]["train_steps"] == 0
    assert found["sparsegpt", "eora"]["perplexity"] != found["sparsegpt", "none"]["perplexity"]
    assert found["dense", "eora"]["perplexity"] == found["dense", "none"]["perplexity"]
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["sweeps"]) == ["sparsegpt-50-single"]
    pruned_folder = tmp_path / "run" / "models" / "sparsegpt-50"
    again = ["--arm", "eora", "--sweep", "--prompts-per-expert", 20, "--output-dir", tmp_path / "adapter", "--json"]
    outcome = invoke("recover", pruned_folder, "--data", data, *again)
    assert outcome.code == 0, outcome.err
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert (manifest["train_steps"], manifest["learning_rate"], manifest["sweep"]) == (0, None, None)
    outcome = invoke("recover", stories, "--data", data, "--arm", "eora", "--output-dir", tmp_path / "none")
    assert outcome.code == 66
    assert "--teacher" in outcome.err
