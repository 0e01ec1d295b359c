"""What the models wrote, as tables: documents side by side, and under each what every arm answered."""

from collections.abc import Sequence

from mopcompress.report.number_format import shortened
from mopcompress.report.pivot import Grid
from mopcompress.report.table import Line, Table, Text
from mopcompress.results import Sample

NOTE = "Answers to the first test documents, first seed, shortened. Nothing was chosen."
LONGEST = 240  # characters of a cell


def answer_tables(grid: Grid) -> tuple[Table, ...]:
    """One table a setting, if its rows have answers."""
    tables = []
    for setting in grid.settings:
        rows = [found[0] for arm in grid.arms_of(setting) if (found := grid.rows(setting, arm))]
        samples = {row.arm: row.samples for row in rows if row.samples}
        if samples:
            tables.append(_table(setting, samples))
    return tuple(tables)


def _table(setting: str, samples: dict[str, Sequence[Sample]]) -> Table:
    asked = next(iter(samples.values()))
    lines = [_line("instruction", [one.instruction for one in asked])]
    lines.append(_line("reference", [one.reference for one in asked]))
    for place, (arm, found) in enumerate(samples.items()):
        lines.append(_line(arm, [one.answer for one in found], first=not place))
    columns = ("", *(one.task for one in asked))
    return Table(setting, "", columns, len(columns), tuple(lines))


def _line(name: str, texts: Sequence[str], *, first: bool = False) -> Line:
    return Line((Text(name), *(Text(shortened(text, LONGEST)) for text in texts)), starts_group=first)
