"""Whole reports on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import small_run

from mopcompress.errors import StorageError
from mopcompress.report import write_report


def test_reports_are_written_next_to_the_rows(folder: Path) -> None:
    paths = write_report(folder)
    assert paths == [folder / "report.json", folder / "report.md", folder / "report.html"]
    assert not list(folder.glob(".*"))
    numbers = json.loads(paths[0].read_text())
    assert len(numbers["rows"]) == 43
    assert numbers["manifest"]["commit"] == "56cc124"
    html = paths[2].read_text()
    for fact in (
        "SmolLM2-135M-Instruct on skills",
        "dropped as too long: 3",
        "sparsegpt 85%: 2 matrices",
        "0f3a0f3a",
        "56cc124",
        "3 min 33 s",
    ):
        assert fact in html.replace("\N{NO-BREAK SPACE}", " "), fact
    assert "&#39;runs/my grid&#39;" in html


def test_reports_are_the_same_bytes_every_time(folder: Path) -> None:
    first = [path.read_bytes() for path in write_report(folder)]
    code = f"from pathlib import Path; from mopcompress.report import write_report; write_report(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [(folder / f"report.{kind}").read_bytes() for kind in ("json", "md", "html")] == first


def test_an_unwritable_report_leaves_no_scratch_file(tmp_path: Path) -> None:
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
