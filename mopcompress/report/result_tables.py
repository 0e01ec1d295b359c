"""Tables of the results of every arm, and of every comparison of two arms."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter

from mopcompress.report.bootstrap import Interval
from mopcompress.report.number_format import (
    ABSENT,
    change,
    change_range,
    change_with_interval,
    hundredths,
    hundredths_with_interval,
    number,
    percent,
    ratio,
)
from mopcompress.report.pivot import Comparison, ResultGrid, best_arms, perplexity_spread, recovery
from mopcompress.report.table import Line, Table, Text, seeds_text, spread_text, table_order
from mopcompress.results import BenchRow

VERDICTS = ("better", "worse", "no difference shown", "a score is infinite")
PLAIN_TEXT = "Plain text: perplexity of text that no arm was trained on. "
ANSWER_COLUMNS = (  # title, field of a row, format
    ("ROUGE-L", "rouge_l", hundredths),
    ("ROUGE-L macro", "rouge_l_macro", hundredths),
    ("written exactly", "written_exact_match", percent),
)
TOO_FEW = "too few documents per task for an interval"


def results_table(grid: ResultGrid, comparisons: Sequence[Comparison]) -> Table:
    """Tabulate sparsity and scores by setting and arm, the dense model on top."""
    against = {(pair.setting, pair.first): pair for pair in comparisons if pair.second == "single"}
    against |= {(pair.setting, pair.second): _reversed(pair) for pair in comparisons if pair.first == "single"}
    has_text = any(row.text_perplexity for rows in grid.cells.values() for row in rows)
    has_answers = any(row.rouge_l is not None for rows in grid.cells.values() for row in rows)
    answer_columns = ANSWER_COLUMNS if has_answers else ()
    lines = []
    for setting, arm, first in table_order(grid):
        rows = grid.rows(setting, arm)
        values = (
            seeds_text(rows, lambda row: row.sparsity, lambda value: percent(value, decimals=2)),
            _perplexity_text(rows, lambda row: row.perplexity),
            _perplexity_text(rows, lambda row: row.perplexity_macro),
            seeds_text(rows, lambda row: row.exact_match, percent),
            *(_answer_text(rows, field, show) for _, field, show in answer_columns),
            *([_perplexity_text(rows, lambda row: row.text_perplexity or math.nan)] if has_text else []),
            _recovery_text(grid, setting, arm),
            _against_single(arm, against.get((setting, arm)), max(len(rows), len(grid.rows(setting, "single")))),
        )
        name = Text(arm, f"{len(rows)} seeds" if len(rows) > 1 else "")
        lines.append(Line((Text(setting if first else ""), name, *values), first, arm in best_arms(grid, setting)))
    columns = (
        "setting",
        "arm",
        "sparsity",
        "perplexity",
        "macro perplexity",
        "exact match",
        *(title for title, _, _ in answer_columns),
        *(["plain text"] if has_text else []),
        "recovery",
        "perplexity against single",
    )
    note = (
        "Mean over seeds, with the lowest and the highest in small type. Bold: the lowest perplexity of a setting. The "
        "interval in the last column tells whether a difference is larger than chance; it is over the seeds that both "
        f"arms have, if any. {PLAIN_TEXT if has_text else ''}Sparsity is counted in the compressed weights, not copied "
        "from the request."
    )
    return Table("Results", note, columns, 2, tuple(lines))


def comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    """Tabulate every pair of arms with its verdict, both intervals and the range over seeds."""
    lines = []
    previous = ""
    has_answers = any(pair.rouge_l for pair in comparisons)
    for pair in comparisons:
        first = pair.setting != previous
        previous = pair.setting
        seeds = change_range(min(pair.seeds), max(pair.seeds)) if len(pair.seeds) > 1 else ABSENT
        cells = (
            Text(pair.setting if first else ""),
            Text(f"{pair.first} against {pair.second}"),
            Text(verdict(pair.micro)),
            Text(interval_text(pair.micro)),
            Text(interval_text(pair.macro), TOO_FEW if pair.macro.lacks_documents else ""),
            Text(seeds),
            *(_rouge_text(interval) for interval in (pair.rouge_l, pair.rouge_l_macro) if has_answers),
        )
        lines.append(Line(cells, first))
    answers = ("ROUGE-L", "ROUGE-L macro") if has_answers else ()
    columns = ("setting", "comparison", "verdict", "perplexity", "macro perplexity", "over seeds", *answers)
    note = (
        "Change of perplexity from the second arm to the first, with its 95 % interval: a paired bootstrap over test "
        "documents, after averaging the nats of each document over the seeds that both arms have, if any. The interval "
        "covers the choice of documents. The column over seeds shows the lowest and the highest change of a single "
        "seed."
    )
    return Table("Comparisons of arms", note, columns, 3, tuple(lines))


def verdict(interval: Interval) -> str:
    """Return the member of `VERDICTS` that the interval supports for the first arm."""
    better, worse, unclear, infinite = VERDICTS
    if not interval.is_known:
        return infinite
    if not interval.shows_difference:
        return unclear
    return better if interval.estimate < 0 else worse


def interval_text(interval: Interval) -> str:
    """Show `-12 % [-15, -9]`, or the plain change when there is no interval."""
    if interval.lacks_documents:
        return change(interval.estimate)
    return change_with_interval(interval.estimate, interval.low, interval.high)


def _reversed(pair: Comparison) -> Comparison:
    """Swap the arms of a comparison; ROUGE-L is left out."""
    micro, macro = (
        Interval(-interval.estimate, -interval.high, -interval.low) for interval in (pair.micro, pair.macro)
    )
    return replace(
        pair,
        first=pair.second,
        second=pair.first,
        micro=micro,
        macro=macro,
        perplexities=pair.perplexities[::-1],
        seeds=tuple(-difference for difference in pair.seeds),
        rouge_l=None,
        rouge_l_macro=None,
    )


def _recovery_text(grid: ResultGrid, setting: str, arm: str) -> Text:
    """Show the recovery, and in small type that against the dense model with the same arm."""
    fraction = recovery(grid, setting, arm)
    same_arm = None if arm == "none" else recovery(grid, setting, arm, dense_arm=arm)
    minor = "" if same_arm is None else f"{ratio(same_arm)} of the dense model with {arm}"
    missing = "n/a" if grid.rows(setting, arm) else ABSENT
    return Text(missing if fraction is None else ratio(fraction), minor)


def _against_single(arm: str, pair: Comparison | None, seeds: int) -> Text:
    """Show the change against the single prompt; `seeds` is the larger number of seeds of the two arms."""
    if arm == "single" and seeds:
        return Text("baseline")
    if pair is None:
        return Text(ABSENT)
    remarks = []
    if pair.micro.is_known and not pair.micro.shows_difference:
        remarks.append(VERDICTS[2])
    if 0 < len(pair.shared) < seeds:
        remarks.append(f"of seed{'s' * (len(pair.shared) > 1)} {', '.join(map(str, pair.shared))}")
    return Text(interval_text(pair.micro), "; ".join(remarks))


def _answer_text(rows: Sequence[BenchRow], field: str, show: Callable[[float], str]) -> Text:
    return seeds_text([row for row in rows if getattr(row, field) is not None], attrgetter(field), show)


def _rouge_text(interval: Interval | None) -> Text:
    if interval is None:
        return Text(ABSENT)
    return Text(hundredths_with_interval(interval.estimate, interval.low, interval.high))


def _perplexity_text(rows: Sequence[BenchRow], value: Callable[[BenchRow], float]) -> Text:
    return spread_text(perplexity_spread(rows, value), number) if rows else Text(ABSENT)
