"""The sentences of a report."""

import re
from pathlib import Path

import pytest
from report_runs import add_row, add_rows, document_scores, small_run

from mopcompress.report import write_report
from mopcompress.report.content import caution_lines, headline, summary
from mopcompress.report.number_format import MINUS, number
from mopcompress.report.pivot import compare_arms, make_result_grid
from mopcompress.report.result_tables import results_table
from mopcompress.report.run_folder import read_run


def test_headline_perplexities_are_of_the_compared_seeds(tmp_path: Path) -> None:
    """The means over all seeds would be in the opposite order."""
    run = add_rows(tmp_path, {("single", 0): 2.0, ("single", 1): 3.0, ("single", 2): 3.0, ("mop", 0): 2.2})
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    first_seed = {row.arm: row.perplexity for row in run.rows if row.seed == 0}
    assert comparisons[0].perplexities == pytest.approx((first_seed["mop"], first_seed["single"]))
    (sentence,) = headline(grid, comparisons)
    assert sentence.text.startswith(f"mop {number(first_seed['mop'])} against single {number(first_seed['single'])}: +")
    remarks = {line.cells[1].main: line.cells[-1].minor for line in results_table(grid, comparisons).lines}
    assert remarks["mop"].endswith("of seed 0")
    assert remarks["single"] == ""
    run = add_rows(tmp_path, {("mop", 1): 2.2, ("mop", 2): 2.2})
    grid = make_result_grid(run.rows, {})
    assert all("of seed" not in line.cells[-1].minor for line in results_table(grid, compare_arms(run, grid)).lines)


def test_arms_without_shared_seeds_are_compared_with_a_caution(tmp_path: Path) -> None:
    run = add_rows(
        tmp_path, {("single", 0): 2.0, ("single", 1): 3.0, ("mop", 2): 2.2, ("mop", 3): 2.4, ("none", 0): 4.0}
    )
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    mixture = next(pair for pair in comparisons if (pair.first, pair.second) == ("mop", "single"))
    assert sorted(mixture.seeds) == pytest.approx([-0.8, -0.6, 0.2, 0.4], abs=0.02)
    cautions = [line for line in caution_lines(run, grid, comparisons) if "no seed in common" in line]
    assert len(cautions) == 1
    assert cautions[0].startswith("wanda 50%: mop and single have no seed in common")


def test_a_single_seed_is_named_with_its_arms_and_settings(tmp_path: Path) -> None:
    def single_seeds() -> list[str]:
        run = read_run(tmp_path)
        grid = make_result_grid(run.rows, {})
        return [
            line.partition(":")[0] for line in caution_lines(run, grid, compare_arms(run, grid)) if "One seed" in line
        ]

    add_rows(tmp_path, {("none", 0): 4.0, ("single", 0): 3.0, ("mop", 0): 2.5, ("eora", 0): 3.5})
    assert single_seeds() == ["One seed for each arm"]
    add_rows(tmp_path, {(arm, seed): 2.0 for arm in ("single", "mop") for seed in (1, 2)})
    assert single_seeds() == []
    add_rows(tmp_path, {("single", 0): 3.0, ("mop", 0): 2.5, ("mop", 1): 2.5, ("lora", 0): 2.0}, ratio=0.8)
    assert single_seeds() == ["One seed for lora; single at wanda 80%"]


def test_headline_compares_the_mixture_with_single_and_none(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5})
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    (sentence,) = headline(grid, comparisons)
    none, single, mop = (number(row.perplexity) for row in run.rows)
    pattern = rf"mop {mop} against single {single}: {MINUS}\d+ % \[.*\]; against none {none}: {MINUS}\d+ % \[.*\]"
    assert sentence.setting == "wanda 50%"
    assert re.fullmatch(pattern, sentence.text.replace("\N{NO-BREAK SPACE}", " "))
    assert "better in 1 of 1 settings and worse in 0" in summary(comparisons)


def test_headline_shows_no_difference_if_the_interval_has_zero(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0})
    add_row(tmp_path, document_scores(3.0, seed=44), arm="mop")
    run = read_run(tmp_path)
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    assert "no difference shown" in headline(grid, comparisons)[0].text
    assert "no difference is shown in 1" in summary(comparisons)


def test_enough_documents_need_no_caution(folder: Path) -> None:
    markdown = write_report(folder)[1].read_text()
    assert "too few documents" not in markdown
    assert "tasks have fewer than" not in markdown
