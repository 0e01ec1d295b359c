"""The environment of a run, as manifests have it."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest
import torch

from mopcompress import environment
from mopcompress.environment import choose_device, now, peak_bytes, provenance
from mopcompress.errors import UsageError

CPU = torch.device("cpu")


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the package one folder below its root, as in a checkout."""
    module = tmp_path / "repository" / "mopcompress" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path / "repository"


def test_provenance_has_the_commit_of_the_checkout(checkout: Path) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "First")
    recorded = provenance(CPU)
    assert (recorded["commit"], recorded["dirty"]) == (git(checkout, "rev-parse", "--short", "HEAD"), False)
    (checkout / "mopcompress" / "environment.py").write_text("changed")
    assert provenance(CPU)["dirty"] is True
    assert provenance(CPU)["commit"] == recorded["commit"]


def test_an_installed_package_has_no_commit(checkout: Path) -> None:
    """Nor does one that lies in a folder of somebody else's repository."""
    git(checkout.parent, "init", "-q")
    recorded = provenance(CPU)
    assert (recorded["commit"], recorded["dirty"]) == (None, None)


def test_provenance_names_versions_and_machine() -> None:
    recorded = provenance(CPU)
    assert recorded["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "mopcompress", "torch", "transformers"} <= recorded["versions"].keys()
    assert (recorded["device"], recorded["threads"]) == ("cpu", torch.get_num_threads())


def test_the_time_is_in_utc_to_the_second() -> None:
    assert now().endswith("+00:00")
    assert len(now()) == len("2026-01-01T00:00:00+00:00")


def test_peak_memory_is_in_bytes_and_grows() -> None:
    before = peak_bytes()
    assert before > 50 * 2**20  # torch alone
    block = torch.ones(before // 4)  # fp32: as many bytes again
    assert peak_bytes() >= max(before, block.nbytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_missing_device_is_an_error() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in {"cpu", "mps"}
    with pytest.raises(UsageError, match="--device: cuda is not on this machine; use cpu or auto"):
        choose_device("cuda")
