"""Recipes that SparseML and llm-compressor publish as examples and tests, in minimal equivalents of the same structure.

Each either runs and gives the zeros and levels that it asks for, or names what is not supported and what to do.
"""

import re

import pytest
import torch
from tiny_models import random_tokens, tiny_model

from mopcompress.compress.sequential import compress_model
from mopcompress.entrypoints.from_recipe import method_config
from mopcompress.errors import RecipeError
from mopcompress.recipe import GPTQModifier, load_recipe
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.pruning_modifiers import Pruning

TOKENS = random_tokens(12, 16)
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 6}  # 128 divides all inputs
EVERY = r"model\.layers\."
ATTENTION_AND_MLP = """[
        're:.*q_proj.weight', 're:.*k_proj.weight', 're:.*v_proj.weight', 're:.*o_proj.weight',
        're:.*gate_proj.weight', 're:.*up_proj.weight', 're:.*down_proj.weight',
      ]"""
FINETUNING = f"""
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: {ATTENTION_AND_MLP}
      start: 0
"""


def w4a16(weights: str, more: str = "") -> str:
    return f"""
quant_stage:
  quant_modifiers:
    GPTQModifier:
      {more}
      config_groups:
        group_0:
          weights: {{{weights}}}
          targets: [Linear]
"""


GROUP_128 = "num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128"
CHANNEL = "num_bits: 4, type: int, symmetric: true, strategy: channel"

# text, and by pattern of names: (share of zeros, N:M, bits); linears that no pattern matches stay as they are
RUNS = {
    # llm-compressor examples/quantization_2of4_sparse_w4a16, SparseML examples/llama7b_sparse_quantized
    "2of4 w4a16 group-128": (
        """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: [Linear], ignore: ["re:.*lm_head"]}
"""
        + FINETUNING
        + w4a16(GROUP_128, "ignore: [lm_head]").replace("quant_stage:", "quant_stage:\n  run_type: oneshot"),
        {EVERY: (None, (2, 4), 4)},
    ),
    "2of4 w4a16 channel": (
        """
sparsity_stage:
  run_type: post_train
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", sequential_update: false}
"""
        + FINETUNING
        + w4a16(CHANNEL, "sequential_update: false\n      ignore: [lm_head]"),
        {EVERY: (None, (2, 4), 4)},
    ),
    # llm-compressor examples/finetuning, SparseML example_alternating_recipe
    "alternating": (
        """
initial_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier: {sparsity: 0.5, block_size: 128, percdamp: 0.01, mask_structure: 0:0, targets: [Linear]}
initial_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: '__ALL__', start: 0}
next_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier: {sparsity: 0.7, block_size: 128, percdamp: 0.01, mask_structure: "0:0"}
next_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: '__ALL__', start: 0}
""",
        {EVERY: (0.7, None, None)},
    ),
    # llm-compressor tests/sparsity/sparsegpt/recipes
    "layers by name": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.3
      dampening_frac: 0.01
      targets: ["model.layers.0", "model.layers.1"]
""",
        {r"model\.layers\.[01]\.": (0.3, None, None)},
    ),
    "a layer by pattern": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier: {sparsity: 0.7, targets: ["re:.*model.layers.0$"], preserve_sparsity_mask: True}
""",
        {r"model\.layers\.0\.": (0.7, None, None)},
    ),
    # llm-compressor tests/llmcompressor/transformers/obcq/recipes and oneshot_configs/recipes
    "pruned layer, one matrix of it rounded": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier: {sparsity: 0.7, targets: ["re:.*model.layers.0$"], preserve_sparsity_mask: True}
    GPTQModifier:
      config_groups:
        group_0:
          weights: {num_bits: 8, type: int, strategy: channel}
          targets: ["re:.*model.layers.0.self_attn.q_proj"]
""",
        {r"model\.layers\.0\.self_attn\.q": (0.7, None, 8), r"model\.layers\.0\.(?!.*q_)": (0.7, None, None)},
    ),
    "a parameter": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier: {sparsity: 0.5, block_size: 128, targets: ['re:model.layers.3.mlp.gate_proj.weight']}
""",
        {r"model\.layers\.3\.mlp\.gate_proj": (0.5, None, None)},
    ),
    # SparseML tests/sparseml/transformers/obcq/recipes/test_tiny2.yaml
    "older names": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      sequential_update: False
      quantize: False
      percdamp: 0.01
      prunen: 0
      prunem: 0
      targets: [model.layers.0, model.layers.1, model.layers.2, model.layers.3, model.layers.4, model.layers.5]
      target_ids: ["attention_mask", "position_ids"]
