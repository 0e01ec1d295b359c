"""What scripts in `benchmarks` make of rows that are there."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from mopcompress.report.intervals import Interval

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name, monkeypatch):
    found = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("micro", "macro", "least", "shown"),
    [
        ((-0.2, -0.3, -0.1), (-0.2, -0.3, 0.01), 0.0, "yes | no"),
        ((-0.2, -0.3, 0.01), (-0.2, -0.3, -0.1), 0.0, "no | yes"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.2, -0.01), -0.1, "yes | no"),
        ((0.2, 0.1, 0.3), (0.2, math.nan, math.nan), 0.0, "no | no"),
    ],
    ids=["micro alone", "macro alone", "macro too small", "neither, and too few documents"],
)
def test_a_claim_has_a_verdict_over_tokens_and_one_over_tasks(micro, macro, least, shown, monkeypatch):
    verdicts = script("recovery", monkeypatch)._verdicts(Interval(*micro), Interval(*macro), least)
    assert verdicts.count(" | ") == 3
    assert verdicts.endswith(f" | {shown}")
