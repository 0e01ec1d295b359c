"""The tables of costs and sweeps."""

from pathlib import Path

from report_runs import arm_sweep, small_run, write_sweeps

from mopcompress.report import write_report
from mopcompress.report.cost_tables import costs_table, sweeps_table
from mopcompress.report.pivot import make_result_grid
from mopcompress.report.run_folder import read_run


def test_costs_are_in_their_columns(tmp_path: Path) -> None:
    table = costs_table(make_result_grid(small_run(tmp_path, {"mop": 2.5}).rows, {}))
    shown = {name: cell.main for name, cell in zip(table.columns, table.lines[-1].cells, strict=True)}
    values = ("120,968", "240", "296 kB", "269 MB", "3 min 32 s", "1 min 36 s", "14.2 s", "2.4 GB", "0")
    assert tuple(text.replace("\N{NO-BREAK SPACE}", " ") for text in shown.values())[2:] == values
    assert tuple(shown)[2] == "trained parameters"
    assert tuple(shown)[-1] == "fallbacks"


def test_every_sweep_is_a_row_with_its_trials_and_time(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0, "mop": 2.5, "lora": 2.4})
    write_sweeps(tmp_path, arm_sweep("mop"), arm_sweep("lora", at_edge=True, learning_rate=1e-2, seconds=59.0))
    run = read_run(tmp_path)
    table = sweeps_table(make_result_grid(run.rows, {}), run.sweeps)
    texts = [[cell.main.replace("\N{NO-BREAK SPACE}", " ") for cell in line.cells] for line in table.lines]
    trials = "0.167: 2.750, 0.5: 2.500, 1.5: diverged"
    assert texts == [
        ["wanda 50%", "mop", trials, "0.5", "120", "90", "17 min 11 s"],
        ["", "lora", trials, "0.01", "120", "90", "59.0 s"],
    ]
    assert [line.cells[3].minor != "" for line in table.lines] == [False, True]
    for path in write_report(tmp_path)[1:]:
        assert "Cost of choosing learning rates" in path.read_text()


def test_a_run_without_a_sweep_has_no_sweep_table(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0})
    for path in write_report(tmp_path)[1:]:
        assert "choosing learning rates" not in path.read_text()
