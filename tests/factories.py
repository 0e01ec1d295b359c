"""Objects that many tests need, made with as little as possible."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressCalls:
    """A `Progress` that calls `act(what, done, total)`; messages have 0 of 0."""

    act: Callable[[str, int, int], object]

    def message(self, text: str) -> None:
        self.act(text, 0, 0)

    def update(self, what: str, done: int, total: int) -> None:
        self.act(what, done, total)


def on_progress(act: Callable[[str, int, int], object]) -> ProgressCalls:
    """Return a receiver of progress that calls `act` for messages and counts alike."""
    return ProgressCalls(act)
