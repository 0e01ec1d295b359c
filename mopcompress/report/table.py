"""Tables of a report as text in rows of cells, which Markdown and HTML only have to draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mopcompress.report.number_format import ABSENT
from mopcompress.report.pivot import DENSE, ResultGrid, SeedValue, Spread, spread


@dataclass(frozen=True)
class Text:
    """The text of a table cell: the value, and a remark about it in smaller type."""

    main: str
    minor: str = ""


@dataclass(frozen=True)
class Line:
    """A table row; `starts_group` draws a rule above it, `strong` marks the best of its group."""

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


def seeds_text(seeds: Sequence[SeedValue], value: Callable[[SeedValue], float], show: Callable[[float], str]) -> Text:
    """Show the mean over seeds, and in small type the lowest and the highest."""
    return spread_text(spread(seeds, value), show) if seeds else Text(ABSENT)


def spread_text(values: Spread, show: Callable[[float], str]) -> Text:
    """Show the mean, and in small type the lowest and the highest when they differ."""
    low, high = show(values.low), show(values.high)
    return Text(show(values.mean), "" if low == high else f"{low} to {high}")


def table_order(grid: ResultGrid) -> list[tuple[str, str, bool]]:
    """List (setting, arm, True for the first arm of its setting), the dense model on top even if it has no rows."""
    order = [(setting, arm, not index) for setting in grid.settings for index, arm in enumerate(grid.arms_of(setting))]
    return order if DENSE in grid.settings else [(DENSE, "none", True), *order]
