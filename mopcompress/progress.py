"""Progress of long work. The library never prints: the caller decides what is shown."""

from typing import Protocol, runtime_checkable


@runtime_checkable  # so that the test run can check it
class Progress(Protocol):
    """A receiver of messages and of counts."""

    def message(self, text: str) -> None:
        """Report an event in a sentence."""
        ...

    def update(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of `what` are finished; one description per phase."""
        ...


class Silent:
    """A receiver that shows nothing."""

    def message(self, text: str) -> None:
        """Ignore it."""

    def update(self, what: str, done: int, total: int) -> None:
        """Ignore it."""


silent = Silent()