""",
        {EVERY: (0.5, None, None)},
    ),
    # llm-compressor tests/llmcompressor/transformers/finetune/test_alternate_recipe.yaml
    "a training stage without a type": (
        """
test_oneshot_stage:
  obcq_modifiers:
    SparseGPTModifier: {sparsity: 0.7, sequential_update: False, percdamp: 0.01, ignore: ["re:.*lm_head"]}
test_train_stage:
  pruning_modifiers:
    ConstantPruningModifier: {targets: ["re:.*self_attn.q_proj", "re:.*mlp.up_proj"], start: 0}
""",
        {EVERY: (0.7, None, None)},
    ),
    # llm-compressor tests/e2e/recipes/actorder, tests/e2e/vLLM/recipes/actorder
    "order by weight": (
        w4a16(
            GROUP_128,
            'ignore: ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]\n      actorder: weight',
        ),
        {EVERY: (None, None, 4)},
    ),
    "order inside weights": (w4a16(GROUP_128 + ", actorder: weight", "dampening_frac: 0.1"), {EVERY: (None, None, 4)}),
    "no order": (w4a16(GROUP_128 + ", actorder: False", "actorder: null"), {EVERY: (None, None, 4)}),
    # llm-compressor examples/quantization_w4a16, examples/quantizing_moe
    "channel": (
        w4a16(CHANNEL + ", dynamic: false", "sequential_update: true\n      ignore: [lm_head, 're:.*mlp\\.gate$']"),
        {EVERY: (None, None, 4)},
    ),
    "scheme and some targets": (
        """
DEFAULT_stage:
  DEFAULT_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      scheme: W8A16
      targets: ['re:.*mlp\\.(down|gate|up)_proj$']
      dampening_frac: 0.001
      actorder: null
""",
        {r".*mlp": (None, None, 8)},
    ),
    # the docstrings of WandaPruningModifier and MagnitudePruningModifier
    "wanda": (
        "test_stage: {modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: '2:4'}}}",
        {EVERY: (None, (2, 4), None)},
    ),
    "magnitude": (
        """
pruning_stage:
  pruning_modifiers:
    MagnitudePruningModifier:
      {init_sparsity: 0.05, final_sparsity: 0.8, start: 0.0, end: 10.0, update_frequency: 0.5,
       targets: ['re:.*[kqvo]_proj.weight'], leave_enabled: True}
""",
        {r".*self_attn": (0.8, None, None)},
    ),
    # SparseML's OBCQ documentation: one share a target
    "a list of shares": (
        """
test_stage:
  obcq_modifiers:
    SparseGPTModifier: {sparsity: [0.6, 0.3], targets: ["model.layers.0", "re:.*mlp.*"], ignore: ["re:.*[2-5].mlp"]}
""",
        {r"model\.layers\.0": (0.6, None, None), r"model\.layers\.1\.mlp": (0.3, None, None)},
    ),
}


def rounded(weights: str, more: str = "") -> str:
    return w4a16(weights).replace("          targets", f"          {more}\n          targets")


SMOOTH = "SmoothQuantModifier: {smoothing_strength: 0.8}"
GPTQ = "quant_stage.quant_modifiers.GPTQModifier"
GROUP = f"{GPTQ}.config_groups.group_0"
WHOLE_8 = "num_bits: 8, type: int, symmetric: true, strategy: channel"

# text, and for each fault its place and its message
REFUSED = {
    # llm-compressor examples/quantization_w8a8_int8
    "w8a8": (
        rounded(WHOLE_8, "input_activations: {num_bits: 8, dynamic: true, strategy: token}").replace(
            "    GPTQModifier", f"    {SMOOTH}\n    GPTQModifier"
        ),
        [
            ("quant_stage.quant_modifiers.SmoothQuantModifier", "only weights are rounded; take it out"),
            (f"{GROUP}.input_activations", "activations are not rounded here; leave it out"),
        ],
    ),
    "w8a8 by scheme": (
        f"quant_stage: {{quant_modifiers: {{{SMOOTH}, GPTQModifier: {{targets: [Linear], scheme: W8A8}}}}}}",
        [
            ("quant_stage.quant_modifiers.SmoothQuantModifier", "take it out"),
            (f"{GPTQ}.scheme", "W8A16 does"),
        ],
    ),
    # llm-compressor tests/llmcompressor/transformers/obcq/recipes/quant.yaml
    "one scale a matrix": (
        rounded("num_bits: 8", "input_activations: {num_bits: 8}"),
        [
            (f"{GROUP}.weights.strategy", "write channel (one scale per row)"),
            (f"{GROUP}.input_activations", "leave it out"),
        ],
    ),
    # llm-compressor tests/e2e/recipes/kv_cache
    "keys and values": (
        w4a16(CHANNEL, "kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, strategy: tensor}"),
        [(f"{GPTQ}.kv_cache_scheme", "the cache of keys and values is not rounded here; leave it out")],
    ),
    "keys and values alone": (
        "quant_stage: {quant_modifiers: {QuantizationModifier: {kv_cache_scheme: {num_bits: 8, type: float}}}}",
        [("quant_stage.quant_modifiers.QuantizationModifier", "give its scheme or config_groups to a GPTQModifier")],
    ),
    # llm-compressor tests/e2e/recipes/non_uniform, WNA16
    "awq beside gptq": (
        """
