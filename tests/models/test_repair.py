"""A low-rank repair in a folder: stored next to the weights, and computed when mopcompress loads the folder."""

import json

import pytest
import torch
from cli_runner import invoke
from compression_cases import CALIBRATION_TOKENS
from resumable_runs import CALIBRATION, PRUNE, ROUND, KilledError, folder_contents, stop_at
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.compress.checkpoint import CompressionCheckpoint
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.export import export
from mopcompress.entrypoints.verify import verify
from mopcompress.errors import DataError, RecipeError, UsageError
from mopcompress.models.model_loading import load_model, weights_bytes, weights_hash
from mopcompress.models.packed_linears import use_sparse_linears
from mopcompress.models.repair import read_repairs, repair_of
from mopcompress.progress import silent
from mopcompress.recipe import GPTQModifier, LowRankRepairModifier, StructuredPruningModifier, load_recipe
from mopcompress.recipe.overrides import pruning_recipe, quantization_recipe
from mopcompress.storage import artifacts

CPU = torch.device("cpu")
REPAIR = "repair.safetensors"


def recipe_of(rank=None, **run):
    return pruning_recipe(load_recipe(None, {"device": "cpu", "model": "unused"} | run), repair_rank=rank)


def run(source, target, recipe, modifiers=(PRUNE, ROUND)):
    return compress_into(target, source, list(modifiers), CALIBRATION, recipe, progress=silent)


