"""Fixtures of recipes."""

from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a recipe into the working directory, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def to(text, name="r.yaml"):
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to
