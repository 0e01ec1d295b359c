"""How a stage tells how far it is. The library never prints: who calls decides what is shown."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being done, units done, units in all); one description a phase, 0 of 0 for a bare message."""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""
