"""The tables of what gates choose."""

import json
import math
from dataclasses import replace
from pathlib import Path

from report_runs import TASKS, add_row, document_scores, gate_statistics, small_run

from mopcompress.report import write_report
from mopcompress.report.gate_tables import confusion_tables, gates_table
from mopcompress.report.number_format import number, percent
from mopcompress.report.pivot import make_result_grid
from mopcompress.report.run_folder import read_run


def test_confusion_and_load_of_each_gated_arm_are_shown(folder: Path) -> None:
    run = read_run(folder)
    grid = make_result_grid(run.rows, run.spec)
    tables = confusion_tables(grid)
    assert [table.title for table in tables] == [f"{setting}, mop" for setting in grid.settings if setting != "dense"]
    gate = grid.rows("gptq 3-bit", "mop")[0].gate
    assert gate is not None
    lines = [[cell.main for cell in line.cells] for line in tables[-1].lines]
    assert tables[-1].columns == ("task", *map(str, range(1, 9)))
    assert [line[0] for line in lines] == [*gate.tasks, "load"]
    assert [list(map(int, line[1:])) for line in lines[:-1]] == gate.confusion
    assert lines[-1][1:] == [f"{weight:.2f}" for weight in gate.load]
    assert "1 capitals, 2 reverse" in tables[-1].note
    for path in write_report(folder)[1:]:
        text = path.read_text()
        assert "Choices of the gate" in text
        assert "gptq 3-bit, mop" in text


def test_rows_without_counts_have_no_confusion_table(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in lines:
        for name in ("confusion", "load", "domains"):
            if row["gate"]:
                del row["gate"][name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = read_run(folder)
    assert confusion_tables(make_result_grid(run.rows, run.spec)) == ()
    for path in write_report(folder)[1:]:
        assert "by the expert with the highest weight" not in path.read_text()


def test_accuracy_entropy_and_load_are_in_a_table(tmp_path: Path) -> None:
    """They are means over seeds. Experts without tasks have no accuracy, and some rows have no load."""
    statistics = replace(gate_statistics(TASKS, sharpness=2.0), accuracy=0.75, entropy_nats=1.0, load=[0.5] * 7 + [4.5])
    gates = {
        ("mop", 0): statistics,
        ("mop", 1): replace(statistics, accuracy=0.25, entropy_nats=0.5, load=[0.9] * 7 + [1.7]),
        ("mop+", 0): replace(statistics, accuracy=None, load=()),
        ("idp", 0): replace(statistics, load=[0.0] * 7 + [1.0]),
        ("single", 0): None,
    }
    for (arm, seed), gate in gates.items():
        add_row(tmp_path, document_scores(2.0, seed=1), arm=arm, seed=seed, gate=gate)
    run = read_run(tmp_path)
    table = gates_table(make_result_grid(run.rows, {}))
    cells = [[(cell.main, cell.minor) for cell in line.cells] for line in table.lines]
    mop, mop_plus, idp = (dict(zip(table.columns, line, strict=True)) for line in cells)
    assert (mop["setting"], mop_plus["arm"]) == (("wanda 50%", ""), ("mop+", ""))
    assert mop["accuracy"] == (percent(0.5), f"{percent(0.25)} to {percent(0.75)}")
    assert mop["entropy, nats"] == ("0.750", "0.500 to 1.000")
    assert mop["ln(experts)"] == (number(math.log(8)), "")
    assert mop["highest load"] == ("3.10", "1.70 to 4.50")
    assert [mop_plus[name][0] for name in ("accuracy", "entropy, nats", "highest load")] == ["-", "1.000", "-"]
    assert idp["highest load"] == ("8.00", "")  # one expert takes everything; its weights add up to 1
    for path in write_report(tmp_path)[1:]:
        assert "entropy, nats" in path.read_text()


def test_a_run_without_a_gate_has_no_gate_section(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 4.0, "single": 3.0})
    for path in write_report(tmp_path)[1:]:
        assert "Choices of the gate" not in path.read_text()
