"""Eight defects of llm-compressor 0.14.0.1 that its recipes must not have here: a test for each, end to end."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import random_tokens, saved, tiny_model
from transformers import AutoModelForCausalLM

from mopcompress.entrypoints.compress import compress
from mopcompress.entrypoints.export import export
from mopcompress.errors import QualityGateError
from mopcompress.recipe import GPTQModifier, Recipe, dump_recipe, load_recipe
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.pruning_modifiers import Pruning

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}  # 32 and 64: groups of 32 fit
SPARSE_24_THEN_W4 = """
sparsity_stage:
  sparsity_modifiers: {SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4"}}
quantization_stage:
  quantization_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0: {weights: {num_bits: 4, symmetric: true, strategy: group, group_size: 32}, targets: [Linear]}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama whose head is not tied to its embeddings."""
    model = tiny_model(**SHAPE, tie_word_embeddings=False)
    return saved(model, tmp_path_factory.mktemp("models") / "base", torch.float16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words for calibration."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{token}" for token in random_tokens(1, 600)[0].tolist()))
    return path


@pytest.fixture
def compressed(base, text, tmp_path):
    """A function that runs a recipe on the model and returns the recipe and the compressed weights."""

    def run(recipe: str, **flags: object) -> tuple[Recipe, dict[str, torch.Tensor]]:
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        settings = {
            "model": base,
            "calibration": text,
            "num_calibration_samples": 8,
            "max_seq_length": 32,
            "device": "cpu",
        }
        loaded = load_recipe(path, settings | flags)
        modifiers = [modifier for modifier in loaded.modifiers(Spec) if isinstance(modifier, Pruning | GPTQModifier)]
        compress(loaded, modifiers, tmp_path / "out")
        return loaded, load_file(tmp_path / "out" / "model.safetensors")

    return run


def projections(weights):
    return {name: weight for name, weight in weights.items() if "_proj" in name}


@pytest.mark.parametrize("ignore", ["ignore: [lm_head]", 'ignore: ["re:.*lm_head"]', "ignore: []"])
@pytest.mark.parametrize("modifier", ["SparseGPTModifier", "WandaPruningModifier"])
def test_1_an_ignored_head_is_not_pruned(base, compressed, modifier, ignore):
    """There, `ignore: [lm_head]` prunes the head to 50 %: only the `re:` form works."""
    _, weights = compressed(f"a_stage: {{b_modifiers: {{{modifier}: {{sparsity: 0.5, targets: [Linear], {ignore}}}}}}}")
    dense = load_file(base / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], dense["lm_head.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in projections(weights).values())


def test_2_oneshot_magnitude_pruning_prunes(compressed):
    """There, a oneshot MagnitudePruningModifier changes nothing and says nothing."""
    fields = "{init_sparsity: 0.5, final_sparsity: 0.5, targets: ['re:.*proj.weight'], start: 0, end: 1}"
    _, weights = compressed(f"a_stage: {{b_modifiers: {{MagnitudePruningModifier: {fields}}}}}")
    assert projections(weights)
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in projections(weights).values())


def test_2_a_global_threshold_prunes_as_much(base, compressed):
    """There, `apply_globally: true` is not implemented."""
    fields = "{final_sparsity: 0.5, targets: ['re:.*proj.weight'], apply_globally: true}"
    _, weights = compressed(f"a_stage: {{b_modifiers: {{MagnitudePruningModifier: {fields}}}}}")
    pruned = projections(weights).values()
    assert sum(int((weight == 0).sum()) for weight in pruned) == sum(weight.numel() for weight in pruned) // 2
    threshold = min(float(weight[weight != 0].abs().min()) for weight in pruned)
    dense = projections(load_file(base / "model.safetensors"))
    for name, weight in projections(weights).items():
        assert torch.equal(weight == 0, dense[name].abs() < threshold), name


@pytest.mark.parametrize("modifier", ["SparseGPTModifier", "WandaPruningModifier"])
def test_3_owl_spares_blocks_with_outliers(compressed, modifier):
    """There, `sparsity_profile: owl` always ends in an error."""
    fields = "{sparsity: 0.6, sparsity_profile: owl, owl_m: 3, owl_lmbda: 0.08}"
    _, weights = compressed(f"a_stage: {{b_modifiers: {{{modifier}: {fields}}}}}")
    sparsity = {name: float((weight == 0).double().mean()) for name, weight in projections(weights).items()}
    first, last = (min(sparsity[name] for name in sparsity if f"layers.{index}." in name) for index in range(2))
    assert abs(first - last) == pytest.approx(0.16, abs=0.02)
    zeros = sum(int((weight == 0).sum()) for weight in projections(weights).values())
    count = sum(weight.numel() for weight in projections(weights).values())
    half_a_weight_per_row = sum(len(weight) for weight in projections(weights).values()) / 2  # Wanda counts by rows
    assert zeros == pytest.approx(0.6 * count, abs=1 if modifier == "SparseGPTModifier" else half_a_weight_per_row)


def test_4_every_group_of_two_in_four_survives_rounding(compressed):
    """There, GPTQ after SparseGPT fills 2.8 % of the groups."""
    _, weights = compressed(SPARSE_24_THEN_W4)
    for name, weight in projections(weights).items():
        zeros = (weight.unflatten(1, (-1, 4)) == 0).sum(-1)
        assert int(zeros.min()) >= 2, name
        assert max(len(group.unique()) for group in weight.unflatten(1, (-1, 32)).flatten(0, 1)) <= 16, name


@pytest.mark.parametrize(("sparsity", "smaller"), [(0.5, 1.6), (0.85, 3.5)])
def test_5_a_sparse_checkpoint_is_smaller_on_disk(base, compressed, tmp_path, sparsity, smaller):
    """There, a model with half of its weights gone takes as many bytes as the dense one."""
    recipe = f"a_stage: {{b_modifiers: {{SparseGPTModifier: {{sparsity: {sparsity}}}}}}}"
    _, weights = compressed(recipe)
    facts = export(str(tmp_path / "out"), "sparse", tmp_path / "sparse")
    assert facts["matrices_dense_bytes"] == sum(weight.nbytes for weight in projections(weights).values())
    assert facts["matrices_dense_bytes"] > smaller * facts["matrices_bytes"]
    stored = {file: sum(path.stat().st_size for path in file.glob("*.safetensors")) for file in tmp_path.iterdir()}
    assert stored[tmp_path / "sparse"] < stored[tmp_path / "out"]
    export(str(tmp_path / "sparse"), "dense", tmp_path / "again")
    for name, weight in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name


def test_6_a_dumped_recipe_is_plain_and_the_same(compressed, tmp_path):
    """There, two stages come back as one, with a tag that `yaml.safe_load` refuses."""
    recipe, _ = compressed(SPARSE_24_THEN_W4)
    dumped = dump_recipe(recipe)
    assert [name for name in yaml.safe_load(dumped) if name != "run"] == ["sparsity_stage", "quantization_stage"]
    (tmp_path / "again.yaml").write_text(dumped)
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert dump_recipe(load_recipe(tmp_path / "again.yaml")) == dumped
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"] == yaml.safe_load(dumped)


def test_7_a_singular_matrix_is_never_replaced_silently(compressed, tmp_path):
    """There, the inverse becomes the identity. Here damping is raised and counted, and too many raises are an error."""
    recipe = "a_stage: {b_modifiers: {SparseGPTModifier: {sparsity: 0.5, dampening_frac: 1.0e-30}}}"
    few = {"num_calibration_samples": 1, "max_seq_length": 8}  # 8 tokens for 32 inputs
    with pytest.raises(QualityGateError, match=r"^14 of 14 matrices needed more damping than asked for"):
        compressed(recipe, **few, max_fallback=0.5)
    assert not (tmp_path / "out").exists()
    compressed(recipe, **few, max_fallback=1.0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "layers.jsonl").read_text().splitlines()]
    escalated = [row["name"] for row in rows if row["escalations"]]
    assert len(escalated) == 14
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fallbacks"] == len(escalated)


def test_8_a_rounded_checkpoint_loads_in_stock_transformers(base, compressed, tmp_path):
    """There, a W4A16_ASYM checkpoint does not load. Here grids are symmetric, and others are refused by name."""
    _, weights = compressed(SPARSE_24_THEN_W4)
    network, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    for name, weight in network.named_parameters():
        assert torch.equal(weight, weights[name]), name
    export(str(tmp_path / "out"), "compressed-tensors", tmp_path / "packed")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["symmetric"] for group in settings["config_groups"].values()] == [True]
    assert not [name for name in load_file(tmp_path / "packed" / "model.safetensors") if "zero_point" in name]
    tokens = random_tokens(1, 5)
    assert not torch.equal(network(tokens).logits, AutoModelForCausalLM.from_pretrained(base)(tokens).logits)
