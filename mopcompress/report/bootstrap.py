"""Paired bootstrap over test documents: how sure is a difference between two arms, given these documents?

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Both arms are scored on
the same resample, so what makes a document hard cancels. It says nothing about other training seeds: they are shown
beside it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 2310
MIN_DOCUMENTS = 5  # of every task, for a macro interval: few documents resampled within their task hardly vary


@dataclass(frozen=True)
class Interval:
    """A difference of log perplexity in nats a token and the ends of its interval.

    The ends are NaN where a score is infinite, and where a task has too few documents.
    """

    estimate: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def lacks_documents(self) -> bool:
        """Whether the scores were finite and only the documents too few."""
        return math.isfinite(self.estimate) and not self.is_known

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def scarce_tasks(tasks: Sequence[str]) -> dict[str, int]:
    """The tasks with fewer than `MIN_DOCUMENTS` of the documents whose tasks are given, with their counts."""
    return {task: count for task, count in Counter(tasks).items() if count < MIN_DOCUMENTS}


class PairedBootstrap:
    """Resamples of one test split, drawn once and shared by every comparison of a run.

    Both statistics are linear in the documents' nats, so a resample is one row of weights [resamples, documents].
    Memory is `16 * resamples * documents` bytes.
    """

    def __init__(
        self, tasks: Sequence[str], scored_tokens: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
    ) -> None:
        tokens = np.asarray(scored_tokens, dtype=np.float64)
        groups = [np.flatnonzero(np.asarray(tasks) == task) for task in dict.fromkeys(tasks)]
        everything = [np.arange(len(tokens))]
        self._micro = _Statistic(tokens, everything, resamples=resamples, seed=seed)
        self._has_scarce_tasks = bool(scarce_tasks(tasks))
        self._macro = _Statistic(tokens, groups, resamples=resamples, seed=seed)

    def micro(self, first: Vector, second: Vector) -> Interval:
        """Difference of (sum of nats / sum of tokens), `first` minus `second`; documents are resampled."""
        return self._micro.interval(first, second)

    def macro(self, first: Vector, second: Vector) -> Interval:
        """Difference of the mean over tasks of each task's nats a token; documents are resampled within their task.

        Without an interval when a task has fewer than `MIN_DOCUMENTS`: it would be too narrow, with one document a
        task of no width at all.
        """
        interval = self._macro.interval(first, second)
        return Interval(interval.estimate, math.nan, math.nan) if self._has_scarce_tasks else interval


class _Statistic:
    """Mean over groups of (sum of nats / sum of tokens), as weights on documents: plain and resampled."""

    def __init__(self, tokens: Vector, groups: Sequence[NDArray[np.intp]], *, resamples: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._weights: Vector = np.zeros(len(tokens))
        self._resampled: Matrix = np.zeros((resamples, len(tokens)))
        for group in groups:
            counts = _draw_counts(len(group), resamples=resamples, generator=generator)
            self._weights[group] = 1 / (len(groups) * tokens[group].sum())
            self._resampled[:, group] = counts / (len(groups) * (counts @ tokens[group])[:, None])

    def interval(self, first: Vector, second: Vector) -> Interval:
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            with np.errstate(invalid="ignore"):
                return Interval(float(self._weights @ first - self._weights @ second), math.nan, math.nan)
        difference = first - second
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self._resampled @ difference, [tail, 1 - tail])
        return Interval(float(self._weights @ difference), float(low), float(high))


def _draw_counts(documents: int, *, resamples: int, generator: np.random.Generator) -> Matrix:
    """How often each document was drawn, with replacement, in each resample; rows sum to `documents`."""
    drawn = generator.integers(0, documents, size=(resamples, documents))
    places = drawn + documents * np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=resamples * documents).reshape(resamples, documents).astype(np.float64)
