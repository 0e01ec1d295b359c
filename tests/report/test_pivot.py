"""Rows arranged by setting and arm, and comparisons."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_runs import TASKS, add_row, add_rows, answered_run, document_scores, small_run

from mopcompress.grid import QUANTIZER
from mopcompress.recipe.arms import ARM_NAMES
from mopcompress.recipe.run_spec import PRUNING_METHODS
from mopcompress.report.content import caution_lines
from mopcompress.report.pivot import (
    ARM_ORDER,
    METHOD_ORDER,
    best_arms,
    compare_arms,
    make_result_grid,
    perplexity_spread,
    recovery,
)
from mopcompress.report.result_tables import results_table
from mopcompress.report.run_folder import read_run


def test_estimates_are_differences_of_log_perplexity(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 2.0, "mop": 1.7})
    pair = compare_arms(run, make_result_grid(run.rows, {}))[0]
    single, mop = run.rows
    assert (pair.first, pair.second) == ("mop", "single")
    assert pair.micro.estimate == pytest.approx(math.log(mop.perplexity / single.perplexity), abs=1e-12)
    assert pair.macro.estimate == pytest.approx(math.log(mop.perplexity_macro / single.perplexity_macro), abs=1e-12)
    assert pair.seeds == pytest.approx((pair.micro.estimate,))


def test_seeds_are_averaged_before_the_interval(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 2.0})
    for seed, level in enumerate((1.5, 1.9)):
        add_row(tmp_path, document_scores(level, seed=2), arm="mop", seed=seed)
    add_row(tmp_path, document_scores(2.0, seed=6), arm="single", seed=1)
    run = read_run(tmp_path)
    pair = compare_arms(run, make_result_grid(run.rows, {}))[0]
    assert len(pair.seeds) == 2
    assert pair.seeds[1] - pair.seeds[0] == pytest.approx(0.4, abs=0.02)
    assert pair.micro.estimate == pytest.approx(sum(pair.seeds) / 2)


def test_seeds_are_paired_by_number_not_by_order(tmp_path: Path) -> None:
    levels = {("single", 1): 2.5, ("single", 2): 3.0, ("mop", 0): 1.0, ("mop", 2): 2.9}
    run = add_rows(tmp_path, levels)
    assert compare_arms(run, make_result_grid(run.rows, {}))[0].seeds == pytest.approx((-0.1,), abs=0.01)


def test_an_arm_with_fewer_seeds_is_compared_over_shared_seeds(tmp_path: Path) -> None:
    """The arm `none` has no seeds: it is compared with every seed."""
    levels = {("none", 0): 3.0, ("mop+", 0): 1.0, ("mop", 0): 1.5, ("mop", 1): 1.9, ("mop", 2): 2.3}
    run = add_rows(tmp_path, levels)
    grid = make_result_grid(run.rows, {})
    pairs = {(pair.first, pair.second): pair for pair in compare_arms(run, grid)}
    assert pairs["mop+", "mop"].seeds == pytest.approx((-0.5,), abs=0.02)
    assert pairs["mop+", "mop"].micro.estimate == pytest.approx(-0.5, abs=0.02)
    assert pairs["mop", "none"].seeds == pytest.approx((-1.5, -1.1, -0.7), abs=0.02)
    assert pairs["mop", "none"].micro.estimate == pytest.approx(-1.1, abs=0.02)
    assert any(line.startswith("One seed for mop+:") for line in caution_lines(run, grid, compare_arms(run, grid)))
    run = add_rows(tmp_path, {("mop+", 1): 1.0, ("mop+", 2): 1.0})
    grid = make_result_grid(run.rows, {})
    assert not any("One seed" in line for line in caution_lines(run, grid, compare_arms(run, grid)))


def test_settings_and_arms_are_in_reading_order(folder: Path) -> None:
    run = read_run(folder)
    grid = make_result_grid(tuple(reversed(run.rows)), run.spec)
    pruned = ("sparsegpt 50%", "sparsegpt 85%", "magnitude 50%", "magnitude 85%")
    assert grid.settings == ("dense", *pruned, "gptq 4-bit", "gptq 3-bit")
    assert grid.arms == ("none", "single", "mop")
    assert [row.seed for row in grid.rows("gptq 3-bit", "mop")] == [0, 1, 2]
    assert not grid.missing


def test_recovery_is_zero_at_none_and_one_at_dense(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 3.0, "single": 2.0, "mop": 1.0}, dense=2.0)
    dense, none, single, mop = run.rows
    grid = make_result_grid([dense, none, replace(single, perplexity=dense.perplexity), mop], {})
    assert recovery(grid, "wanda 50%", "none") == 0.0
    assert recovery(grid, "wanda 50%", "single") == 1.0
    assert recovery(grid, "wanda 50%", "mop") == pytest.approx(
        math.log(none.perplexity / mop.perplexity) / math.log(none.perplexity / dense.perplexity)
    )
    assert recovery(grid, "dense", "none") is None


def test_recovery_is_also_relative_to_dense_with_the_same_arm(tmp_path: Path) -> None:
    dense, none, single = small_run(tmp_path, {"none": 3.0, "single": 2.0}, dense=1.0).rows
    trained = replace(dense, arm="single", perplexity=dense.perplexity / 2)
    grid = make_result_grid([dense, trained, none, single], {})
    fraction = recovery(grid, "wanda 50%", "single", dense_arm="single")
    lost = math.log(none.perplexity / trained.perplexity)
    assert fraction == pytest.approx(math.log(none.perplexity / single.perplexity) / lost)
    table = results_table(grid, ())
    cell = dict(zip(table.columns, table.lines[-1].cells, strict=True))["recovery"]
    assert cell.minor == f"{fraction:.2f} of the dense model with single"


def test_recovery_is_none_where_it_is_undefined(tmp_path: Path) -> None:
    dense, none, mop = small_run(tmp_path, {"none": 3.0, "mop": 2.0}, dense=1.0).rows
    assert recovery(make_result_grid([none, mop], {}), "wanda 50%", "mop") is None
    assert recovery(make_result_grid([dense, replace(none, perplexity=math.inf), mop], {}), "wanda 50%", "mop") is None
    for lost in (1.0, 0.99):  # nothing, or less than nothing
        unharmed = replace(none, perplexity=lost * dense.perplexity)
        assert recovery(make_result_grid([dense, unharmed, mop], {}), "wanda 50%", "mop") is None


def test_the_mean_over_seeds_agrees_with_differences_of_logs(tmp_path: Path) -> None:
    row = small_run(tmp_path, {"mop": 2.0}).rows[0]
    rows = [replace(row, perplexity=10.0), replace(row, perplexity=1000.0)]
    spread = perplexity_spread(rows, lambda row: row.perplexity)
    assert (spread.mean, spread.low, spread.high) == (pytest.approx(100.0), 10.0, 1000.0)


def test_the_best_arm_has_the_lowest_perplexity(tmp_path: Path) -> None:
    rows = small_run(tmp_path, {"none": 3.0, "single": 1.5, "mop": 2.0}).rows
    assert best_arms(make_result_grid(rows, {}), "wanda 50%") == {"single"}
    assert best_arms(make_result_grid(rows[:1], {}), "wanda 50%") == set()


def test_missing_cells_are_those_the_recipe_requests(folder: Path) -> None:
    run = read_run(folder)
    rows = [row for row in run.rows if row.cell not in {("gptq 3-bit", "mop", 2), ("wanda 50%", "none", 0)}]
    spec = dict(run.spec) | {"methods": ["magnitude", "sparsegpt", "wanda"], "ratios": [0, 0.5]}
    missing = set(make_result_grid(rows, spec).missing)
    wanda = {("wanda 50%", arm, seed) for arm in ("single", "mop") for seed in (0, 1, 2)} | {("wanda 50%", "none", 0)}
    assert missing == {("gptq 3-bit", "mop", 2)} | wanda
    assert not make_result_grid(run.rows, {}).missing


def test_an_untrained_arm_is_not_missing_under_other_seeds(folder: Path) -> None:
    run = read_run(folder)
    spec = dict(run.spec) | {"seeds": [7, 0, 1, 2], "arms": ["none"]}
    assert not make_result_grid(run.rows, spec).missing


def test_rivals_are_compared_with_ours_and_baselines_alone(tmp_path: Path) -> None:
    arms = {"none": 4.0, "single": 3.0, "lora": 2.8, "norms": 2.9, "mop": 2.5, "mop+": 2.2}
    run = small_run(tmp_path, arms)
    pairs = [(pair.first, pair.second) for pair in compare_arms(run, make_result_grid(run.rows, {}))]
    ours = [("mop+", other) for other in ("mop", "lora", "norms", "single", "none")]
    ours += [("mop", other) for other in ("lora", "norms", "single", "none")]
    rivals = [(arm, other) for arm in ("lora", "norms") for other in ("single", "none")]
    assert pairs == [*ours, *rivals, ("single", "none")]


def test_rouge_has_a_paired_interval_over_equal_documents(tmp_path: Path) -> None:
    run = answered_run(tmp_path, seeds=(0, 1))
    grid = make_result_grid(run.rows, run.spec)
    (pair,) = (pair for pair in compare_arms(run, grid) if (pair.first, pair.second) == ("mop", "none"))
    means = {
        arm: np.mean([run.documents[row.cell].written.rouge_l for row in grid.rows("wanda 50%", arm)], axis=0)
        for arm in ("mop", "none")
    }
    difference = means["mop"] - means["none"]
    assert pair.rouge_l is not None
    assert pair.rouge_l.estimate == pytest.approx(difference.mean())
    assert pair.rouge_l.low < pair.rouge_l.estimate < pair.rouge_l.high
    names = np.asarray(run.documents[run.rows[0].cell].tasks)
    assert pair.rouge_l_macro is not None
    by_task = [difference[names == task].mean() for task in TASKS[:4]]
    assert pair.rouge_l_macro.estimate == pytest.approx(np.mean(by_task))
    assert pair.rouge_l_macro.low < pair.rouge_l_macro.estimate < pair.rouge_l_macro.high


def test_every_arm_and_method_has_a_place_in_the_order() -> None:
    assert sorted(ARM_ORDER) == sorted(ARM_NAMES)
    assert ARM_ORDER[:4] == ("none", "single", "mop", "mop+")
    assert ("dense", *PRUNING_METHODS, QUANTIZER) == METHOD_ORDER


def test_unknown_arms_and_methods_come_last(tmp_path: Path) -> None:
    row = small_run(tmp_path, {"mop": 2.0}).rows[0]
    arms = ("zeta", "norms", "alpha", "lora", "single", "idp")
    grid = make_result_grid([replace(row, arm=arm) for arm in arms], {})
    assert grid.arms == ("single", "idp", "lora", "norms", "alpha", "zeta")
    methods = ("unheard of", "structured", "alps")
    grid = make_result_grid([replace(row, method=method) for method in methods], {})
    assert grid.settings == ("alps 50%", "structured 50%", "unheard of 50%")
