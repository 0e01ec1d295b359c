"""Texts of recipes, and the faults that reading one gives."""

import json

import pytest

from mopcompress.errors import RecipeError
from mopcompress.recipe import (
    load_recipe,
)

TWO_FOUR_THEN_W4A16 = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", sequential_update: false}
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier: {targets: ['re:.*q_proj.weight', 're:.*down_proj.weight'], start: 0}
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}
          targets: [Linear]
"""


ALTERNATING = """
initial_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier:
      {sparsity: 0.5, block_size: 64, percdamp: 0.02, mask_structure: 0:0, targets: [Linear], ignore: ["re:.*lm_head"]}
initial_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: '__ALL__', start: 0}
next_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier: {sparsity: 0.7, prunen: 0, prunem: 0, target_ids: ["attention_mask", "position_ids"]}
"""


def in_group(modifier, fields):
    return f"a_stage:\n  b_modifiers:\n    {modifier}: {json.dumps(fields)}\n"


def faults(path, error=RecipeError, flags=None):
    with pytest.raises(error) as caught:
        load_recipe(path, flags or {})
    return str(caught.value).splitlines()
