"""The environment of a run: versions, commit, device, time and memory."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mopcompress.errors import UsageError

_PACKAGES = ("mopcompress", "torch", "transformers", "datasets", "safetensors")


def provenance(device: torch.device) -> dict[str, Any]:
    """Return versions, commit and machine, for a manifest."""
    commit, dirty = _commit()
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": commit,
        "dirty": dirty,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    # Linux's getrusage can return the peak of the process that started this one
    peak_kb = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if peak_kb:
        return 1024 * int(peak_kb[1])
    if sys.platform == "win32":
        import psutil  # Windows has no `resource`; accelerate depends on psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA, else MPS, else the CPU.

    Raises `UsageError` for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise UsageError(f"--device: {name} is not on this machine; use cpu or auto")
    return device


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that this package runs from, and True if files differ from it.

    Both are None for an installed package.
    """
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return None, None
    git = ["git", "-C", os.fspath(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit.stdout.strip(), bool(changes.stdout.strip())
