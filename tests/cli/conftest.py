"""Fixtures of the command line: a folder and a cache of its own, and models that commands made."""

from pathlib import Path

import pytest
from cli_runner import CALIBRATED, QUICK_RECOVERY, invoke, write_data


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _isolated(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPCOMPRESS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pruned(stories: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the small model's weights. Copy it to change it."""
    target = tmp_path_factory.mktemp("runs") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(cache))
        outcome = invoke("prune", stories, *CALIBRATED, "--output-dir", target)
    assert outcome.code == 0, outcome.err
    return target


@pytest.fixture(scope="session")
def adapter(pruned: Path, data: Path, cache: Path) -> Path:
    """An adapter of arm mop for the pruned model."""
    target = pruned.parent / "adapter"
    words = ("--data", data, *QUICK_RECOVERY, "--device", "cpu", "--output-dir", target, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPCOMPRESS_CACHE", str(cache))
        outcome = invoke("recover", pruned, *words)
    assert outcome.code == 0, outcome.err
    assert outcome.json["train_steps"] == 2
    return target
