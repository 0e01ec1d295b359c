"""Rows arranged by setting and arm, and comparisons of arms: pure functions, numbers only.

How a number looks is decided in the tables and in `plots`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mopcompress.grid import QUANTIZER, CompressionSetting, cells_of, compressed_settings, is_seeded
from mopcompress.recipe.arms import ARM_NAMES
from mopcompress.recipe.run_spec import PRUNING_METHODS
from mopcompress.report.bootstrap import Interval, PairedBootstrap, Vector
from mopcompress.report.run_folder import Run
from mopcompress.results import BenchRow, Cell

DENSE = "dense"
BASELINES, OURS = ("none", "single"), ("mop", "mop+")
ARM_ORDER = tuple(dict.fromkeys((*BASELINES, *OURS, *ARM_NAMES)))  # of columns and rows
METHOD_ORDER = (DENSE, *PRUNING_METHODS, QUANTIZER)
SeedValue = TypeVar("SeedValue")  # a row of one seed, or a part of it
Scores = TypeVar("Scores")  # one number per document, or None


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, the lowest and the highest."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two arms of one setting; differences of log perplexity in nats per token, `first` minus `second`."""

    setting: str
    first: str
    second: str
    micro: Interval
    macro: Interval
    perplexities: tuple[float, float]  # micro, of `first` and `second`, over the seeds that were compared
    seeds: tuple[float, ...]  # the micro difference of every pair of seeds that was compared
    shared: tuple[int, ...]  # the seeds that both arms have; empty when one arm has no seeds, or other ones
    rouge_l: Interval | None = None  # `first` minus `second`, 0 to 1, mean over documents; None without answers
    rouge_l_macro: Interval | None = None  # mean over tasks of each task's mean


@dataclass(frozen=True)
class ResultGrid:
    """Rows by setting and arm, both in the order of the report. A requested cell without a row is empty."""

    settings: tuple[str, ...]
    arms: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[BenchRow, ...]]
    missing: tuple[Cell, ...]

    def rows(self, setting: str, arm: str) -> tuple[BenchRow, ...]:
        """Return the rows of all finished seeds, by seed."""
        return self.cells.get((setting, arm), ())

    def arms_of(self, setting: str) -> tuple[str, ...]:
        """Return the arms that were run or requested in this setting."""
        return tuple(arm for arm in self.arms if (setting, arm) in self.cells)


def make_result_grid(rows: Sequence[BenchRow], spec: Mapping[str, Any]) -> ResultGrid:
    """Arrange rows by setting and arm, and compare them with the grid that the `run` part of the recipe requests."""
    requested = compressed_settings(spec)
    expected = [cell for setting in requested for cell in cells_of(spec, setting)]
    finished = {row.cell for row in rows}
    without_seeds = {(row.setting, row.arm) for row in rows if row.arm == "none"}
    missing = [cell for cell in expected if cell not in finished and cell[:2] not in without_seeds]
    cells: dict[tuple[str, str], list[BenchRow]] = {(cell.setting, cell.arm): [] for cell in expected}
    for row in sorted(rows, key=lambda row: row.seed):
        cells.setdefault((row.setting, row.arm), []).append(row)
    ranks = {setting.name: _rank(setting) for setting in requested}
    ranks |= {row.setting: _rank(CompressionSetting(row.method, row.ratio, row.bits)) for row in rows}
    arms = {arm for _, arm in cells}
    return ResultGrid(
        settings=tuple(sorted({setting for setting, _ in cells}, key=lambda setting: ranks[setting])),
        arms=tuple(arm for arm in ARM_ORDER if arm in arms) + tuple(sorted(arms.difference(ARM_ORDER))),
        cells={key: tuple(seeds) for key, seeds in cells.items()},
        missing=tuple(missing),
    )


def _rank(setting: CompressionSetting) -> tuple[Any, ...]:
    """Rank dense first, then pruned by method and ratio, then quantized from many bits to few, then both."""
    kind = (setting.bits is not None) + (setting.bits is not None and setting.ratio is not None)
    method = setting.pruning or setting.method
    position = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    return (kind, position, method, setting.ratio or 0.0, -(setting.bits or 0))


def spread(seeds: Sequence[SeedValue], value: Callable[[SeedValue], float]) -> Spread:
    """Return the arithmetic mean, the lowest and the highest value over seeds."""
    values = [float(value(seed)) for seed in seeds]
    return Spread(sum(values) / len(values), min(values), max(values))


def perplexity_spread(rows: Sequence[BenchRow], value: Callable[[BenchRow], float]) -> Spread:
    """Return the geometric mean (the mean of log perplexity, as in every comparison), the lowest and the highest."""
    values = [float(value(row)) for row in rows]
    return Spread(math.exp(sum(map(math.log, values)) / len(values)), min(values), max(values))


def recovery(grid: ResultGrid, setting: str, arm: str, *, dense_arm: str = "none") -> float | None:
    """Return (log ppl_none - log ppl_arm) / (log ppl_none - log ppl_dense), from micro perplexities.

    0 = as good as the compressed model, 1 = as good as the dense model. It can exceed 1 against the dense model without
    an adapter, because arms also learn the tasks; `dense_arm` names the arm of the dense model to compare with. None
    when it is undefined: a perplexity is missing or infinite, or the compression lost nothing.
    """
    groups = [grid.rows(setting, "none"), grid.rows(setting, arm), grid.rows(DENSE, dense_arm)]
    if setting == DENSE or not all(groups):
        return None
    none, this, dense = (math.log(perplexity_spread(rows, lambda row: row.perplexity).mean) for rows in groups)
    if not all(map(math.isfinite, (none, this, dense))) or none <= dense:
        return None
    return (none - this) / (none - dense)


