"""The paired bootstrap against its definition."""

import math

import numpy as np
import pytest
from report_runs import document_scores

from mopcompress.report.bootstrap import Interval, PairedBootstrap, scarce_tasks
from mopcompress.report.result_tables import interval_text
from mopcompress.results import DocumentScores


def slow_bootstrap(
    first: DocumentScores, second: DocumentScores, *, macro: bool, resamples: int, seed: int
) -> list[float]:
    """Draw documents, score both arms on them, and subtract the logs of their perplexities: the definition."""
    generator = np.random.default_rng(seed)
    groups = [[index for index, name in enumerate(first.tasks) if name == task] for task in dict.fromkeys(first.tasks)]
    draws: list[list[list[int]]] = []
    for group in groups if macro else [list(range(len(first.tasks)))]:
        draws.append([[group[generator.integers(0, len(group))] for _ in group] for _ in range(resamples)])
    differences = []
    for resample in range(resamples):
        logs = []
        for scores in (first, second):
            rates = []
            for drawn in draws:
                nats = sum(scores.nats[index] for index in drawn[resample])
                rates.append(nats / sum(scores.scored_tokens[index] for index in drawn[resample]))
            logs.append(sum(rates) / len(rates))
        differences.append(logs[0] - logs[1])
    return sorted(differences)


@pytest.mark.parametrize("macro", [False, True])
def test_bootstrap_equals_its_slow_definition(macro: bool) -> None:
    first, second = document_scores(2.0, seed=1, count=43), document_scores(2.1, seed=2, count=43)
    bootstrap = PairedBootstrap(first.tasks, first.scored_tokens, resamples=401, seed=9)
    interval = (bootstrap.macro if macro else bootstrap.micro)(np.array(first.nats), np.array(second.nats))
    slow = slow_bootstrap(first, second, macro=macro, resamples=401, seed=9)
    # With 401 resamples the 2.5 % and 97.5 % quantiles are the 11th lowest and the 11th highest.
    assert interval.low == pytest.approx(slow[10], abs=1e-12)
    assert interval.high == pytest.approx(slow[-11], abs=1e-12)


def test_an_arm_does_not_differ_from_itself() -> None:
    scores = document_scores(2.0, seed=1)
    nats = np.array(scores.nats)
    bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
    assert bootstrap.micro(nats, nats) == bootstrap.macro(nats, nats) == Interval(0.0, 0.0, 0.0)
    assert not bootstrap.micro(nats, nats).shows_difference


def test_a_constant_factor_has_an_interval_without_width() -> None:
    scores = document_scores(2.0, seed=1)
    nats, tokens = np.array(scores.nats), np.array(scores.scored_tokens)
    interval = PairedBootstrap(scores.tasks, scores.scored_tokens).macro(nats - 0.25 * tokens, nats)
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([-0.25] * 3, abs=1e-12)


def test_intervals_cover_the_truth_as_often_as_claimed() -> None:
    generator = np.random.default_rng(0)
    tokens, covered = [10] * 60, 0
    bootstrap = PairedBootstrap(["t"] * 60, tokens, resamples=400)
    for _ in range(200):
        interval = bootstrap.micro(generator.normal(21, 4, 60), np.full(60, 20.0))
        covered += interval.low <= 0.1 <= interval.high
    assert 180 <= covered <= 198


@pytest.mark.parametrize(("count", "known"), [(40, True), (39, False), (8, False)])
def test_a_macro_interval_needs_five_documents_per_task(count: int, known: bool) -> None:
    first, second = document_scores(2.0, seed=1, count=count), document_scores(2.1, seed=2, count=count)
    bootstrap = PairedBootstrap(first.tasks, first.scored_tokens)
    macro = bootstrap.macro(np.array(first.nats), np.array(second.nats))
    assert macro.is_known == known != macro.lacks_documents
    assert math.isfinite(macro.estimate)
    assert known or not macro.shows_difference
    assert bootstrap.micro(np.array(first.nats), np.array(second.nats)).is_known


def test_scarce_tasks_have_fewer_than_five_documents() -> None:
    assert scarce_tasks(["a"] * 5 + ["b"] * 4 + ["c"] + ["d"] * 6) == {"b": 4, "c": 1}


def test_an_infinite_score_does_not_count_as_few_documents() -> None:
    scores = document_scores(2.0, seed=1, count=38)
    nats = np.array(scores.nats)
    macro = PairedBootstrap(scores.tasks, scores.scored_tokens).macro(np.full(38, math.inf), nats)
    assert not macro.is_known
    assert not macro.lacks_documents
    assert interval_text(macro) == "n/a"
