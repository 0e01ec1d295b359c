"""Recipe files: scalars of YAML 1.2, and nothing that could run or explode."""

from pathlib import Path

import pytest
from recipe_builders import faults

from mopcompress.errors import InputNotFoundError
from mopcompress.recipe import (
    load_recipe,
)


def test_two_to_four_is_text_without_quotes(write):
    path = write("a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: 2:4}}}")
    assert load_recipe(path).modifier_for("wanda").pattern == (2, 4)


def test_1e_3_is_a_number(write):
    recipe = load_recipe(write("a_stage: {b_modifiers: {PromptRecoveryModifier: {gate_learning_rate: 2e-3}}}"))
    assert recipe.recovery.gate_learning_rate == 0.002


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: !!python/object/apply:os.system [echo]\n",
            "line 1, column 4: YAML tags are not accepted, found '!!python/",
        ),
        ("!!python/name:os.system x\n", "a recipe is data and never names code"),
        ("a: !!int 3\n", "YAML tags are not accepted"),
        ("m:\n- !OBSPruningModifier\n  final_sparsity: 0.8\n", "the form of SparseML before 1.6"),
        ("a: &a [x]\n" + "".join(f"b{i}: [*a, *a, *a]\n" for i in range(4)), "more than 10 aliases"),
        ("run: &r {model: *r}\n", "the alias *r contains itself"),
        ("a: " + "[" * 100_000, "nested deeper than 20 levels"),
        ("- " * 3000 + "a", "nested deeper than 20 levels"),
        ("a: " + "x" * 1_000_001, "larger than 1000000 bytes"),
        (b"run: {model: \xff}\n", "not UTF-8 at byte 13"),
        ("run: {model: x}\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_tricks_are_errors_before_anything_is_built(write, text, message):
    errors = faults(write(text))
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"run": {}, "run": {}}', "the key 'run' stands twice"),
        ('{"run": {"ratios": [NaN]}}', "not a finite number, found nan"),
        ("[" * 50_000, "cannot be read as a recipe"),
        ("[" * 30 + "]" * 30, "nested deeper than 20 levels"),
        ("{", "cannot be read as a recipe"),
        ("", "cannot be read as a recipe"),
    ],
)
def test_json_has_the_same_checks(write, text, message):
    errors = faults(write(text, "r.json"))
    assert len(errors) == 1
    assert message in errors[0]


def test_a_few_aliases_are_accepted(write):
    path = write("run: {ratios: [0.5], data: &d here, calibration: *d}")
    assert load_recipe(path).run.calibration == "here"


def test_many_entries_give_a_short_message(write):
    many = ",".join(["0.5"] * 2_000)
    assert "0.5 stands twice" in faults(write(f"run: {{ratios: [{many}]}}"))[0]
    wrong = faults(write(f"run: {{ratios: [{','.join(['7'] * 2_000)}]}}"))
    assert (len(wrong), wrong[-1]) == (41, "... and 1960 faults more")


def test_each_unreadable_file_has_its_own_message(write, tmp_path):
    assert "nothing.yaml: cannot read the recipe" in faults(Path("nothing.yaml"), InputNotFoundError)[0]
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: cannot read the recipe" in faults(Path("folder.yaml"), InputNotFoundError)[0]
    assert "a recipe ends in .yaml, .yml, .json, .md, found '.txt'" in faults(write("run: {}", "r.txt"))[0]
    assert "no YAML front matter" in faults(write("# Title\n", "r.md"))[0]


def test_a_message_has_one_line_whatever_the_file_name(write):
    assert faults(write("rum: {}", "two\nlines.yaml"))[0].startswith("'two\\nlines.yaml': rum: ")
    assert len(faults(write('"a\\nb": {}'))) == 1
