"""Task by task: what every arm of a setting scores, beside the dense model."""

from collections.abc import Sequence

from mopcompress.report.number_format import ABSENT, hundredths, number, share, shortened
from mopcompress.report.pivot import DENSE, ResultGrid, perplexity_spread, spread
from mopcompress.report.table import Line, Table, Text
from mopcompress.results import AnswerSample, BenchRow

NOTE = "Answers to the first test documents, first seed, shortened. Nothing was chosen."
LONGEST = 240  # characters of a cell


def task_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """One table a setting: task x arm, perplexity and exact match, with the dense model beside each."""
    tables = []
    for setting in grid.settings:
        columns = [(setting, arm) for arm in grid.arms_of(setting)]
        if setting != DENSE and grid.rows(DENSE, "none"):
            columns.insert(0, (DENSE, "none"))
        names = {task: None for key in columns for row in grid.rows(*key) for task in row.per_task}
        if names and columns != [(DENSE, "none")]:
            lines = tuple(Line((Text(task), *(_task(grid.rows(*key), task) for key in columns))) for task in names)
            titles = (DENSE if key[0] == DENSE and setting != DENSE else key[1] for key in columns)
            tables.append(Table(setting, "", ("task", *titles), 1, lines))
    return tuple(tables)


def _task(rows: Sequence[BenchRow], task: str) -> Text:
    rows = [row for row in rows if task in row.per_task]
    if not rows:
        return Text(ABSENT)
    perplexity = perplexity_spread(rows, lambda row: row.per_task[task].perplexity).mean
    exact = spread(rows, lambda row: row.per_task[task].exact_match).mean
    rouge = [score for row in rows if (score := row.per_task[task].rouge_l) is not None]
    wrote = f", ROUGE-L {hundredths(sum(rouge) / len(rouge))}" if rouge else ""
    return Text(number(perplexity), f"{share(exact, decimals=0)} exact{wrote}")


def answer_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """One table a setting, if its rows have answers."""
    tables = []
    for setting in grid.settings:
        rows = [found[0] for arm in grid.arms_of(setting) if (found := grid.rows(setting, arm))]
        samples = {row.arm: row.samples for row in rows if row.samples}
        if samples:
            tables.append(_table(setting, samples))
    return tuple(tables)


def _table(setting: str, samples: dict[str, Sequence[AnswerSample]]) -> Table:
    asked = next(iter(samples.values()))
    lines = [_line("instruction", [one.instruction for one in asked])]
    lines.append(_line("reference", [one.reference for one in asked]))
    for place, (arm, found) in enumerate(samples.items()):
        lines.append(_line(arm, [one.answer for one in found], first=not place))
    columns = ("", *(one.task for one in asked))
    return Table(setting, "", columns, len(columns), tuple(lines))


def _line(name: str, texts: Sequence[str], *, first: bool = False) -> Line:
    return Line((Text(name), *(Text(shortened(text, LONGEST)) for text in texts)), starts_group=first)
