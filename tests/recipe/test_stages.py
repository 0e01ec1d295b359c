"""Stages: faults with their places, and modifiers in a wrong place."""

import pytest
from recipe_builders import faults


def test_all_faults_come_at_once_with_their_places(write):
    path = write(
        "sparsity_stage:\n  run_type: oneshott\n  sparsity_modifiers:\n"
        "    SparseGPTModifier: {sparsty: 0.5, sparsity: 50, block_size: 0.5, targets: ['re:(']}\n"
        "    SparseGTPModifier: {}\n"
        "run: {ratio: [0.5], seeds: [0, -1], methods: [sparsgpt]}\nmodel: x\n"
    )
    assert faults(path) == [
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.targets[0]: not a regular expression "
        "(missing ), unterminated subpattern at position 0), found 're:('",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.sparsity: "
        "not a share of weights between 0 and 1, found 50; did you mean 0.5?",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.block_size: not a whole number, found 0.5",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGPTModifier.sparsty: no such field; did you mean 'sparsity'?",
        "r.yaml: sparsity_stage.sparsity_modifiers.SparseGTPModifier: no such modifier here (SparseGPTModifier, "
        "ALPSModifier, WandaPruningModifier, MagnitudePruningModifier, StructuredPruningModifier, "
        "ConstantPruningModifier, GPTQModifier, LowRankRepairModifier, "
        "PromptRecoveryModifier); did you mean 'SparseGPTModifier'?",
        "r.yaml: sparsity_stage.run_type: not oneshot or train, found 'oneshott'; did you mean 'oneshot'?",
        "r.yaml: run.methods[0]: not one of sparsegpt, alps, wanda, magnitude, structured, found 'sparsgpt'; "
        "did you mean 'sparsegpt'?",
        "r.yaml: run.seeds[1]: not greater than or equal to 0, found -1",
        "r.yaml: run.ratio: no such field; did you mean 'ratios'?",
        "r.yaml: model: neither run: nor a <name>_stage:; did you mean 'model_stage'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "the top of a recipe is a map of stages, found a list"),
        ("a_stage: [1]\n", "a_stage: not a map with groups of modifiers, found [1]"),
        ("a_stage:\n", "a_stage: not a map with groups of modifiers, found None"),
        ("a_stage: {run_type: oneshot}\n", "a_stage: no modifiers"),
        ("a_stage: {b_modifiers: {}}\n", "a_stage.b_modifiers: not a map of modifiers"),
        ("a_stage: {b_modifiers: {SparseGPTModifier: }}\n", "SparseGPTModifier.sparsity: required, but missing"),
        ("a_stage: {SparseGPTModifier: {sparsity: 0.5}}\n", "modifiers stand in a group"),
        ("SparseGPTModifier: {sparsity: 0.5}\n", "SparseGPTModifier: stands outside a stage"),
        ("quant_modifiers: {GPTQModifier: {scheme: W4A16}}\n", "quant_modifiers: stands outside a stage"),
        ("pruning_modifiers: [{}]\n", "the form of SparseML before 1.6"),
        ("run: 3\n", "run: not a map of settings, found 3"),
        ("rum: {}\n", "rum: neither run: nor a <name>_stage:; did you mean 'run'?"),
        ("run: {}\nrun: {}\n", "line 2, column 1: the key 'run' stands twice"),
        ("run: {ratios: .nan}\n", "run.ratios: not a list, found nan"),
        ("run: {ratios: [.nan]}\n", "run.ratios[0]: not a finite number, found nan"),
        ("run: {seed: " + "9" * 5000 + "}\n", "cannot be read as a recipe"),
        ("run: {1: 2}\n", "the key 1 is not text"),
        ("run: {? {a: b} : 2}\n", "is not text"),
        ("run: {map: {a: 1}}\n", "run.map.a: not text, found 1"),
        ("run: {model: ''}\n", "run.model: not a name: empty, found ''"),
        ("run: {train_rows: 0}\n", "run.train_rows: not greater than or equal to 1, found 0"),
        ("run: {device: cudaa}\n", "cuda, cuda:N, mps, found 'cudaa'; did you mean 'cuda'?"),
        ("run: {max_fallback: 2}\n", "run.max_fallback: not less than or equal to 1, found 2"),
        ("run: {arms: []}\n", "run.arms: not long enough: at least one entry is needed, found []"),
        ("run: [\n", "line 2, column 1: "),
        ("run:\n\t- a\n", "line 2, column 1: "),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed"),
        ("run: {}\n---\nrun: {}\n", "line 2, column 1: "),
        ("run: {model: \x01}\n", "cannot be read as a recipe"),
        ('run: {model: "\\ud800"}\n', "run.model: "),
        ("a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}}, run_type: train}", "with run_type: oneshot"),
        ("a_stage: {m_modifiers: {PromptRecoveryModifier: {}}, run_type: oneshot}", "with run_type: train"),
        ("<<: {run: {}}\n", "<<: neither run: nor"),
        ("a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}}, run_type: [train]}", "found ['train']"),
        (
            "a_stage: {m_modifiers: {GPTQModifier: {scheme: W4A16}}}\nb_stage: {m_modifiers: {WandaPruningModifier: "
            "{sparsity: 0.5}}}",
            "b_stage.m_modifiers.WandaPruningModifier: would change weights that the GPTQModifier of a_stage",
        ),
        (
            "a_stage: {m_modifiers: {WandaPruningModifier: {sparsity: 0.5}, MagnitudePruningModifier: "
            "{final_sparsity: 0.6, apply_globally: true}}}",
            "MagnitudePruningModifier.apply_globally: its threshold is that of the given weights, and a_stage changes",
        ),
        (
            "a_stage: {m_modifiers: {PromptRecoveryModifier: {arm: mop}}}\nb_stage: {m_modifiers: "
            "{PromptRecoveryModifier: {arm: lora}}}",
            "b_stage.m_modifiers.PromptRecoveryModifier: a_stage has one already, and a recipe has one recovery",
        ),
    ],
)
def test_a_file_that_is_no_recipe_gives_one_line(write, text, message):
    errors = faults(write(text))
    assert len(errors) == 1
    assert errors[0].startswith("r.yaml: ")
    assert message in errors[0]
