"""Fixtures for the tests of reports."""

from pathlib import Path

import pytest
from report_runs import full_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three methods, three arms and three seeds; a test may change it."""
    full_run(tmp_path)
    return tmp_path
