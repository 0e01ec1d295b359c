"""Flags of `run:`: text as typed, and one clear line for every impossible value."""

import pytest
from recipe_builders import faults

from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe import (
    load_recipe,
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ratios": "50"}, "--ratios: 50 is not a share of weights between 0 and 1; did you mean 0.5?"),
        (
            {"ratios": "0,0.5"},
            "--ratios: 0 is not a share to remove: 0 is the dense model, which every bench measures",
        ),
        ({"ratios": (0.5, 1.0)}, "--ratios: 1.0 is not a share of weights between 0 and 1: no weight would be left"),
        ({"ratios": "-0.1"}, "--ratios: -0.1 is not a share of weights between 0 and 1"),
        ({"ratios": "nan"}, "--ratios: nan is not a finite number"),
        ({"ratios": "0.5,,0.9"}, "--ratios: an entry is empty: write values with one comma between, found '0.5,,0.9'"),
        ({"ratios": "0.5,0.50"}, "--ratios: (0.5, 0.5) is not distinct: 0.5 stands twice"),
        ({"ratios": "half"}, "--ratios: 'half' is not a number"),
        ({"seeds": "0,-1"}, "--seeds: -1 is not greater than or equal to 0"),
        ({"seeds": "1.5"}, "--seeds: 1.5 is not a whole number"),
        ({"bits": "4,17"}, "--bits: 17 is not one of 2, 3, 4, 8: no stock tool stores another width; did you mean 8?"),
        (
            {"methods": "wnada"},
            "--methods: 'wnada' is not one of sparsegpt, alps, wanda, magnitude, structured; did you mean 'wanda'?",
        ),
        (
            {"methods": "gptq"},
            "--methods: 'gptq' is not one of sparsegpt, alps, wanda, magnitude, structured; did you mean --bits?",
        ),
        ({"arms": ["mop", "mop"]}, "stands twice"),
        ({"map": "question"}, "--map: 'question' is not column=field"),
        ({"max_seq_length": 4}, "--max-seq-length: 4 is not greater than or equal to 8"),
        ({"device": "gpu"}, "--device: 'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ({"ratio": "0.5"}, "--ratio: no such field; did you mean 'ratios'?"),
    ],
)
def test_an_impossible_flag_is_a_usage_error(flags, message):
    errors = faults(None, UsageError, flags)
    assert len(errors) == 1
    assert message in errors[0]


def test_several_impossible_flags_come_at_once():
    assert len(faults(None, UsageError, {"ratios": "2,3", "seed": -1, "bits": "4,,3"})) == 4


def test_flags_are_read_as_typed():
    run = load_recipe(
        None, {"ratios": "", "bits": "4, 3", "methods": "wanda,sparsegpt", "map": "q=instruction,a=output", "seed": "7"}
    ).run
    assert (run.ratios, run.bits, run.methods, run.seed) == ((), (4, 3), ("wanda", "sparsegpt"), 7)
    assert run.columns == {"q": "instruction", "a": "output"}
    assert load_recipe(None, {"group_size": "-1"}).run.group_size is None
    assert load_recipe(None, {"seeds": (3, 4), "model": "123"}).run.model == "123"


def test_a_fault_of_the_recipe_comes_before_one_of_a_flag(write):
    assert faults(write("rum: {}"), RecipeError, {"ratios": "50"})
