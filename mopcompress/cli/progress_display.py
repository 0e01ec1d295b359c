"""Progress of a command on stderr: a bar with the time left on a terminal, plain lines elsewhere.

Both implement `progress.Progress`. A phase begins with a new description, or when the count falls back. Plain lines
show its start and its end, and between them something at least every half a minute, however long one unit takes.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Protocol, cast, runtime_checkable

import typer

from mopcompress.progress import Progress, silent

HEARTBEAT_SECONDS = 30.0


@runtime_checkable
class Stream(Protocol):
    """The part of stderr that is used."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


@contextmanager
def progress_on(stream: Stream, *, quiet: bool) -> Iterator[Progress]:
    """Yield a display that fits `stream`; nothing is shown when `quiet`."""
    if quiet:
        yield silent
    elif stream.isatty():
        with Bars(stream) as bars:
            yield bars
    else:
        with Lines(stream) as lines:
            yield lines


def print_error(message: str) -> None:
    """Print every line of `message` on stderr as `error: ...`, red on a terminal unless `NO_COLOR` is set."""
    colour = None if os.environ.get("NO_COLOR") else typer.colors.RED
    for line in message.splitlines():
        typer.secho(f"error: {line}", fg=colour, err=True)


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 05 s` or `2 h 04 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60:02} s" if hours == 0 else f"{hours} h {minutes % 60:02} min"


@dataclass
class Phase:
    """One stretch of work with one description."""

    what: str
    first: int  # units done at its first message
    done: int
    total: int
    started: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.done >= self.total

    def includes(self, what: str, done: int) -> bool:
        """Return True for a message of this phase: a count that falls back is the next round of the same work."""
        return what == self.what and done >= self.done

    def end(self) -> str:
        return f"{self.what}: done, {self.total} in {duration(time.monotonic() - self.started)}"

    def status(self) -> str:
        elapsed, units = time.monotonic() - self.started, self.done - self.first
        remaining = f", about {duration(elapsed * (self.total - self.done) / units)} left" if units else ""
        return f"{self.what}: {self.done} of {self.total} after {duration(elapsed)}{remaining}"


class Lines:
    """Progress as lines, for logs."""

    def __init__(self, stream: Stream, *, every: float = HEARTBEAT_SECONDS) -> None:
        self._stream, self._every = stream, every
        self._phase: Phase | None = None
        self._started = self._last_line = time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lines":
        self._heart.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._heart.join()

    def message(self, text: str) -> None:
        with self._lock:
            self._write(text)

    def update(self, what: str, done: int, total: int) -> None:
        with self._lock:
            phase = self._phase
            if phase is None or not phase.includes(what, done):
                phase = self._phase = Phase(what, done, done, total)
                self._write(phase.end() if phase.over else f"{what}: {done} of {total}")
                return
            was_over, phase.done = phase.over, done
            if phase.over and not was_over:
                self._write(phase.end())

    def _beat(self) -> None:
        wait = self._every
        while not self._ended.wait(wait):
            with self._lock:
                if time.monotonic() - self._last_line >= self._every:
                    working = f"working, {duration(time.monotonic() - self._started)} so far"
                    self._write(self._phase.status() if self._phase and not self._phase.over else working)
                wait = max(0.01, self._last_line + self._every - time.monotonic())

    def _write(self, line: str) -> None:
        self._last_line = time.monotonic()
        with contextlib.suppress(OSError):  # the reader has gone: the work goes on
            self._stream.write(line + "\n")
            self._stream.flush()


class Bars:
    """Progress as one live bar; what is over stays above it as a line."""

    def __init__(self, stream: Stream) -> None:
        from rich import progress  # imported for a terminal alone: it is slow
        from rich.console import Console

        self._terminal = Console(file=cast(IO[str], stream))
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left", style="dim"),
            progress.TimeRemainingColumn(),
            console=self._terminal,
            transient=True,
        )
        self._phase: Phase | None = None

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        self._write(text)

    def update(self, what: str, done: int, total: int) -> None:
        phase = self._phase
        if phase is None or not phase.includes(what, done):
            self._clear()
            phase = self._phase = Phase(what, done, done, total)
            self._bars.add_task(what, completed=done, total=total)
            if phase.over:
                self._finish(phase)
            return
        was_over, phase.done = phase.over, done
        for task in self._bars.task_ids:
            self._bars.update(task, completed=done)
        if phase.over and not was_over:
            self._finish(phase)

    def _finish(self, phase: Phase) -> None:
        self._clear()
        self._write(phase.end())

    def _clear(self) -> None:
        for task in list(self._bars.task_ids):
            self._bars.remove_task(task)

    def _write(self, line: str) -> None:
        self._terminal.print(line, markup=False, highlight=False, soft_wrap=True)