def logits(folder):
    with torch.no_grad():
        return load_model(folder, device=CPU).network(input_ids=CALIBRATION_TOKENS).logits


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def source(request, tmp_path_factory):
    return saved(tiny_model(request.param), tmp_path_factory.mktemp(request.param) / "dense", torch.float16)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(dense, compressed, compressed with a repair)."""
    folder = tmp_path_factory.mktemp("made")
    run(source, folder / "plain", recipe_of())
    run(source, folder / "repaired", recipe_of(4))
    return source, folder / "plain", folder / "repaired"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    source = saved(tiny_model(), folder / "dense", torch.float16)
    run(source, folder / "repaired", recipe_of(4))
    return source, folder / "repaired"


def test_the_loaded_model_is_closer_to_the_dense_one(made):
    dense, plain, repaired = map(logits, made)
    assert float((repaired - dense).square().mean()) < 0.75 * float((plain - dense).square().mean())


def test_a_loaded_model_computes_weights_plus_product(made):
    """Compare with the definition: a dense model whose weights are W_c + B A."""
    _, _, folder = made
    model = load_model(folder, device=CPU)
    expected, repairs = tiny_model(model.network.config.model_type), load_file(folder / REPAIR)
    expected.network.load_state_dict(model.network.state_dict())
    for name in {name[:-2] for name in repairs}:
        change = repairs[f"{name}.B"].float() @ repairs[f"{name}.A"].float()
        stem, _, part = name.rpartition(".")
        if "experts" in stem:
            stack, _, number = stem.rpartition(".")
            module = expected.network.get_submodule(stack)
            inner = module.gate_up_proj.shape[1] // 2
            weight = {
                "gate_proj": module.gate_up_proj.data[int(number), :inner],
                "up_proj": module.gate_up_proj.data[int(number), inner:],
                "down_proj": module.down_proj.data[int(number)],
            }[part]
        else:
            weight = expected.network.get_submodule(name).weight.data
        weight += change.T if model.network.config.model_type == "gpt2" else change
    with torch.no_grad():
        torch.testing.assert_close(
            model.network(input_ids=CALIBRATION_TOKENS).logits,
            expected.network(input_ids=CALIBRATION_TOKENS).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_later_layers_were_calibrated_on_what_is_loaded(made, monkeypatch):
    """The last hidden states of the job are those of the loaded model."""
    source, _, folder = made
    outputs = []
    save_block = CompressionCheckpoint.save_block

    def record_outputs(self, index, block, *rest):
        outputs.append(block.outputs.compressed)
        return save_block(self, index, block, *rest)

    monkeypatch.setattr(CompressionCheckpoint, "save_block", record_outputs)
    run(source, folder.parent / "again", recipe_of(4))
    model = load_model(folder.parent / "again", device=CPU)
    with torch.no_grad():
        hidden = model.run_upper(model.run_lower(CALIBRATION_TOKENS, 0), 0)
    torch.testing.assert_close(hidden, outputs[-1].clone(), rtol=1e-4, atol=1e-4)


def test_stock_transformers_loads_it_without_the_repair(made):
    _, _, folder = made
    network, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    weights = load_model(folder, device=CPU).network.state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight.float(), weights[name]), name


def test_the_manifest_counts_parameters_and_bytes(made):
    _, plain, folder = made
    stored = load_file(folder / REPAIR)
    rows = [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]
    compressed = [row for row in rows if row["methods"]]
    facts = artifacts.read_manifest(folder)
    numbers = sum(tensor.numel() for tensor in stored.values())
    size = (folder / REPAIR).stat().st_size
    assert facts["repair"] == {"rank": 4, "linears": len(stored) // 2, "parameters": numbers, "bytes": size}
    assert len(compressed) == len(stored) // 2
    assert sum(row["repair_parameters"] for row in rows) == numbers
    assert all(
        row["repair_parameters"] == sum(stored[f"{row['name']}.{x}"].numel() for x in "AB") for row in compressed
    )
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert facts["method"] == "sparsegpt+gptq+eora"
    assert facts["model_bytes"] == artifacts.read_manifest(plain)["model_bytes"] + size == weights_bytes(folder)
    assert facts["sha256"] == weights_hash(folder)
    assert artifacts.read_manifest(plain)["repair"] is None


def test_a_hash_is_of_weights_and_repair(llama, tmp_path):
    _, folder = llama
    for path in folder.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert weights_hash(tmp_path) == weights_hash(folder)
    repairs = load_file(tmp_path / REPAIR)
    save_file({name: 2 * tensor for name, tensor in repairs.items()}, tmp_path / REPAIR)
    changed = weights_hash(tmp_path)
    (tmp_path / REPAIR).unlink()
    assert len({weights_hash(folder), changed, weights_hash(tmp_path)}) == 3


@pytest.mark.parametrize(("what", "count"), [("_save_atomically", 3), ("_save_atomically", 4), ("overwrite", 14)])
def test_a_stopped_run_resumes_to_the_same_bytes(what, count, llama, tmp_path, monkeypatch):
    source, whole = llama
    with monkeypatch.context() as patch:
        stop_at(patch, what, count)
        with pytest.raises(KilledError):
            run(source, tmp_path / "out", recipe_of(4))
    assert len(list(artifacts.job_folder(tmp_path / "out").glob("block-*.json"))) == 1
    run(source, tmp_path / "out", recipe_of(4))
    assert folder_contents(tmp_path / "out") == folder_contents(whole)
    assert "repair.safetensors" in folder_contents(whole)[2]


def test_a_damaged_repair_in_a_checkpoint_is_made_again(llama, tmp_path, monkeypatch):
    source, whole = llama
    with monkeypatch.context() as patch:
        stop_at(patch, "_save_atomically", 5)
        with pytest.raises(KilledError):
            run(source, tmp_path / "out", recipe_of(4))
    path = artifacts.job_folder(tmp_path / "out") / "beside-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))
    run(source, tmp_path / "out", recipe_of(4))
    assert folder_contents(tmp_path / "out") == folder_contents(whole)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith("0.mlp.up_proj.A")},
        lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()},
        lambda tensors: {name: tensor[:, :3] for name, tensor in tensors.items()},
        lambda tensors: {f"model.nowhere.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {name: tensor[:5] if name.endswith("B") else tensor for name, tensor in tensors.items()},
    ],
)
def test_a_damaged_repair_is_a_data_error(spoil, llama, tmp_path):
    _, folder = llama
    for path in folder.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = {name: tensor.contiguous() for name, tensor in spoil(load_file(folder / REPAIR)).items()}
    save_file(changed, tmp_path / REPAIR)
    with pytest.raises(DataError, match="repair"):
        load_model(tmp_path, device=CPU)


# --- requests that are rejected before any work


def test_a_rank_above_the_size_of_a_linear_is_an_error(llama, tmp_path):
    source, _ = llama
    with pytest.raises(RecipeError, match=r"rank 17 is more than the 16 of model\.layers\.0\.self_attn\.k_proj"):
        run(source, tmp_path / "out", recipe_of(17))
    assert not list(tmp_path.iterdir())
    outcome = invoke("prune", source, "--repair-rank", 17, "--output-dir", tmp_path / "out", "--dry-run")
    assert (outcome.code, len(outcome.errors)) == (78, 1), outcome.err


def test_a_repaired_folder_is_not_compressed_again(llama, tmp_path):
    _, folder = llama
    with pytest.raises(DataError, match="has a low-rank repair"):
        run(folder, tmp_path / "out", recipe_of())
    for command in ("prune", "quantize"):
        outcome = invoke(command, folder, "--output-dir", tmp_path / "out", "--dry-run")
        assert len(outcome.errors) == 1, outcome.err
        assert "has a low-rank repair" in outcome.errors[0]


def test_methods_without_a_repair_are_an_error(llama, tmp_path):
    base = load_recipe(None, {"device": "cpu", "model": "unused"})
    with pytest.raises(UsageError, match="structured refits what it keeps"):
        pruning_recipe(base, method="structured", repair_rank=4)
    with pytest.raises(UsageError, match="llmcompressor makes no repair"):
        recipe_of(4, backend="llmcompressor")
    with pytest.raises(UsageError, match="--repair-rank"):
        recipe_of(0)
    with pytest.raises(RecipeError, match="structured pruning makes no repair"):
        run(llama[0], tmp_path / "out", recipe_of(4), [StructuredPruningModifier(mlp_sparsity=0.25)])


# --- the recipe

ORDER = """
a_stage:
  a_modifiers:
    {first}
    {second}
