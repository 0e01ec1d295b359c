"""Ends of a command: signals, errors and bugs become one line and an exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import invoke


def stage_that(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    monkeypatch.setattr("mopcompress.entrypoints.compress.compress", lambda *_args, **_more: action())


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_stops_with_one_line(
    stories: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def kill_self() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    stage_that(monkeypatch, kill_self)
    outcome = invoke("prune", stories, "--quiet")
    assert (outcome.code, outcome.err) == (75, "stopped; run the same command again to resume it\n")
    assert signal.getsignal(number) is before


def test_a_second_signal_exits_at_once() -> None:
    script = """
import os, signal
from mopcompress.cli.exit_codes import exit_cleanly
with exit_cleanly():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (75, "", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 71, "out of memory (MemoryError); lower"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 71, "out of memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 71, "out of memory"),
        (OSError(28, "No space left on device"), 74, "free some space"),
        (RuntimeError("Error while serializing: I/O error: No space left on device"), 74, "free some space"),
    ],
)
def test_memory_and_disk_errors_say_what_to_do(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    stage_that(monkeypatch, raising(error))
    outcome = invoke("prune", stories)
    assert outcome.code == code
    assert len(outcome.errors) == 1
    assert words in outcome.errors[0]
    assert list(tmp_path.glob("mopcompress-crash-*")) == []


def test_a_bug_leaves_its_traceback_in_a_file(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that(monkeypatch, raising(ZeroDivisionError("division\nby zero")))
    outcome = invoke("prune", stories)
    [crash] = tmp_path.glob("mopcompress-crash-*.txt")
    assert outcome.code == 1
    assert outcome.errors == [f"error: ZeroDivisionError: division; this is a bug, its traceback is in {crash}"]
    assert "Traceback" not in outcome.err
    assert "Traceback" in crash.read_text()


def test_a_closed_pipe_is_no_error(stories: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mopcompress", "prune", str(stories), "--dry-run", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
