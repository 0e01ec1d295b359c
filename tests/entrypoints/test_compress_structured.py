"""Structured pruning, from the recipe and the command line to a folder of a smaller model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_runner import CALIBRATED, invoke, left_behind, set_fields, write_data
from safetensors.torch import load_file
from tiny_models import saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.compress.structured import prune_structured
from mopcompress.entrypoints.compress import compress
from mopcompress.entrypoints.from_recipe import structured_config
from mopcompress.entrypoints.inputs import load_calibration
from mopcompress.errors import QualityGateError, RecipeError
from mopcompress.models.model_loading import load_model, weights_bytes
from mopcompress.progress import silent
from mopcompress.recipe import StructuredPruningModifier, load_recipe
from mopcompress.recipe.overrides import pruning_recipe
from mopcompress.results import read_rows
from mopcompress.storage import artifacts

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"
BOTH = ("--method", "structured", "--sparsity", 0.25, "--set", "pruning.head_sparsity=0.5")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pruned(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "pruned"
    outcome = invoke("prune", stories, *BOTH, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    return target


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


# --- the folder


@torch.no_grad()
def test_stock_transformers_computes_the_same_logits(stories: Path, pruned: Path) -> None:
    run = load_recipe(None, {"model": str(stories), "num_calibration_samples": "4", "max_seq_length": "32"}).run
    tokens = load_calibration(run, stories, artifacts.read_manifest(pruned)["base"]["sha256"], silent).tokens
    model = load_model(stories, device=CPU)
    prune_structured(model, tokens, structured_config(StructuredPruningModifier(mlp_sparsity=0.25, head_sparsity=0.5)))
    stock = AutoModelForCausalLM.from_pretrained(pruned)
    assert torch.equal(stock(input_ids=tokens).logits, model.network(input_ids=tokens).logits)


def test_only_sizes_in_the_configuration_change(stories: Path, pruned: Path) -> None:
    before, after = config_of(stories), config_of(pruned)
    sizes = {"intermediate_size": 129, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    assert after == before | sizes
    assert before["intermediate_size"] == 172
    ours = {"config.json", "model.safetensors", "layers.jsonl", "manifest.json"}
    others = {path.name for path in stories.iterdir()} - ours
    assert others == {path.name for path in pruned.iterdir()} - ours
    assert {"tokenizer.json", "tokenizer_config.json"} <= others
    for name in others:
        assert (pruned / name).read_bytes() == (stories / name).read_bytes()


def test_the_manifest_counts_what_was_removed(stories: Path, pruned: Path) -> None:
    manifest = artifacts.read_manifest(pruned)
    assert manifest is not None
    artifacts.verify(pruned)
    dense, smaller = (load_file(folder / "model.safetensors") for folder in (stories, pruned))
    linears = [name for name in smaller if "_proj" in name]
    before = sum(dense[name].numel() for name in linears)
    removed = before - sum(smaller[name].numel() for name in linears)
    assert (manifest["method"], manifest["weights"], manifest["fallbacks"]) == ("structured", before, 0)
    assert manifest["sparsity"] == pytest.approx(removed / before)
    assert manifest["channels"] == {"before": 172, "after": 129, "removed_share": 0.25, "asked_share": 0.25}
    assert manifest["kv_groups"] == {"before": 4, "after": 2, "removed_share": 0.5, "asked_share": 0.5}
    assert manifest["parameters"]["before"] - manifest["parameters"]["after"] == removed
    assert manifest["base_bytes"] == weights_bytes(stories)
    assert manifest["model_bytes"] == weights_bytes(pruned) < manifest["base_bytes"]
    rows = [json.loads(line) for line in (pruned / "layers.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["kv_groups", "channels"] * 5
    assert sum(row["weights_before"] - row["weights"] for row in rows) == removed


def test_a_repeated_command_is_already_done(stories: Path, pruned: Path) -> None:
    again = invoke("prune", stories, *BOTH, *CALIBRATED, "--output-dir", pruned, "--json")
    assert (again.code, again.json["kv_groups"]["after"]) == (0, 2)
    other = invoke("prune", stories, *BOTH[:4], *CALIBRATED, "--output-dir", pruned)
    assert other.code == 73
    assert "head_sparsity" in other.err


def test_a_smaller_model_can_be_pruned_again(pruned: Path, tmp_path: Path) -> None:
    outcome = invoke("prune", pruned, "--method", "wanda", *CALIBRATED, "--output-dir", tmp_path / "more")
    assert outcome.code == 0, outcome.err
    assert config_of(tmp_path / "more") == config_of(pruned)


def test_a_sparsity_of_zero_gives_the_same_folder(stories: Path, tmp_path: Path) -> None:
    flags = ("--method", "structured", "--sparsity", 0)
    outcome = invoke("prune", stories, *flags, *CALIBRATED, "--output-dir", tmp_path / "same")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "same" / "config.json").read_bytes() == (stories / "config.json").read_bytes()
    dense, same = (load_file(folder / "model.safetensors") for folder in (stories, tmp_path / "same"))
    assert dense.keys() == same.keys()
    assert all(torch.equal(dense[name], same[name]) for name in dense)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_other_families_are_pruned_too(family: str, tmp_path: Path) -> None:
    source = saved(tiny_model(family), tmp_path / "source", torch.float16)
    share = ("--sparsity", 0, "--set", "pruning.head_sparsity=0.5") if family == "mixtral" else ("--sparsity", 0.25)
    calibrated = ("--num-calibration-samples", 4, "--max-seq-length", 16, "--device", "cpu")
    words = (source, "--method", "structured", *share, *calibrated, "--output-dir", tmp_path / "smaller")
    outcome = invoke("prune", *words)
    assert outcome.code == 0, outcome.err
    tokens = torch.arange(3, 15)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller", dtype=torch.float32)
    ours = load_model(tmp_path / "smaller", device=CPU)
    assert torch.equal(stock(input_ids=tokens).logits, ours.network(input_ids=tokens).logits)
    assert stock.num_parameters() < load_model(source, device=CPU).network.num_parameters()


def test_a_family_without_sizes_in_its_config_is_an_error(tmp_path: Path) -> None:
    source = saved(tiny_model("opt"), tmp_path / "source")
    calibrated = ("--num-calibration-samples", 4, "--max-seq-length", 16, "--device", "cpu")
    outcome = invoke("prune", source, *BOTH, *calibrated, "--output-dir", tmp_path / "smaller")
    assert outcome.code == 65
    assert "configuration cannot express" in outcome.errors[0]
    assert not left_behind(tmp_path / "smaller")


def test_too_many_fallbacks_publish_nothing(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mopcompress.entrypoints.compress_structured.structured_config", lambda _: structured_config(tiny_damping)
    )
    tiny_damping = StructuredPruningModifier(mlp_sparsity=0.25, dampening_frac=1e-30)
    flags = {"model": str(stories), "num_calibration_samples": "1", "max_seq_length": "8", "max_fallback": "0"}
    recipe = pruning_recipe(load_recipe(None, flags), method="structured")
    with pytest.raises(QualityGateError, match="of 5 matrices"):
        compress(recipe, recipe.modifiers(StructuredPruningModifier), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_structured_is_a_method_of_a_bench(stories: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    rows = ("--train-rows", 4, "--test-rows", 4, "--set", "run.validation_rows=4", "--max-length", 128)
    grid = ("--methods", "structured", "--ratios", "0.25,0.5", "--arms", "none")
    words = (*grid, "--data", data, *rows, *CALIBRATED, "--output-dir", tmp_path / "run")
    outcome = invoke("bench", stories, *words)
    assert outcome.code == 0, outcome.err
    dense, quarter, half = read_rows(tmp_path / "run" / "rows.jsonl")
    assert [row.setting for row in (dense, quarter, half)] == ["dense", "structured 25%", "structured 50%"]
    assert dense.model_bytes > quarter.model_bytes > half.model_bytes
    assert 0 < quarter.sparsity < half.sparsity < 0.5  # attention stays


# --- the recipe


@pytest.mark.parametrize(
    ("field", "value"), [("mlp_sparsity", 0.5), ("head_sparsity", 0.5), ("score", "norm"), ("dampening_frac", 0.1)]
)
def test_no_field_of_the_modifier_is_ignored(field: str, value: object) -> None:
    modifier = StructuredPruningModifier(mlp_sparsity=0.25)
    assert set(modifier.model_dump()) == {"mlp_sparsity", "head_sparsity", "score", "dampening_frac"}
    assert structured_config(modifier.model_copy(update={field: value})) != structured_config(modifier)


def test_flags_reach_the_modifier() -> None:
    recipe = pruning_recipe(load_recipe(None), method="structured")
    [default] = recipe.modifiers(StructuredPruningModifier)
    assert (default.mlp_sparsity, default.head_sparsity) == (0.25, 0.0)
    outcome = invoke("prune", *BOTH, "--dry-run", "--json")
    [stage] = [stage for name, stage in outcome.json["recipe"].items() if name != "run"]
    assert stage["compression_modifiers"]["StructuredPruningModifier"] == {
        "mlp_sparsity": 0.25,
        "head_sparsity": 0.5,
        "score": "error",
        "dampening_frac": 0.01,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "structured", "--pattern", "2:4"], "--pattern: '2:4' is of single weights"),
        (["--method", "wanda", "--set", "pruning.head_sparsity=0.5"], "--set pruning.head_sparsity: no such field"),
        (["--set", "pruning.head_sparsity=0.5"], "--set pruning.head_sparsity: no such field"),
        (["--method", "structured", "--sparsity", 1], "--sparsity: 1.0 is not a share of weights"),
        (
            ["--method", "structured", "--set", "pruning.head_sparsity=25"],
            "--set pruning.head_sparsity: not a share of weights between 0 and 1, found 25; did you mean 0.25?",
        ),
        (["--method", "structured", "--backend", "llmcompressor"], "--backend: llmcompressor has no structured"),
    ],
)
def test_impossible_flags_are_an_error(words: list[object], message: str, stories: Path) -> None:
    outcome = invoke("prune", stories, *words)
    assert outcome.code == 2
    assert message in outcome.errors[0]


@pytest.mark.parametrize("other", ["SparseGPTModifier: {sparsity: 0.5}", "GPTQModifier: {scheme: W4A16}"])
def test_no_other_modifier_goes_with_it(other: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"a_stage:\n  a_modifiers:\n    StructuredPruningModifier: {{mlp_sparsity: 0.5}}\n    {other}\n")
    with pytest.raises(RecipeError, match=r"a_stage\.a_modifiers\.StructuredPruningModifier: .*compress its folder"):
        load_recipe(path)


def test_a_joint_bench_with_it_is_an_error() -> None:
    joint = set_fields("run", prune_then_quantize="true")
    outcome = invoke("bench", "--methods", "structured", "--bits", 4, *joint, "--dry-run")
    assert outcome.code == 78
    assert "structured pruning is measured alone" in outcome.errors[0]


def test_its_recipe_prunes(stories: Path) -> None:
    recipe = load_recipe(RECIPES / "structured.yaml")
    assert recipe.run.methods == ("structured",)
    outcome = invoke("prune", stories, "--recipe", RECIPES / "structured.yaml", "--dry-run", "--json")
    assert outcome.json["methods"] == "structured"
