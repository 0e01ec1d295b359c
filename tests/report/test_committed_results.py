"""Reports of the results in benchmarks/results, whose rows were written by older versions too."""

import shutil
from pathlib import Path

import pytest

from mopcompress.report import write_report
from mopcompress.report.content import build_content
from mopcompress.report.pivot import compare_arms, make_result_grid
from mopcompress.report.render import escape_markdown
from mopcompress.report.result_tables import results_table
from mopcompress.report.run_folder import read_run
from mopcompress.report.table import Text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OF_LLM_COMPRESSOR = "2026-11-23-against-llmcompressor"  # rows of another form, which its own script tabulates
FOLDERS = {
    str(path.parent.relative_to(RESULTS)): path.parent
    for path in sorted(RESULTS.rglob("rows.jsonl"))
    if path.parent.name != OF_LLM_COMPRESSOR
}


def committed_numbers(report: str) -> set[tuple[str, ...]]:
    """Return the numbers of each line of the result table of a report.md, without the comparison with single.

    That comparison is left out because one report was drawn before seeds were paired.
    """
    section = report.split("\n## Results\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]  # after the titles and the rule
    return {tuple(cell.strip(" *") for cell in line[2:-2].split(" | ")[2:-1]) for line in lines}


def cell_text(cell: Text) -> str:
    return escape_markdown(cell.main) + (f" ({escape_markdown(cell.minor)})" if cell.minor else "")


def test_there_are_results_to_report() -> None:
    assert len(FOLDERS) >= 45


@pytest.mark.parametrize("name", FOLDERS)
def test_committed_rows_give_the_numbers_of_their_report(name: str) -> None:
    run = read_run(FOLDERS[name])
    grid = make_result_grid(run.rows, run.spec)
    table = results_table(grid, compare_arms(run, grid))
    assert {(row.setting, row.arm) for row in run.rows} <= grid.cells.keys()
    shown = {tuple(cell_text(cell) for cell in line.cells[2:-1]) for line in table.lines}
    assert shown == committed_numbers((FOLDERS[name] / "report.md").read_text(encoding="utf-8"))


def test_a_committed_folder_is_reported_again(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS["2026-11-28-main-job"], tmp_path / "run")
    paths = write_report(tmp_path / "run")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert "<svg" in paths[2].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_every_committed_folder_has_a_whole_report(name: str) -> None:
    content, numbers = build_content(read_run(FOLDERS[name]))
    assert content.results.lines
    assert len(numbers["rows"]) == len(read_run(FOLDERS[name]).rows)