quant_stage:
  quant_modifiers:
    AWQModifier: {duo_scaling: true}
    QuantizationModifier: {ignore: [lm_head], scheme: W4A16, targets: ["re:.*self_attn\\\\.(k|q|o|v)_proj$"]}
    GPTQModifier: {ignore: [lm_head], scheme: W8A8, targets: ["re:.*mlp\\\\.(down|gate|up)_proj$"]}
""",
        [
            ("quant_stage.quant_modifiers.AWQModifier", "write GPTQModifier in its place"),
            ("quant_stage.quant_modifiers.QuantizationModifier", "rounds without calibration"),
            (f"{GPTQ}.scheme", "rounds activations too"),
        ],
    ),
    # llm-compressor tests/llmcompressor/transformers/compression/recipes
    "asymmetric": (
        w4a16("num_bits: 8, type: int, symmetric: false, strategy: channel"),
        [(f"{GROUP}.weights.symmetric", "stock tools cannot load them; write true")],
    ),
    "order of groups": (
        w4a16(GROUP_128 + ", actorder: group"),
        [(f"{GPTQ}.actorder", "did you mean 'static'?")],
    ),
    "the scheme stands elsewhere": (
        "quant_stage: {quant_modifiers: {QuantizationModifier: {ignore: [lm_head]}, GPTQModifier: {block_size: 128}}}",
        [
            ("quant_stage.quant_modifiers.QuantizationModifier", "to a GPTQModifier instead"),
            (GPTQ, "say how: scheme: W4A16, or config_groups"),
        ],
    ),
    "2of4 fp8": (
        """