def best_arms(grid: ResultGrid, setting: str) -> set[str]:
    """Return the arms with the lowest mean micro perplexity; none when fewer than two were measured."""
    means = {
        arm: perplexity_spread(grid.rows(setting, arm), lambda row: row.perplexity).mean
        for arm in grid.arms_of(setting)
        if grid.rows(setting, arm)
    }
    lowest = min(means.values(), default=math.inf)
    return {arm for arm, mean in means.items() if mean == lowest} if len(means) > 1 and lowest < math.inf else set()


def compare_arms(run: Run, grid: ResultGrid) -> tuple[Comparison, ...]:
    """Compare our arms with every other, and every arm with the baselines, by paired bootstrap."""
    scores = next(iter(run.documents.values()))
    bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
    # every answer counts the same, however long it is
    answer_bootstrap = PairedBootstrap(scores.tasks, [1] * len(scores.tasks)) if scores.written else None
    tokens = sum(scores.scored_tokens)
    comparisons = []
    for setting in grid.settings:
        measured = [arm for arm in grid.arms if grid.rows(setting, arm)]
        order = sorted(measured, key=_comparison_rank)
        rows = {arm: {row.seed if is_seeded(arm) else None: row for row in grid.rows(setting, arm)} for arm in order}
        nats = {arm: {seed: _nats(run, row) for seed, row in seeds.items()} for arm, seeds in rows.items()}
        rouge = {arm: {seed: _rouge_l(run, row) for seed, row in seeds.items()} for arm, seeds in rows.items()}
        for index, first in enumerate(order):
            for second in order[index + 1 :]:
                if first not in OURS and second not in BASELINES:
                    continue
                pairs, shared = _pair_seeds(nats[first], nats[second]), _shared_seeds(nats[first], nats[second])
                means = _document_means(pairs)
                seeds = tuple(_difference_per_token(*pair, tokens=tokens) for pair in pairs)
                answers = _compare_answers(answer_bootstrap, _pair_seeds(rouge[first], rouge[second]))
                micro, macro = bootstrap.micro(*means), bootstrap.macro(*means)
                perplexities = (_perplexity(means[0], tokens), _perplexity(means[1], tokens))
                comparisons.append(
                    Comparison(setting, first, second, micro, macro, perplexities, seeds, shared, *answers)
                )
    return tuple(comparisons)


def _comparison_rank(arm: str) -> int:
    """Rank our arms first and the baselines last, so that every comparison reads "ours against theirs"."""
    order = (*reversed(OURS), "", *reversed(BASELINES))
    return order.index(arm if arm in order else "")


def _pair_seeds(first: Mapping[int | None, Scores], second: Mapping[int | None, Scores]) -> list[tuple[Scores, Scores]]:
    """Pair the scores of two arms under every seed that both have, so that a seed of one arm alone does not count.

    When they share no seed, or one of them has no seeds, each of the first is paired with each of the second.
    """
    if shared := _shared_seeds(first, second):
        return [(first[seed], second[seed]) for seed in shared]
    return [(scores, others) for scores in first.values() for others in second.values()]


def _shared_seeds(first: Mapping[int | None, Scores], second: Mapping[int | None, Scores]) -> tuple[int, ...]:
    return tuple(sorted(seed for seed in first.keys() & second.keys() if seed is not None))


def _document_means(pairs: Sequence[tuple[Vector, Vector]]) -> tuple[Vector, Vector]:
    """Return the mean over the pairs for every document, of the first arm and of the second."""
    first, second = zip(*pairs, strict=True)
    return np.mean(first, axis=0), np.mean(second, axis=0)


def _perplexity(nats: Vector, tokens: int) -> float:
    return float(np.exp(nats.sum() / tokens))


def _difference_per_token(first: Vector, second: Vector, *, tokens: int) -> float:
    """Return the difference in nats per token; NaN when a score is infinite."""
    return float((first.sum() - second.sum()) / tokens) if np.isfinite([first, second]).all() else math.nan


def _rouge_l(run: Run, row: BenchRow) -> Vector | None:
    """Return the ROUGE-L of every document; None without answers."""
    written = run.documents[row.cell].written
    return None if written is None else np.asarray(written.rouge_l, dtype=np.float64)


def _compare_answers(
    bootstrap: PairedBootstrap | None, pairs: Sequence[tuple[Vector | None, Vector | None]]
) -> tuple[Interval | None, Interval | None]:
    """Return the micro and the macro interval of ROUGE-L; None when a pair lacks answers."""
    answered = [(first, second) for first, second in pairs if first is not None and second is not None]
    if bootstrap is None or len(answered) < len(pairs):
        return None, None
    means = _document_means(answered)
    return bootstrap.micro(*means), bootstrap.macro(*means)


def _nats(run: Run, row: BenchRow) -> Vector:
    return np.asarray(run.documents[row.cell].nats, dtype=np.float64)
