"""Task by task: what every arm of a setting scores, beside the dense model."""

from collections.abc import Sequence

from mopcompress.report.number_format import ABSENT, hundredths, number, share
from mopcompress.report.pivot import DENSE, Grid, perplexity_spread, spread
from mopcompress.report.table import Line, Table, Text
from mopcompress.results import BenchRow


def task_tables(grid: Grid) -> tuple[Table, ...]:
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
