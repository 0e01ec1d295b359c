"""What a report's tables are made of: text in lines of cells, which Markdown and HTML only have to draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mopcompress.report.number_format import ABSENT
from mopcompress.report.pivot import DENSE, Measured, ResultGrid, Spread, spread


@dataclass(frozen=True)
class Text:
    """One table cell: the value, and in smaller type what qualifies it."""

    main: str
    minor: str = ""


@dataclass(frozen=True)
class Line:
    """One table row; `starts_group` draws a rule above it, `strong` marks the best of its group."""

    cells: tuple[Text, ...]
    starts_group: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns hold words and whose other columns hold numbers."""

    title: str
    note: str
    columns: tuple[str, ...]
    names: int
    lines: tuple[Line, ...]


def over_seeds(of_seeds: Sequence[Measured], value: Callable[[Measured], float], show: Callable[[float], str]) -> Text:
    """The mean over seeds, and in small type the least and the greatest."""
    return spread_text(spread(of_seeds, value), show) if of_seeds else Text(ABSENT)


def in_order(grid: ResultGrid) -> list[tuple[str, str, bool]]:
    """(setting, arm, whether it is the setting's first), dense on top even when it was not measured."""
    order = [(setting, arm, not place) for setting in grid.settings for place, arm in enumerate(grid.arms_of(setting))]
    return order if DENSE in grid.settings else [(DENSE, "none", True), *order]


def spread_text(values: Spread, show: Callable[[float], str]) -> Text:
    """The mean, and in small type the least and the greatest where they differ."""
    low, high = show(values.low), show(values.high)
    return Text(show(values.mean), "" if low == high else f"{low} to {high}")
