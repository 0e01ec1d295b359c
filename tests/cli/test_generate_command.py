"""`generate` as a person uses it on a terminal, and as a script does through a pipe."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_runner import invoke

ASKED = ("once upon a time", "a cat")
WORDS = ("--max-new-tokens", "12", "--device", "cpu")


@contextmanager
def terminal(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`mopcompress generate` on a pseudo-terminal of its own."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mopcompress", "generate", str(folder), *WORDS, "--quiet"]
    environment = os.environ | {"TERM": "dumb"}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    try:
        yield child, ours
    finally:
        child.kill()
        child.communicate()
        os.close(ours)


def read_until(terminal: int, end: str, *, seconds: float = 60) -> str:
    """Return what the terminal shows up to `end`."""
    shown, deadline = "", time.monotonic() + seconds
    while not shown.endswith(end):
        if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
            raise AssertionError(f"no {end!r} after {shown!r}")
        shown += os.read(terminal, 4096).decode()
    return shown.replace("\r\n", "\n")


def singly(folder: Path) -> list[str]:
    return [invoke("generate", folder, *WORDS, "--prompt", prompt).out for prompt in ASKED]


@pytest.mark.parametrize("end", [pytest.param("\x04", marks=pytest.mark.slow), "\n"], ids=["ctrl-d", "an empty line"])
def test_several_turns_on_a_terminal_until_the_end(stories: Path, end: str) -> None:
    with terminal(stories) as (child, screen):
        read_until(screen, "> ")
        for prompt, answer in zip(ASKED, singly(stories), strict=True):
            os.write(screen, f"{prompt}\n".encode())
            assert read_until(screen, "> ") == f"{prompt}\n{answer}> "
        os.write(screen, end.encode())
        assert child.wait(timeout=30) == 0


def test_an_answer_is_shown_piece_by_piece(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        """Remembers what stood there at each flush."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def flush(self) -> None:
            if self.getvalue() not in self.seen:
                self.seen.append(self.getvalue())

    screen, lines = Screen(), iter([ASKED[0], ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    monkeypatch.setattr("cli_runner.io.StringIO", lambda: screen)
    invoke("generate", stories, *WORDS)
    assert len(screen.seen) > 2
    assert all(after.startswith(before) for before, after in zip(screen.seen, screen.seen[1:], strict=False))


def test_lines_of_a_pipe_are_answered(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(ASKED)))
    assert invoke("generate", stories, *WORDS).out == "\n".join(singly(stories))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(ASKED)))
    answers = invoke("generate", stories, *WORDS, "--json").json["answers"]
    assert [answer["prompt"] for answer in answers] == list(ASKED)


def test_an_empty_pipe_is_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    outcome = invoke("generate", stories)
    assert outcome.code == 2
    assert "nothing comes through stdin" in outcome.err


@pytest.mark.parametrize("piped", [False, True])
def test_an_instruction_that_is_not_text_is_refused(
    stories: Path, piped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not UTF-8 reach a program as lone surrogates."""
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9\n" if piped else ""))
    outcome = invoke("generate", stories, *([] if piped else ["--prompt", "caf\udce9"]))
    assert outcome.code == 2
    assert "not text at character 3; give it as UTF-8" in outcome.err


def test_given_prompts_leave_the_pipe_alone(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = io.StringIO("not for us")
    monkeypatch.setattr("sys.stdin", waiting)
    assert invoke("generate", stories, *WORDS, "--prompt", ASKED[0]).code == 0
    assert waiting.read() == "not for us"
