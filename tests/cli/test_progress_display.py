"""Progress on a terminal and in a log."""

import io
import time

import pytest

from mopcompress.cli.progress_display import Bars, Lines, duration, progress_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phase_shows_its_start_and_its_end() -> None:
    stream = io.StringIO()
    with Lines(stream) as progress:
        for done in (1, 2, 3, 4, 4, 4):
            progress.update("pruning", done, 4)
    assert stream.getvalue().splitlines() == ["pruning: 1 of 4", "pruning: done, 4 in 0 s"]


def test_the_same_work_started_again_is_a_new_phase() -> None:
    stream = io.StringIO()
    with Lines(stream) as progress:
        for done in (1, 2, 1, 2):
            progress.update("pruning", done, 2)
    assert stream.getvalue().splitlines() == ["pruning: 1 of 2", "pruning: done, 2 in 0 s"] * 2


def test_a_bare_message_is_a_line() -> None:
    stream = io.StringIO()
    with Lines(stream) as progress:
        progress.message("converting [model]")
    assert stream.getvalue() == "converting [model]\n"


def test_a_long_unit_does_not_stop_the_lines() -> None:
    stream = io.StringIO()
    with Lines(stream, every=0.02) as progress:
        time.sleep(0.2)
        progress.update("training", 1, 10)
        progress.update("training", 3, 10)
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("working, ")
    assert any(line.startswith("training: 3 of 10 after 0 s, about ") and line.endswith("left") for line in lines)


def test_a_closed_stream_does_not_stop_the_work() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Lines(Gone()) as progress:
        progress.update("training", 1, 10)


def test_a_terminal_shows_a_bar_and_lines_of_ended_phases() -> None:
    stream = Terminal()
    with progress_on(stream, quiet=False) as progress:
        assert isinstance(progress, Bars)
        progress.update("scoring [rows]", 1, 4)
        progress.update("scoring [rows]", 4, 4)
        progress.message("sparsegpt [50%]")
        progress.update("once", 1, 1)
    shown = stream.getvalue()
    for line in ("scoring [rows]: done, 4 in 0 s", "sparsegpt [50%]", "once: done, 1 in 0 s"):
        assert line in shown


def test_quiet_shows_nothing() -> None:
    stream = io.StringIO()
    with progress_on(stream, quiet=True) as progress:
        progress.update("training", 1, 10)
        progress.message("message")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (185.0, "3 min 05 s"), (3600.0, "1 h 00 min"), (7500.0, "2 h 05 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