"""
SPARSE, LOW_RANK = "SparseGPTModifier: {sparsity: 0.5}", "LowRankRepairModifier: {rank: 3}"


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_a_flag_overrides_the_rank_of_a_recipe(tmp_path):
    recipe = read(tmp_path, ORDER.format(first=SPARSE, second=LOW_RANK))
    assert pruning_recipe(recipe).repair == LowRankRepairModifier(rank=3)
    assert pruning_recipe(recipe, repair_rank=5).repair == LowRankRepairModifier(rank=5)
    assert recipe_of().repair is None


def test_a_repair_belongs_to_all_stages_of_a_recipe(tmp_path):
    rounding = "  b_modifiers:\n    GPTQModifier: {scheme: W4A16}\n    LowRankRepairModifier: {rank: 3}\n"
    recipe = read(tmp_path, ORDER.format(first=SPARSE, second="") + rounding)
    assert pruning_recipe(recipe).repair is None
    assert quantization_recipe(recipe).repair == LowRankRepairModifier(rank=3)
    assert [
        type(modifier) for modifier in quantization_recipe(recipe).modifiers(GPTQModifier, LowRankRepairModifier)
    ] == [
        GPTQModifier,
        LowRankRepairModifier,
    ]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (LOW_RANK, SPARSE, "there is none; put it last"),
        (LOW_RANK, SPARSE, "has repaired; put it before that"),
        ("StructuredPruningModifier: {mlp_sparsity: 0.5}", LOW_RANK, "makes a smaller model"),
        (SPARSE, "LowRankRepairModifier: {}", "rank"),
    ],
)
def test_a_repair_out_of_place_is_a_fault(first, second, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, ORDER.format(first=first, second=second))


def test_a_recipe_has_one_repair(tmp_path):
    second = "b_stage:\n  b_modifiers:\n    LowRankRepairModifier: {rank: 2}\n"
    with pytest.raises(RecipeError, match="a linear has one repair"):
        read(tmp_path, ORDER.format(first=SPARSE, second=LOW_RANK) + second)


# --- uses of the folder


def test_a_round_trip_of_exports_preserves_the_repair(llama, tmp_path):
    _, folder = llama
    for format in ("sparse", "compressed-tensors", "dense"):
        export(str(folder), format, tmp_path / format)
        assert (tmp_path / format / REPAIR).read_bytes() == (folder / REPAIR).read_bytes()
        assert artifacts.read_manifest(tmp_path / format)["repair"]["linears"] == 7 * BLOCKS
    export(str(tmp_path / "sparse"), "dense", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(folder))


def test_verify_counts_the_tensors_of_the_repair(llama):
    _, folder = llama
    assert verify(folder)["tensors"] == len(load_file(folder / "model.safetensors")) + 2 * len(read_repairs(folder))


def test_sparse_linears_retain_the_repair(llama):
    _, folder = llama
    model = load_model(folder, device=CPU)
    with torch.no_grad():
        before = model.network(input_ids=CALIBRATION_TOKENS).logits
        assert use_sparse_linears(model.network, sparsity=0.5) >= 7
        torch.testing.assert_close(model.network(input_ids=CALIBRATION_TOKENS).logits, before, rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_the_repair(llama):
    _, folder = llama
    model = load_model(folder, device=CPU)
    prompt = torch.randn(1, 3, model.hidden_size, requires_grad=True)
    model.run_upper(prompt, 2).square().sum().backward()
    linear = model.blocks[3].mlp.down_proj
    assert repair_of(linear) is not None
    assert not any(buffer.requires_grad for buffer in repair_of(linear).buffers())
    assert float(prompt.grad.abs().sum()) > 0
