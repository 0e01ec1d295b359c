"""The figures."""

import re
from pathlib import Path

from report_runs import small_run

from mopcompress.report.pivot import compare_arms, make_result_grid
from mopcompress.report.plots import change_figure
from mopcompress.report.result_tables import interval_text


def test_both_panels_of_the_change_show_their_own_interval(tmp_path: Path) -> None:
    run = small_run(tmp_path, {"single": 3.0, "mop": 2.5})
    grid = make_result_grid(run.rows, {})
    comparisons = compare_arms(run, grid)
    figure = change_figure(comparisons)
    assert figure
    texts = [interval_text(comparisons[0].micro), interval_text(comparisons[0].macro)]
    assert texts[0] != texts[1]
    assert [len(re.findall(re.escape(text), figure.svg)) for text in texts] == [1, 1]
