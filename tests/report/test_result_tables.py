"""The tables of results and comparisons."""

import re
from pathlib import Path

from report_runs import add_row, document_scores, small_run

from mopcompress.report import write_report
from mopcompress.report.number_format import change, number, percent
from mopcompress.report.pivot import compare_arms, make_result_grid
from mopcompress.report.render import escape_markdown
from mopcompress.report.result_tables import comparisons_table, interval_text, results_table
from mopcompress.report.run_folder import read_run
from mopcompress.report.table import Text


def test_results_are_in_their_columns(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5}, dense=1.0)
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    table = results_table(grid, comparisons)
    mop = run.rows[-1]
    shown = dict(zip(table.columns, table.lines[-1].cells, strict=True))
    assert shown["sparsity"].main == percent(mop.sparsity, decimals=2)
    assert shown["perplexity"].main == number(mop.perplexity) != number(mop.perplexity_macro)
    assert shown["macro perplexity"].main == number(mop.perplexity_macro)
    assert shown["exact match"].main == percent(mop.exact_match)
    assert shown["perplexity against single"].main == interval_text(comparisons[0].micro)
    assert table.lines[-1].strong
    reversed_interval = re.findall(r"[\d.]+", table.lines[1].cells[-1].main)
    assert [float(part) for part in reversed_interval[1:]] == sorted(float(part) for part in reversed_interval[1:])
    assert table.lines[1].cells[-1].main.startswith("+")


def test_few_documents_per_task_give_no_macro_interval(tmp_path: Path) -> None:
    for arm, level in {"single": 3.0, "mop": 2.5}.items():
        scores = document_scores(level, seed=len(arm), count=38)  # 8 tasks, of which the last two have 4 each
        add_row(tmp_path, scores, arm=arm)
    run = read_run(tmp_path)
    (pair,) = compare_arms(run, make_result_grid(run.rows, {}))
    plain = change(pair.macro.estimate)
    assert interval_text(pair.macro) == plain
    assert comparisons_table([pair]).lines[0].cells[4] == Text(plain, "too few documents per task for an interval")
    assert "[" in interval_text(pair.micro)
    _, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert f"| {escape_markdown(plain)} (too few documents per task for an interval) |" in markdown
    caution = "No macro interval, because tasks have fewer than 5 test documents (antonym: 4, dates: 4)."
    assert f"> {caution}" in markdown
    assert caution in html
    assert "Macro without lines: too few documents per task for an interval." in html
