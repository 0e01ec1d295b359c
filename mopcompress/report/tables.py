"""Rows to pivots: pure functions, numbers only. What a number looks like is decided in `views` and `plots`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mopcompress.grid import Setting, cells_of, compressed_settings
from mopcompress.report.intervals import Interval, PairedBootstrap, Vector
from mopcompress.report.run import Cell, Run
from mopcompress.results import BenchRow

DENSE = "dense"
ARMS = ("none", "single", "mop", "mop+")
OURS, BASELINES = ("mop+", "mop"), ("single", "none")
Measured = TypeVar("Measured")  # a row of a seed, or a part of it
METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "alps")


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two arms of one setting; differences of log perplexity in nats a token, `first` minus `second`."""

    setting: str
    first: str
    second: str
    micro: Interval
    macro: Interval
    seeds: tuple[float, ...]  # the micro difference of every seed
    rouge_l: Interval | None = None  # `first` minus `second`, 0 to 1, mean over documents; None without answers
    rouge_l_macro: Interval | None = None  # mean over tasks of each task's mean


@dataclass(frozen=True)
class Grid:
    """Rows by setting and arm, both in reading order; cells the recipe asks for and that are missing are empty."""

    settings: tuple[str, ...]
    arms: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[BenchRow, ...]]
    missing: tuple[Cell, ...]

    def rows(self, setting: str, arm: str) -> tuple[BenchRow, ...]:
        """The rows of all finished seeds, by seed."""
        return self.cells.get((setting, arm), ())

    def arms_of(self, setting: str) -> tuple[str, ...]:
        """The arms that were run or asked for in this setting."""
        return tuple(arm for arm in self.arms if (setting, arm) in self.cells)


def make_grid(rows: Sequence[BenchRow], spec: Mapping[str, Any]) -> Grid:
    """Pivot rows by setting and arm, and hold them against the grid of the recipe's run part."""
    asked = compressed_settings(spec)
    expected = [(cell.setting, cell.arm, cell.seed) for one in asked for cell in cells_of(spec, one)]
    finished = {row.cell for row in rows}
    trained_once = {(row.setting, row.arm) for row in rows if row.arm == "none"}
    missing = [cell for cell in expected if cell not in finished and cell[:2] not in trained_once]
    cells: dict[tuple[str, str], list[BenchRow]] = {cell[:2]: [] for cell in expected}
    for row in sorted(rows, key=lambda row: row.seed):
        cells.setdefault((row.setting, row.arm), []).append(row)
    ranks = {one.name: _rank(one) for one in asked}
    ranks |= {row.setting: _rank(Setting(row.method, row.ratio, row.bits)) for row in rows}
    arms = {arm for _, arm in cells}
    return Grid(
        settings=tuple(sorted({setting for setting, _ in cells}, key=lambda setting: ranks[setting])),
        arms=tuple(arm for arm in ARMS if arm in arms) + tuple(sorted(arms.difference(ARMS))),
        cells={key: tuple(found) for key, found in cells.items()},
        missing=tuple(missing),
    )


def _rank(setting: Setting) -> tuple[Any, ...]:
    """Dense, then pruned by method and ratio, then quantised from many bits to few, then both."""
    kind = (setting.bits is not None) + (setting.bits is not None and setting.ratio is not None)
    method = setting.pruning or setting.method
    known = METHODS.index(method) if method in METHODS else len(METHODS)
    return (kind, known, method, setting.ratio or 0.0, -(setting.bits or 0))


def spread(of_seeds: Sequence[Measured], value: Callable[[Measured], float]) -> Spread:
    """Arithmetic mean, least and greatest over seeds."""
    values = [float(value(one)) for one in of_seeds]
    return Spread(sum(values) / len(values), min(values), max(values))


def perplexity_spread(rows: Sequence[BenchRow], value: Callable[[BenchRow], float]) -> Spread:
    """Geometric mean (the mean of log perplexity, as in every comparison), least and greatest over seeds."""
    values = [float(value(row)) for row in rows]
    return Spread(math.exp(sum(map(math.log, values)) / len(values)), min(values), max(values))


