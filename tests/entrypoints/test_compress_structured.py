"""Structured pruning from the recipe and the command line to a folder of a smaller model."""

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
def narrowed(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "narrowed"
    outcome = invoke("prune", stories, *BOTH, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    return target


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


# --- the folder


@torch.no_grad()
def test_stock_transformers_computes_what_the_model_in_memory_does(stories: Path, narrowed: Path) -> None:
    run = load_recipe(None, {"model": str(stories), "num_calibration_samples": "4", "max_seq_length": "32"}).run
    tokens = load_calibration(run, stories, artifacts.read_manifest(narrowed)["base"]["sha256"], silent).tokens
    model = load_model(stories, device=CPU)
    prune_structured(model, tokens, structured_config(StructuredPruningModifier(mlp_sparsity=0.25, head_sparsity=0.5)))
    stock = AutoModelForCausalLM.from_pretrained(narrowed)
    assert torch.equal(stock(input_ids=tokens).logits, model.network(input_ids=tokens).logits)


def test_only_the_sizes_change_in_the_configuration_and_nothing_in_other_files(stories: Path, narrowed: Path) -> None:
    before, after = config_of(stories), config_of(narrowed)
    sizes = {"intermediate_size": 129, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    assert after == before | sizes
    assert before["intermediate_size"] == 172
    ours = {"config.json", "model.safetensors", "layers.jsonl", "manifest.json"}
    others = {path.name for path in stories.iterdir()} - ours
    assert others == {path.name for path in narrowed.iterdir()} - ours
    assert {"tokenizer.json", "tokenizer_config.json"} <= others
    for name in others:
        assert (narrowed / name).read_bytes() == (stories / name).read_bytes()


def test_what_is_told_is_counted(stories: Path, narrowed: Path) -> None:
    facts = artifacts.read_manifest(narrowed)
    assert facts is not None
    artifacts.verify(narrowed)
    dense, left = (load_file(folder / "model.safetensors") for folder in (stories, narrowed))
    linears = [name for name in left if "_proj" in name]
    before = sum(dense[name].numel() for name in linears)
    gone = before - sum(left[name].numel() for name in linears)
    assert (facts["method"], facts["weights"], facts["fallbacks"]) == ("structured", before, 0)
    assert facts["sparsity"] == pytest.approx(gone / before)
    assert facts["channels"] == {"before": 172, "after": 129, "removed_share": 0.25, "asked_share": 0.25}
    assert facts["kv_groups"] == {"before": 4, "after": 2, "removed_share": 0.5, "asked_share": 0.5}
    assert facts["parameters"]["before"] - facts["parameters"]["after"] == gone
    assert facts["base_bytes"] == weights_bytes(stories)
    assert facts["model_bytes"] == weights_bytes(narrowed) < facts["base_bytes"]
    rows = [json.loads(line) for line in (narrowed / "layers.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["kv_groups", "channels"] * 5
    assert sum(row["weights_before"] - row["weights"] for row in rows) == gone


def test_asked_for_again_it_is_done_already(stories: Path, narrowed: Path) -> None:
    again = invoke("prune", stories, *BOTH, *CALIBRATED, "--output-dir", narrowed, "--json")
    assert (again.code, again.json["kv_groups"]["after"]) == (0, 2)
    other = invoke("prune", stories, *BOTH[:4], *CALIBRATED, "--output-dir", narrowed)
    assert other.code == 73
    assert "head_sparsity" in other.err


def test_a_narrowed_model_can_be_pruned_further(narrowed: Path, tmp_path: Path) -> None:
    outcome = invoke("prune", narrowed, "--method", "wanda", *CALIBRATED, "--output-dir", tmp_path / "more")
    assert outcome.code == 0, outcome.err
    assert config_of(tmp_path / "more") == config_of(narrowed)


def test_nothing_removed_is_the_same_folder(stories: Path, tmp_path: Path) -> None:
    flags = ("--method", "structured", "--sparsity", 0)
    outcome = invoke("prune", stories, *flags, *CALIBRATED, "--output-dir", tmp_path / "same")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "same" / "config.json").read_bytes() == (stories / "config.json").read_bytes()
    dense, same = (load_file(folder / "model.safetensors") for folder in (stories, tmp_path / "same"))
    assert dense.keys() == same.keys()
    assert all(torch.equal(dense[name], same[name]) for name in dense)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_other_families_go_through_the_command_too(family: str, tmp_path: Path) -> None:
    source = saved(tiny_model(family), tmp_path / "source", torch.float16)
    share = ("--sparsity", 0, "--set", "pruning.head_sparsity=0.5") if family == "mixtral" else ("--sparsity", 0.25)
    calibrated = ("--num-calibration-samples", 4, "--max-seq-length", 16, "--device", "cpu")
    words = (source, "--method", "structured", *share, *calibrated, "--output-dir", tmp_path / "narrower")
    outcome = invoke("prune", *words)
    assert outcome.code == 0, outcome.err
    tokens = torch.arange(3, 15)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "narrower", dtype=torch.float32)
    ours = load_model(tmp_path / "narrower", device=CPU)
    assert torch.equal(stock(input_ids=tokens).logits, ours.network(input_ids=tokens).logits)
    assert stock.num_parameters() < load_model(source, device=CPU).network.num_parameters()


def test_a_family_that_cannot_say_it_leaves_nothing_behind(tmp_path: Path) -> None:
    source = saved(tiny_model("opt"), tmp_path / "source")
    calibrated = ("--num-calibration-samples", 4, "--max-seq-length", 16, "--device", "cpu")
    outcome = invoke("prune", source, *BOTH, *calibrated, "--output-dir", tmp_path / "narrower")
    assert outcome.code == 65
    assert "configuration cannot say" in outcome.errors[0]
    assert not left_behind(tmp_path / "narrower")


def test_too_much_damping_is_told(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mopcompress.entrypoints.from_recipe.structured_config", lambda _: structured_config(tiny_damping)
    )
    tiny_damping = StructuredPruningModifier(mlp_sparsity=0.25, dampening_frac=1e-30)
    flags = {"model": str(stories), "num_calibration_samples": "1", "max_seq_length": "8", "max_fallback": "0"}
    recipe = pruning_recipe(load_recipe(None, flags), method="structured")
    with pytest.raises(QualityGateError, match="of 5 matrices"):
        compress(recipe, recipe.modifiers(StructuredPruningModifier), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bench_has_it_as_a_method(stories: Path, tmp_path: Path) -> None:
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


# --- the words of a recipe


@pytest.mark.parametrize(
    ("field", "value"), [("mlp_sparsity", 0.5), ("head_sparsity", 0.5), ("score", "norm"), ("dampening_frac", 0.1)]
)
def test_no_field_is_ignored(field: str, value: object) -> None:
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
def test_impossible_flags_are_told(words: list[object], message: str, stories: Path) -> None:
    outcome = invoke("prune", stories, *words)
    assert outcome.code == 2
    assert message in outcome.errors[0]


@pytest.mark.parametrize("other", ["SparseGPTModifier: {sparsity: 0.5}", "GPTQModifier: {scheme: W4A16}"])
def test_it_stands_alone(other: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"a_stage:\n  a_modifiers:\n    StructuredPruningModifier: {{mlp_sparsity: 0.5}}\n    {other}\n")
    with pytest.raises(RecipeError, match=r"a_stage\.a_modifiers\.StructuredPruningModifier: .*compress its folder"):
        load_recipe(path)


def test_a_joint_bench_refuses_it() -> None:
    joint = set_fields("run", prune_then_quantize="true")
    outcome = invoke("bench", "--methods", "structured", "--bits", 4, *joint, "--dry-run")
    assert outcome.code == 78
    assert "structured pruning is measured alone" in outcome.errors[0]


def test_its_recipe_prunes(stories: Path) -> None:
    recipe = load_recipe(RECIPES / "structured.yaml")
    assert recipe.run.methods == ("structured",)
    outcome = invoke("prune", stories, "--recipe", RECIPES / "structured.yaml", "--dry-run", "--json")
    assert outcome.json["methods"] == "structured"
