"""A learning rate for an arm: each rate of a small grid trains it for a few steps, the best on validation rows wins.

While the best is at the edge of the grid, the grid grows there. One rate for every arm, or one from the literature,
chooses the winner of a comparison by accident. The rate of the gate is not swept.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopcompress import artifact
from mopcompress.errors import DataError, NumericalError
from mopcompress.evaluation import evaluate, micro
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recipe.modifiers import changed
from mopcompress.recover.adapter import Adapter
from mopcompress.states import CachedStates

FACTOR = 3.0  # from a rate to the next; the grid begins around the recipe's rate, else the arm's own
MOST = 6  # rates tried

Train = Callable[[PromptRecoveryModifier], Adapter]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One rate of the grid."""

    learning_rate: float
    validation_nats: float | None  # mean over the scored tokens; None: it broke down
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was tried for one arm, and what came of it."""

    arm: str
    steps: int  # of each trial, warm-up and decay included
    batch_size: int
    validation_rows: int
    trials: list[Trial]
    learning_rate: float  # the best
    at_edge: bool  # no higher or no lower rate was tried: the best may lie outside
    seconds: float


def sweep_rate(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: CachedStates,
    train: Train,
    *,
    batch_size: int,
) -> Sweep:
    """Train with every rate by `train`, as short as `modifier.sweep_steps`, and score on the validation rows.

    Raises `NumericalError` when no rate gives a finite loss.
    """
    start, middle = time.perf_counter(), modifier.rate
    assert middle is not None  # for mypy: arms without a rate are not swept

    def tried(exponent: int) -> Trial:
        begin = time.perf_counter()
        rate = middle * FACTOR**exponent
        nats = None
        try:
            adapter = train(changed(modifier, steps=modifier.sweep_steps).at_rate(rate))
            loss = math.log(
                micro(evaluate(model, validation, adapter.compiled(model), batch_size=batch_size)).perplexity
            )
            nats = loss if math.isfinite(loss) else None
        except NumericalError:
            pass  # too high a rate is what a sweep is there to find
        return Trial(learning_rate=rate, validation_nats=nats, seconds=time.perf_counter() - begin)

    grid = {exponent: tried(exponent) for exponent in (-1, 0, 1)}
    while (edge := _beyond(grid)) is not None and len(grid) < MOST:
        grid[edge] = tried(edge)
    trials = [grid[exponent] for exponent in sorted(grid)]
    best = min(trials, key=_loss)
    if best.validation_nats is None:
        raise NumericalError(
            f"sweep of {modifier.arm}: no rate from {trials[0].learning_rate:g} to {trials[-1].learning_rate:g} gives "
            "a finite loss; lower --learning-rate"
        )
    return Sweep(
        arm=modifier.arm,
        steps=modifier.sweep_steps,
        batch_size=modifier.batch_size,
        validation_rows=len(validation.documents),
        trials=trials,
        learning_rate=best.learning_rate,
        at_edge=_beyond(grid) is not None,
        seconds=time.perf_counter() - start,
    )


def _beyond(grid: dict[int, Trial]) -> int | None:
    """The next exponent outside, where the best of the grid is at its edge; of equal ones the lowest is the best."""
    best = min(sorted(grid), key=lambda exponent: _loss(grid[exponent]))
    return {min(grid): best - 1, max(grid): best + 1}.get(best)


def _loss(trial: Trial) -> float:
    return math.inf if trial.validation_nats is None else trial.validation_nats


def told(sweep: Sweep) -> str:
    """One line for a person."""
    found = [trial.validation_nats for trial in sweep.trials]
    words = ["broke down" if nats is None else f"{nats:.4f}" for nats in found]
    tried = ", ".join(f"{trial.learning_rate:.3g}: {word}" for trial, word in zip(sweep.trials, words, strict=True))
    edge = " (at the edge of the grid: a rate outside may be better)" if sweep.at_edge else ""
    return (
        f"{sweep.arm}: learning rate {sweep.learning_rate:.3g}{edge}; validation nats a token after {sweep.steps} "
        f"steps: {tried}; {sweep.seconds:.0f} s"
    )


def check_validation(rows: int, data: str) -> None:
    """Raise `DataError` when there is nothing to choose a rate by."""
    if not rows:
        raise DataError(
            f"data {data}: --sweep chooses by validation rows, and there are none; add some, or leave it out"
        )


def write_sweep(sweep: Sweep, path: Path) -> dict[str, Any]:
    """Keep what was found, so that a run that goes on does not sweep again."""
    path.parent.mkdir(exist_ok=True)
    artifact.write_whole(path, json.dumps(asdict(sweep), indent=1) + "\n")
    return asdict(sweep)


def read_sweeps(folder: Path) -> dict[str, Any]:
    """The sweeps of a bench, by setting and arm."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
