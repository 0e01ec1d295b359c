"""Paired bootstrap over test documents: how sure is a difference between two arms, given these documents?

Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Both arms are scored on
the same resample, so the difficulty of a document cancels. An interval does not cover the choice of training seeds: the
report shows the single seeds next to it.
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
MIN_DOCUMENTS = 5  # per task, for a macro interval: a few documents resampled within their task hardly vary


@dataclass(frozen=True)
class Interval:
    """A difference between two arms and the ends of its interval.

    The unit is nats per token for log perplexity, and 0 to 1 for ROUGE-L. The ends are NaN when a score is infinite, or
    when a task has too few documents.
    """

    estimate: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """True when both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def lacks_documents(self) -> bool:
        """True when all scores are finite but a task has too few documents."""
        return math.isfinite(self.estimate) and not self.is_known

    @property
    def shows_difference(self) -> bool:
        """True when the interval does not contain zero."""
        return self.low > 0 or self.high < 0


def scarce_tasks(tasks: Sequence[str]) -> dict[str, int]:
    """Count the documents of each task that has fewer than `MIN_DOCUMENTS`; `tasks` has one entry per document."""
    return {task: count for task, count in Counter(tasks).items() if count < MIN_DOCUMENTS}


class PairedBootstrap:
    """Resamples of one test split, drawn once and shared by every comparison of a run.

    Both statistics are linear in the scores of the documents, so a resample is one row of weights
    [resamples, documents]. The scores are nats summed over the tokens of a document, or ROUGE-L with one token each.
    Memory is `16 * resamples * documents` bytes.
    """

    def __init__(
        self, tasks: Sequence[str], scored_tokens: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
    ) -> None:
        tokens = np.asarray(scored_tokens, dtype=np.float64)
        groups = [np.flatnonzero(np.asarray(tasks) == task) for task in dict.fromkeys(tasks)]
        whole_split = [np.arange(len(tokens))]
        self._micro = _Statistic(tokens, whole_split, resamples=resamples, seed=seed)
        self._has_scarce_tasks = bool(scarce_tasks(tasks))
        self._macro = _Statistic(tokens, groups, resamples=resamples, seed=seed)

    def micro(self, first: Vector, second: Vector) -> Interval:
        """Return the difference of (sum of scores / sum of tokens), `first` minus `second`; documents are resampled."""
        return self._micro.interval(first, second)

    def macro(self, first: Vector, second: Vector) -> Interval:
        """Return the difference of the mean over tasks of each task's score per token, `first` minus `second`.

        Documents are resampled within their task. There is no interval when a task has fewer than `MIN_DOCUMENTS`: it
        would be too narrow, and with one document per task it would have no width at all.
        """
        interval = self._macro.interval(first, second)
        return Interval(interval.estimate, math.nan, math.nan) if self._has_scarce_tasks else interval


class _Statistic:
    """Mean over groups of (sum of scores / sum of tokens), as weights on documents: plain and resampled."""

    def __init__(self, tokens: Vector, groups: Sequence[NDArray[np.intp]], *, resamples: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._weights: Vector = np.zeros(len(tokens))
        self._resampled: Matrix = np.zeros((resamples, len(tokens)))
        for group in groups:
            counts = _draw_counts(len(group), resamples=resamples, generator=generator)
            self._weights[group] = 1 / (len(groups) * tokens[group].sum())
            self._resampled[:, group] = counts / (len(groups) * (counts @ tokens[group])[:, None])

    def interval(self, first: Vector, second: Vector) -> Interval:
        """Return `first` minus `second` with the percentiles of its resamples."""
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            with np.errstate(invalid="ignore"):
                return Interval(float(self._weights @ first - self._weights @ second), math.nan, math.nan)
        difference = first - second
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(self._resampled @ difference, [tail, 1 - tail])
        return Interval(float(self._weights @ difference), float(low), float(high))


def _draw_counts(documents: int, *, resamples: int, generator: np.random.Generator) -> Matrix:
    """Count how often each document is drawn, with replacement, in each resample; rows sum to `documents`."""
    drawn = generator.integers(0, documents, size=(resamples, documents))
    flat_indices = (drawn + documents * np.arange(resamples)[:, None]).ravel()
    counts = np.bincount(flat_indices, minlength=resamples * documents).reshape(resamples, documents)
    return counts.astype(np.float64)