def recovery(grid: Grid, setting: str, arm: str, *, dense_arm: str = "none") -> float | None:
    """(log ppl_none - log ppl_arm) / (log ppl_none - log ppl_dense), micro; None where it is undefined,
    as where compression lost nothing.

    0 = as good as the compressed model, 1 = as good as the dense model. Against the dense model without an adapter it
    can exceed 1, for arms also adapt to the task; the dense model with the same arm tells the two apart.
    """
    groups = [grid.rows(setting, "none"), grid.rows(setting, arm), grid.rows(DENSE, dense_arm)]
    if setting == DENSE or not all(groups):
        return None
    none, this, dense = (math.log(perplexity_spread(rows, lambda row: row.perplexity).mean) for rows in groups)
    if not all(map(math.isfinite, (none, this, dense))) or none <= dense:
        return None
    return (none - this) / (none - dense)


def best_arms(grid: Grid, setting: str) -> set[str]:
    """The arms of least mean micro perplexity; none where fewer than two were measured."""
    means = {
        arm: perplexity_spread(grid.rows(setting, arm), lambda row: row.perplexity).mean
        for arm in grid.arms_of(setting)
        if grid.rows(setting, arm)
    }
    least = min(means.values(), default=math.inf)
    return {arm for arm, mean in means.items() if mean == least} if len(means) > 1 and least < math.inf else set()


def compare(run: Run, grid: Grid) -> tuple[Comparison, ...]:
    """Our arms against every other, and every arm against the baselines, by paired bootstrap."""
    scores = next(iter(run.documents.values()))
    bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
    # every answer counts the same, however long
    of_answers = PairedBootstrap(scores.tasks, [1] * len(scores.tasks)) if scores.written else None
    tokens = sum(scores.scored_tokens)
    found = []
    for setting in grid.settings:
        measured = [arm for arm in grid.arms if grid.rows(setting, arm)]
        order = sorted(measured, key=lambda arm: {OURS[0]: 0, OURS[1]: 1, "single": 3, "none": 4}.get(arm, 2))
        nats = {arm: {row.seed: _nats(run, row) for row in grid.rows(setting, arm)} for arm in order}
        means = {arm: np.mean(list(by_seed.values()), axis=0) for arm, by_seed in nats.items()}
        rouge = {arm: _mean_rouge_l(run, grid.rows(setting, arm)) for arm in order}
        for place, first in enumerate(order):
            for second in order[place + 1 :]:
                if first not in OURS and second not in BASELINES:
                    continue
                micro = bootstrap.micro(means[first], means[second])
                macro = bootstrap.macro(means[first], means[second])
                seeds = _seed_differences(nats[first], nats[second], tokens=tokens)
                answers = _answers(of_answers, rouge[first], rouge[second])
                found.append(Comparison(setting, first, second, micro, macro, seeds, *answers))
    return tuple(found)


def _mean_rouge_l(run: Run, rows: Sequence[BenchRow]) -> Vector | None:
    """Every document's, over the seeds; None where a seed has no answers."""
    written = [run.documents[row.cell].written for row in rows]
    scores = [one.rouge_l for one in written if one is not None]
    return np.mean(np.asarray(scores, dtype=np.float64), axis=0) if len(scores) == len(rows) else None


def _answers(
    bootstrap: PairedBootstrap | None, first: Vector | None, second: Vector | None
) -> tuple[Interval | None, Interval | None]:
    if bootstrap is None or first is None or second is None:
        return None, None
    return bootstrap.micro(first, second), bootstrap.macro(first, second)


def _nats(run: Run, row: BenchRow) -> Vector:
    return np.asarray(run.documents[row.cell].nats, dtype=np.float64)


def _seed_differences(first: Mapping[int, Vector], second: Mapping[int, Vector], *, tokens: int) -> tuple[float, ...]:
    """The micro difference for every seed both arms have; an arm that was run once is held against every seed."""
    if len(first) == 1 or len(second) == 1:
        pairs = [(a, b) for a in first.values() for b in second.values()]
    else:
        pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    return tuple(float((a.sum() - b.sum()) / tokens) if np.isfinite([a, b]).all() else math.nan for a, b in pairs)