pruning_stage: {obcq_modifiers: {SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4"}}}
quant_stage:
  quant_modifiers: {QuantizationModifier: {targets: [Linear], ignore: [lm_head], scheme: FP8_DYNAMIC}}
  pruning_modifiers: {ConstantPruningModifier: {targets: ['re:.*q_proj.weight'], start: 0}}
""",
        [("quant_stage.quant_modifiers.QuantizationModifier", "rounds without calibration")],
    ),
    "fp8": (
        "quant_stage: {quant_modifiers: {GPTQModifier: {targets: [Linear], scheme: FP8_DYNAMIC}}}",
        [(f"{GPTQ}.scheme", "has a floating-point grid")],
    ),
    "nvfp4": (
        w4a16("num_bits: 4, type: float, strategy: tensor_group, group_size: 16"),
        [(f"{GROUP}.weights.type", "are not made here"), (f"{GROUP}.weights.strategy", "write channel")],
    ),
    # llm-compressor tests/sparsity/sparsegpt/recipes/quant_and_sparse.yaml
    "rounded before it is pruned": (
        "test_stage: {obcq_modifiers: {GPTQModifier: {scheme: W8A16}, SparseGPTModifier: {sparsity: 0.5}}}",
        [("test_stage.obcq_modifiers.SparseGPTModifier", "the GPTQModifier of test_stage has rounded; put it before")],
    ),
    "quip": (
        "quant_stage: {quant_modifiers: {QuIPModifier: {}, GPTQModifier: {scheme: W4A16}}}",
        [("quant_stage.quant_modifiers.QuIPModifier", "rotates weights")],
    ),
    # SparseML src/sparseml/transformers/sparsification/obcq
    "llama, before 1.6": (
        "modifiers:\n  - !SparseLlamaModifier\n    sparsity: 0.5\n",
        [("line 2", "SparseML before 1.6")],
    ),
    "opt, before 1.6": (
        "modifiers:\n  - !QuantizationModifier\n    ignore: [lm_head]\n  - !SparseOPTModifier\n    sparsity: 0.5\n",
        [("line 2", "write a <name>_stage: map with SparseGPTModifier")],
    ),
    "bert, before 1.6": (
        "version: 1.1.0\nmodifiers:\n    - !EpochRangeModifier\n        end_epoch: 1\n",
        [("line 3", "write a <name>_stage: map with SparseGPTModifier")],
    ),
    "mistral": (
        """
test_stage:
  obcq_modifiers:
    QuantizationModifier: {ignore: [MistralRMSNorm], post_oneshot_calibration: true}
    SparseGPTModifier: {sparsity: 0.5, sequential_update: true, quantize: true, percdamp: 0.01}
""",
        [
            ("test_stage.obcq_modifiers.QuantizationModifier", "to a GPTQModifier instead"),
            ("test_stage.obcq_modifiers.SparseGPTModifier.quantize", "rounded by a GPTQModifier in a later stage"),
        ],
    ),
    # SparseML tests/sparseml
    "with the head": (
        "test_stage: {obcq_modifiers: {SparseGPTModifier: {sparsity: 0.3, targets: [model.layers.0, lm_head]}}}",
        [("test_stage.obcq_modifiers.SparseGPTModifier.targets[1]", "embeddings and head are never compressed here")],
    ),
    "distillation": (
        """
test_stage:
  pruning_modifiers: {ConstantPruningModifier: {targets: ["re:.*self_attn.q_proj"], start: 0}}
  distillation_modifiers: {OutputDistillationModifier: {targets: ["re:model.layers.\\\\d+$"], comparison: square_head}}
""",
        [("test_stage.distillation_modifiers.OutputDistillationModifier", "distils while training weights")],
    ),
    "expressions": (
        """
test_stage:
  pruning_modifiers:
    MagnitudePruningModifier: {init_sparsity: 0.0, final_sparsity: 0.5, start: eval(warm_up_epochs), end: 3.0}
""",
        [
            (
                "test_stage.pruning_modifiers.MagnitudePruningModifier.start",
                "write the value, found 'eval(warm_up_epochs)'",
            )
        ],
    ),
    # llm-compressor example_column_sparse_recipe.yaml
    "outside a stage": (
        "TensorNetworkModifier:\n  method: column_sparse\n  rank: 0.5\n",
        [("TensorNetworkModifier", "stands outside a stage")],
    ),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into the working directory, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def to(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return to


@pytest.fixture(scope="module")
def dense():
    """The weights of all linears of the blocks."""
    return dict(weights(tiny_model(**SHAPE)))


def weights(model):
    for name, weight in model.network.named_parameters():
        if "_proj" in name:
            yield name.removesuffix(".weight"), weight


def check(name, weight, share, pattern, bits):
    zeros = weight == 0
    if share is not None and bits is None:
        assert int(zeros.sum()) == round(share * weight.numel()), name
    if pattern is not None:
        counts = zeros.unflatten(1, (-1, pattern[1])).sum(-1)
        assert int(counts.min()) >= pattern[0], name
        assert bits is not None or int(counts.max()) == pattern[0], name
    if bits is not None:
        assert max(len(row.unique()) for row in weight) <= 2**bits, name
        assert max(len(row.unique()) for row in weight) > 2 ** (bits - 3), name


@pytest.mark.parametrize("title", RUNS)
def test_a_published_recipe_runs_and_gives_what_it_asks_for(title, write, dense):
    text, expected = RUNS[title]
    recipe = load_recipe(write(text))
    model = tiny_model(**SHAPE)
    compressing = [modifier for modifier in recipe.modifiers(Spec) if isinstance(modifier, Pruning | GPTQModifier)]
    compress_model(model, TOKENS, [method_config(modifier) for modifier in compressing])
    touched = 0
    for name, weight in weights(model):
        matches = [outcome for pattern, outcome in expected.items() if re.match(pattern, name)]
        if matches:
            check(name, weight, *matches[0])
            touched += 1
        else:
            assert torch.equal(weight, dense[name]), name
    assert touched


@pytest.mark.parametrize("title", REFUSED)
def test_what_is_not_supported_is_named_with_what_to_do(title, write):
    text, expected = REFUSED[title]
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected), lines
    for line, (place, message) in zip(lines, expected, strict=True):
        assert re.match(rf".*r\.yaml: {re.escape(place)}[:,]", line), line
        assert message in line, line
