"""The tables by task and of sample answers."""

import json
import re
from pathlib import Path

import pytest
from report_runs import TASKS, answered_run, small_run

from mopcompress.report import write_report
from mopcompress.report.number_format import number, percent
from mopcompress.report.pivot import make_result_grid
from mopcompress.report.table import Text
from mopcompress.report.task_tables import task_tables


def test_task_tables_show_scores_next_to_dense(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0, "mop": 2.5}, dense=1.0)
    (table,) = task_tables(make_result_grid(run.rows, {}))
    assert (table.title, table.columns) == ("wanda 50%", ("task", "dense", "single", "mop"))
    assert [line.cells[0].main for line in table.lines] == list(TASKS)
    score = run.rows[-1].per_task[TASKS[2]]
    assert table.lines[2].cells[3] == Text(number(score.perplexity), percent(score.exact_match, decimals=0) + " exact")


def test_the_report_shows_scores_and_answers(tmp_path: Path) -> None:
    run = answered_run(tmp_path)
    markdown = next(path for path in write_report(tmp_path) if path.name == "report.md").read_text()
    line = next(line for line in markdown.splitlines() if "| mop |" in line.replace("**", "") and "reverse" not in line)
    mop = next(row for row in run.rows if row.arm == "mop")
    assert mop.rouge_l is not None
    assert f"| {100 * mop.rouge_l:.1f} |" in line
    assert "## Sample answers" in markdown
    assert "&lt;b&gt;it&lt;/b&gt; \\| once" in markdown
    assert "it it it" in markdown
    assert "it " * 150 not in markdown
    assert "<b>it</b>" not in (tmp_path / "report.html").read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert {cell["arm"]: cell["rouge_l"]["mean"] for cell in numbers["cells"]}["mop"] == mop.rouge_l
    assert numbers["comparisons_log_perplexity"][0]["rouge_l"]["estimate"] == pytest.approx(0.246)


def test_a_report_without_answers_has_no_answer_columns(folder: Path) -> None:
    for path in write_report(folder):
        assert path.suffix == ".json" or not re.search("ROUGE|written|generated answer", path.read_text())
