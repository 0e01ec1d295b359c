"""The scripts in `benchmarks`: they load, and tabulate rows that exist."""

import argparse
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
from tiny_models import saved, tiny_model

from mopcompress.progress import silent
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.report.bootstrap import Interval
from mopcompress.results import BenchRow, append_row

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name, monkeypatch):
    """Import a script, which may import others of its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_loads_and_describes_itself(name, monkeypatch, capsys):
    if name == "training_speed":
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = script(name, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def test_the_recovery_study_has_a_recipe_for_every_part(tmp_path, monkeypatch):
    """Their fields exist, and their grids have the arms of the part."""
    study = script("recovery", monkeypatch)
    monkeypatch.setattr(study, "swept_rates", lambda folder: {"mop": 0.5})
    for part in study.PARTS:
        recipe = study.recipe_of(part, tmp_path)
        assert recipe.run.arms == part.grid["arms"]
        assert recipe.recovery.train_batch_size == study.BATCH
        assert recipe.recovery.steps == part.steps
        assert recipe.run.max_new_tokens == (32 if part.folder in study.ANSWERED else None)


def test_a_mixture_setting_is_trained_and_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(tmp_path / "cache"))
    study = script("mixture_settings", monkeypatch)
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(study, "ROWS", 4)
    (tmp_path / "tiny.yaml").write_text("run: {device: cpu, skip_rows_longer_than: 128}\n")
    model = saved(tiny_model(), tmp_path / "model")
    arguments = argparse.Namespace(model=str(model), recipe=tmp_path / "tiny.yaml", data="skills")
    rows = {name: study.measure(name, arguments, silent) for name in ("single", "gate begins at zero")}
    assert rows["single"]["rows"] == 4
    assert rows["single"]["perplexity"] > 1
    assert rows["gate begins at zero"]["changes"] == {"arm": "mop", "gate_logit_scale": 0.0}
    assert rows["gate begins at zero"]["trained_parameters"] > rows["single"]["trained_parameters"]
    assert "%" in study.change(rows["gate begins at zero"], rows["single"])


@pytest.mark.parametrize(
    ("micro", "macro", "least", "shown"),
    [
        ((-0.2, -0.3, -0.1), (-0.2, -0.3, 0.01), 0.0, "yes | no"),
        ((-0.2, -0.3, 0.01), (-0.2, -0.3, -0.1), 0.0, "no | yes"),
        ((-0.2, -0.3, -0.1), (-0.1, -0.2, -0.01), -0.1, "yes | no"),
        ((0.2, 0.1, 0.3), (0.2, math.nan, math.nan), 0.0, "no | n/a"),
    ],
    ids=["micro alone", "macro alone", "macro too small", "neither, and too few documents"],
)
def test_a_claim_has_a_verdict_for_micro_and_for_macro(micro, macro, least, shown, monkeypatch):
    verdicts = script("recovery", monkeypatch)._verdicts(Interval(*micro), Interval(*macro), least)
    assert verdicts.count(" | ") == 3
    assert verdicts.endswith(f" | {shown}")


def test_every_mixture_setting_can_be_named(monkeypatch):
    settings = script("mixture_settings", monkeypatch)
    assert settings.candidates(",".join(settings.CANDIDATES)) == tuple(settings.CANDIDATES)
    assert {*settings.BASELINES, *settings.BASELINES.values()} <= {*settings.CANDIDATES}
    with pytest.raises(argparse.ArgumentTypeError, match="no setting 'other'"):
        settings.candidates("single,other")


def test_costs_of_a_study_have_the_speed_of_its_adapters(tmp_path, monkeypatch):
    """They are means over seeds. An arm that was not swept or not timed has a dash, and so has another folder."""
    costs = {"trained_parameters": 63361, "adapter_bytes": 253588, "evaluate_seconds": 38.2}
    for folder in ("sni", "other"):
        (tmp_path / folder / "sweeps").mkdir(parents=True)
        for arm, seed, seconds in (("none", 0, 0.0), ("mop", 0, 300.0), ("mop", 1, 320.0), ("lora", 0, 278.0)):
            write_row(tmp_path / folder, arm=arm, seed=seed, train_seconds=seconds, **costs)
    trial = {"learning_rate": 0.5, "validation_nats": 2.5, "seconds": 500.0}
    sweep = {"arm": "mop", "steps": 9, "batch_size": 8, "validation_rows": 9, "learning_rate": 0.5, "at_edge": False}
    text = json.dumps(sweep | {"trials": [trial, trial], "seconds": 1008.7})
    (tmp_path / "sni" / "sweeps" / "wanda-50-mop.json").write_text(text)
    spread = {"median": 15.62, "least": 15.0, "greatest": 16.0}
    speeds = {"batch 1": {"bare, tokens/s": spread, "wanda-50-mop-0, tokens/s": spread | {"median": 14.88}}}
    cost = {"asked": {"model": "wanda-50"}, "found": speeds}
    lines = list(script("recovery_costs", monkeypatch).table(tmp_path, cost, "sni"))
    numbers = [[cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in line.split("|")[1:-1]] for line in lines]
    assert [len(line) for line in numbers] == [10] * 8
    assert [line[:3] for line in numbers[2:]] == [
        [folder, "wanda 50%", arm] for folder in ("other", "sni") for arm in ("none", "mop", "lora")
    ]
    assert [line[6:] for line in numbers[2:5]] == [
        ["0", "-", "38", "-"],
        ["310", "-", "38", "-"],
        ["278", "-", "38", "-"],
    ]
    assert numbers[5][6:] == ["0", "-", "38", "15.6"]
    assert numbers[6][3:] == ["2", "63,361", "254 kB", "310", "1009", "38", "14.9"]
    assert numbers[7][6:] == ["278", "-", "38", "-"]


def write_row(folder, **fields):
    """Append a row that is complete but for `fields`."""
    row = {
        **{"ratio": 0.5, "bits": None, "method": "wanda", "data": "skills", "sparsity": 0.5, "weights": 1},
        **{"perplexity": 2.0, "perplexity_macro": 2.0, "exact_match": 0.0, "documents": 1, "scored_tokens": 1},
        **{"model_bytes": 1, "train_steps": 1, "compress_seconds": 1.0, "fallbacks": 0, "peak_bytes": 1},
        **{"per_task": {}, "gate": None, "documents_file": "documents/one.json"},
    }
    append_row(BenchRow(**row | fields), folder / "rows.jsonl")


def test_the_rate_of_every_arm_is_documented():
    """The table that the recipe points to has the rate of each arm, and that of its form with prompts per layer."""
    documented = {}
    for line in (BENCHMARKS / "README.md").read_text().split("## Where each arm's")[1].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5:
            plain, _, deep = cells[1].partition("with `per_layer_prompts`")
            documented |= {
                (arm, form): cells[2] for form, named in ((False, plain), (True, deep)) for arm in ticked(named)
            }
    rates = {(arm, False): defaults.learning_rate for arm, defaults in ARM_DEFAULTS.items()}
    rates |= {
        (arm, True): defaults.deep_learning_rate
        for arm, defaults in ARM_DEFAULTS.items()
        if defaults.deep_learning_rate
    }
    assert documented == {form: "" if rate is None else f"{rate:g}" for form, rate in rates.items()}


def ticked(text):
    """Return the words in backticks."""
    return re.findall(r"`([^`]+)`", text)
