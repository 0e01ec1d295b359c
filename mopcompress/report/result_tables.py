"""The results of every arm, and every comparison of two, as tables of text."""

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
    number,
    points,
    ratio,
    share,
)
from mopcompress.report.pivot import (
    Comparison,
    ResultGrid,
    best_arms,
    perplexity_spread,
    recovery,
)
from mopcompress.report.table import Line, Table, Text, in_order, over_seeds, spread_text
from mopcompress.results import BenchRow

VERDICTS = ("better", "worse", "no difference shown", "a score is infinite")
PLAIN_TEXT = "Plain text: perplexity of text that no arm was trained on. "
WRITTEN = (  # column, field of a row, form
    ("ROUGE-L", "rouge_l", hundredths),
    ("ROUGE-L macro", "rouge_l_macro", hundredths),
    ("written exactly", "written_exact_match", share),
)
TOO_FEW = "too few documents a task for an interval"


def results_table(grid: ResultGrid, comparisons: Sequence[Comparison]) -> Table:
    """Setting x arm: what was counted and what was scored, the dense line on top."""
    against = {(c.setting, c.first): c for c in comparisons if c.second == "single"}
    against |= {(c.setting, c.second): _reversed(c) for c in comparisons if c.first == "single"}
    texts = any(row.text_perplexity for rows in grid.cells.values() for row in rows)
    written = WRITTEN if any(row.rouge_l is not None for rows in grid.cells.values() for row in rows) else ()
    lines = []
    for setting, arm, first in in_order(grid):
        rows = grid.rows(setting, arm)
        regained = recovery(grid, setting, arm)
        trained = None if arm == "none" else recovery(grid, setting, arm, dense_arm=arm)
        alike = "" if trained is None else f"{ratio(trained)} of the dense model with {arm}"
        values = (
            over_seeds(rows, lambda row: row.sparsity, lambda value: share(value, decimals=2)),
            _perplexity(rows, lambda row: row.perplexity),
            _perplexity(rows, lambda row: row.perplexity_macro),
            over_seeds(rows, lambda row: row.exact_match, share),
            *(_written(rows, field, show) for _, field, show in written),
            *([_perplexity(rows, lambda row: row.text_perplexity or math.nan)] if texts else []),
            Text((ABSENT if not rows else "n/a") if regained is None else ratio(regained), alike),
            _against_single(arm, against.get((setting, arm)), max(len(rows), len(grid.rows(setting, "single")))),
        )
        name = Text(arm, f"{len(rows)} seeds" if len(rows) > 1 else "")
        lines.append(Line((Text(setting if first else ""), name, *values), first, arm in best_arms(grid, setting)))
    columns = (
        "setting",
        "arm",
        "sparsity",
        "perplexity",
        "macro",
        "exact match",
        *(column for column, _, _ in written),
        *(["plain text"] if texts else []),
        "recovery",
        "perplexity against single",
    )
    note = (
        "Mean over seeds, with the least and the greatest in small type. Bold: the lowest perplexity of a setting; "
        "whether the difference is shown, the interval says, which is over the seeds that both arms have, if any. "
        f"{PLAIN_TEXT if texts else ''}"
        "Sparsity is counted in the compressed weights, not "
        "copied from the request."
    )
    return Table("Results", note, columns, 2, tuple(lines))


def comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    """Every pair of arms with both intervals and what the seeds say."""
    lines = []
    previous = ""
    written = any(one.rouge_l for one in comparisons)
    for one in comparisons:
        first = one.setting != previous
        previous = one.setting
        seeds = change_range(min(one.seeds), max(one.seeds)) if len(one.seeds) > 1 else ABSENT
        cells = (
            Text(one.setting if first else ""),
            Text(f"{one.first} against {one.second}"),
            Text(verdict(one.micro)),
            Text(interval_text(one.micro)),
            Text(interval_text(one.macro), TOO_FEW if one.macro.lacks_documents else ""),
            Text(seeds),
            *(_difference(interval) for interval in (one.rouge_l, one.rouge_l_macro) if written),
        )
        lines.append(Line(cells, first))
    answers = ("ROUGE-L", "ROUGE-L macro") if written else ()
    columns = ("setting", "comparison", "verdict", "perplexity", "macro", "over seeds", *answers)
    note = (
        "Change of perplexity with its 95 % interval: paired bootstrap over test documents, the nats of each document "
        "averaged first over the seeds that both arms have, if any. The interval covers the choice of documents; the "
        "column over seeds covers those."
    )
    return Table("Every comparison", note, columns, 3, tuple(lines))


def verdict(interval: Interval) -> str:
    """What the interval allows one to say about the first arm, one of `VERDICTS`."""
    better, worse, unclear, infinite = VERDICTS
    if not interval.is_known:
        return infinite
    if not interval.shows_difference:
        return unclear
    return better if interval.estimate < 0 else worse


def interval_text(interval: Interval) -> str:
    """`-12 % [-15, -9]`, or the plain change without an interval."""
    if interval.lacks_documents:
        return change(interval.estimate)
    return change_with_interval(interval.estimate, interval.low, interval.high)


def _reversed(one: Comparison) -> Comparison:
    micro, macro = (Interval(-each.estimate, -each.high, -each.low) for each in (one.micro, one.macro))
    return replace(
        one,
        first=one.second,
        second=one.first,
        micro=micro,
        macro=macro,
        perplexities=one.perplexities[::-1],
        seeds=tuple(-difference for difference in one.seeds),
        rouge_l=None,
        rouge_l_macro=None,
    )


def _against_single(arm: str, one: Comparison | None, seeds: int) -> Text:
    """`seeds`: how many the arm or the single prompt has, whichever has more."""
    if arm == "single" and seeds:
        return Text("baseline")
    if one is None:
        return Text(ABSENT)
    quiet = one.micro.is_known and not one.micro.shows_difference
    of_some = f"of seed{'s' * (len(one.shared) > 1)} {', '.join(map(str, one.shared))}"
    said = [*([VERDICTS[2]] if quiet else []), *([of_some] if 0 < len(one.shared) < seeds else [])]
    return Text(interval_text(one.micro), "; ".join(said))


def _written(rows: Sequence[BenchRow], field: str, show: Callable[[float], str]) -> Text:
    return over_seeds([row for row in rows if getattr(row, field) is not None], attrgetter(field), show)


def _difference(one: Interval | None) -> Text:
    return Text(ABSENT if one is None else points(one.estimate, one.low, one.high))


def _perplexity(rows: Sequence[BenchRow], value: Callable[[BenchRow], float]) -> Text:
    return spread_text(perplexity_spread(rows, value), number) if rows else Text(ABSENT)
