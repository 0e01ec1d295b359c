"""Tables by task: the scores of every arm of a setting next to the dense model, and samples of answers."""

from collections.abc import Sequence

from mopcompress.report.number_format import ABSENT, hundredths, number, percent, shortened
from mopcompress.report.pivot import DENSE, ResultGrid, perplexity_spread, spread
from mopcompress.report.table import Line, Table, Text
from mopcompress.results import AnswerSample, BenchRow

NOTE = "The answers to the first test documents, first seed, shortened. They are the first ones, not a selection."
MAX_CELL_CHARACTERS = 240


def task_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """Tabulate perplexity and exact match by task and arm, a table per setting, the dense model in the first column."""
    tables = []
    for setting in grid.settings:
        columns = [(setting, arm) for arm in grid.arms_of(setting)]
        if setting != DENSE and grid.rows(DENSE, "none"):
            columns.insert(0, (DENSE, "none"))
        tasks = {task: None for key in columns for row in grid.rows(*key) for task in row.per_task}
        if tasks and columns != [(DENSE, "none")]:
            lines = tuple(
                Line((Text(task), *(_score_text(grid.rows(*key), task) for key in columns))) for task in tasks
            )
            titles = (DENSE if key[0] == DENSE and setting != DENSE else key[1] for key in columns)
            tables.append(Table(setting, "", ("task", *titles), 1, lines))
    return tuple(tables)


def _score_text(rows: Sequence[BenchRow], task: str) -> Text:
    rows = [row for row in rows if task in row.per_task]
    if not rows:
        return Text(ABSENT)
    perplexity = perplexity_spread(rows, lambda row: row.per_task[task].perplexity).mean
    exact = spread(rows, lambda row: row.per_task[task].exact_match).mean
    rouge = [score for row in rows if (score := row.per_task[task].rouge_l) is not None]
    rouge_text = f", ROUGE-L {hundredths(sum(rouge) / len(rouge))}" if rouge else ""
    return Text(number(perplexity), f"{percent(exact, decimals=0)} exact{rouge_text}")


def answer_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """Tabulate the sampled answers of every arm, a table per setting whose rows have answers."""
    tables = []
    for setting in grid.settings:
        first = [rows[0] for arm in grid.arms_of(setting) if (rows := grid.rows(setting, arm))]
        samples = {row.arm: row.samples for row in first if row.samples}
        if samples:
            tables.append(_answer_table(setting, samples))
    return tuple(tables)


def _answer_table(setting: str, samples: dict[str, Sequence[AnswerSample]]) -> Table:
    documents = next(iter(samples.values()))
    lines = [
        _answer_line("instruction", [document.instruction for document in documents]),
        _answer_line("reference", [document.reference for document in documents]),
    ]
    for index, (arm, answers) in enumerate(samples.items()):
        lines.append(_answer_line(arm, [sample.answer for sample in answers], starts_group=not index))
    columns = ("", *(document.task for document in documents))
    return Table(setting, "", columns, len(columns), tuple(lines))


def _answer_line(name: str, texts: Sequence[str], *, starts_group: bool = False) -> Line:
    cells = (Text(shortened(text, MAX_CELL_CHARACTERS)) for text in texts)
    return Line((Text(name), *cells), starts_group=starts_group)
