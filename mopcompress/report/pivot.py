"""Rows to pivots: pure functions, numbers only. What a number looks like is decided in `views` and `plots`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mopcompress.grid import CompressionSetting, cells_of, compressed_settings, is_seeded
from mopcompress.report.bootstrap import Interval, PairedBootstrap, Vector
from mopcompress.report.run_folder import Cell, Run
from mopcompress.results import BenchRow

DENSE = "dense"
ARM_ORDER = ("none", "single", "mop", "mop+")
OURS, BASELINES = ("mop+", "mop"), ("single", "none")
Measured = TypeVar("Measured")  # a row of a seed, or a part of it
Known = TypeVar("Known")  # scores of all documents, if there are any
METHOD_ORDER = ("dense", "magnitude", "wanda", "sparsegpt", "alps")


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
    perplexities: tuple[float, float]  # micro, of `first` and `second`, over what was compared
    seeds: tuple[float, ...]  # the micro difference of every pair of seeds that was compared
    shared: tuple[int, ...]  # the seeds that both have; none where one draws nothing, or was trained under others
    rouge_l: Interval | None = None  # `first` minus `second`, 0 to 1, mean over documents; None without answers
    rouge_l_macro: Interval | None = None  # mean over tasks of each task's mean


@dataclass(frozen=True)
class ResultGrid:
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


def make_result_grid(rows: Sequence[BenchRow], spec: Mapping[str, Any]) -> ResultGrid:
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
    ranks |= {row.setting: _rank(CompressionSetting(row.method, row.ratio, row.bits)) for row in rows}
    arms = {arm for _, arm in cells}
    return ResultGrid(
        settings=tuple(sorted({setting for setting, _ in cells}, key=lambda setting: ranks[setting])),
        arms=tuple(arm for arm in ARM_ORDER if arm in arms) + tuple(sorted(arms.difference(ARM_ORDER))),
        cells={key: tuple(found) for key, found in cells.items()},
        missing=tuple(missing),
    )


def _rank(setting: CompressionSetting) -> tuple[Any, ...]:
    """Dense, then pruned by method and ratio, then quantised from many bits to few, then both."""
    kind = (setting.bits is not None) + (setting.bits is not None and setting.ratio is not None)
    method = setting.pruning or setting.method
    known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return (kind, known, method, setting.ratio or 0.0, -(setting.bits or 0))


def spread(of_seeds: Sequence[Measured], value: Callable[[Measured], float]) -> Spread:
    """Arithmetic mean, least and greatest over seeds."""
    values = [float(value(one)) for one in of_seeds]
    return Spread(sum(values) / len(values), min(values), max(values))


def perplexity_spread(rows: Sequence[BenchRow], value: Callable[[BenchRow], float]) -> Spread:
    """Geometric mean (the mean of log perplexity, as in every comparison), least and greatest over seeds."""
    values = [float(value(row)) for row in rows]
    return Spread(math.exp(sum(map(math.log, values)) / len(values)), min(values), max(values))


def recovery(grid: ResultGrid, setting: str, arm: str, *, dense_arm: str = "none") -> float | None:
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


def best_arms(grid: ResultGrid, setting: str) -> set[str]:
    """The arms of least mean micro perplexity; none where fewer than two were measured."""
    means = {
        arm: perplexity_spread(grid.rows(setting, arm), lambda row: row.perplexity).mean
        for arm in grid.arms_of(setting)
        if grid.rows(setting, arm)
    }
    least = min(means.values(), default=math.inf)
    return {arm for arm, mean in means.items() if mean == least} if len(means) > 1 and least < math.inf else set()


def compare(run: Run, grid: ResultGrid) -> tuple[Comparison, ...]:
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
        rows = {arm: {row.seed if is_seeded(arm) else None: row for row in grid.rows(setting, arm)} for arm in order}
        nats = {arm: {seed: _nats(run, row) for seed, row in of_arm.items()} for arm, of_arm in rows.items()}
        rouge = {arm: {seed: _rouge_l(run, row) for seed, row in of_arm.items()} for arm, of_arm in rows.items()}
        for place, first in enumerate(order):
            for second in order[place + 1 :]:
                if first not in OURS and second not in BASELINES:
                    continue
                pairs, shared = _pairs(nats[first], nats[second]), _shared(nats[first], nats[second])
                means = _means(pairs)
                seeds = tuple(_difference(*pair, tokens=tokens) for pair in pairs)
                answers = _answers(of_answers, _pairs(rouge[first], rouge[second]))
                micro, macro = bootstrap.micro(*means), bootstrap.macro(*means)
                pair = (_perplexity(means[0], tokens), _perplexity(means[1], tokens))
                found.append(Comparison(setting, first, second, micro, macro, pair, seeds, shared, *answers))
    return tuple(found)


def _pairs(first: Mapping[int | None, Known], second: Mapping[int | None, Known]) -> list[tuple[Known, Known]]:
    """What two arms have under every seed that both have, so that the luck of a seed that one lacks is no difference.

    Where there is none, or where one draws nothing and has no seed, each of the first against each of the second.
    """
    if both := _shared(first, second):
        return [(first[seed], second[seed]) for seed in both]
    return [(a, b) for a in first.values() for b in second.values()]


def _shared(first: Mapping[int | None, Known], second: Mapping[int | None, Known]) -> tuple[int, ...]:
    return tuple(sorted(seed for seed in first.keys() & second.keys() if seed is not None))


def _means(pairs: Sequence[tuple[Vector, Vector]]) -> tuple[Vector, Vector]:
    """Every document's mean over the pairs."""
    first, second = zip(*pairs, strict=True)
    return np.mean(first, axis=0), np.mean(second, axis=0)


def _perplexity(nats: Vector, tokens: int) -> float:
    return float(np.exp(nats.sum() / tokens))


def _difference(first: Vector, second: Vector, *, tokens: int) -> float:
    """Of the nats a token."""
    return float((first.sum() - second.sum()) / tokens) if np.isfinite([first, second]).all() else math.nan


def _rouge_l(run: Run, row: BenchRow) -> Vector | None:
    """Every document's; None without answers."""
    written = run.documents[row.cell].written
    return None if written is None else np.asarray(written.rouge_l, dtype=np.float64)


def _answers(
    bootstrap: PairedBootstrap | None, pairs: Sequence[tuple[Vector | None, Vector | None]]
) -> tuple[Interval | None, Interval | None]:
    """Micro and macro; None where one of the pairs has no answers."""
    written = [(first, second) for first, second in pairs if first is not None and second is not None]
    if bootstrap is None or len(written) < len(pairs):
        return None, None
    means = _means(written)
    return bootstrap.micro(*means), bootstrap.macro(*means)


def _nats(run: Run, row: BenchRow) -> Vector:
    return np.asarray(run.documents[row.cell].nats, dtype=np.float64)
