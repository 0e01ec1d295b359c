"""A learning rate for an arm: each rate of a small grid trains it, and the best on validation rows wins.

While the best is at the edge of the grid, the grid grows there. One rate for every arm, or one from the literature,
chooses the winner of a comparison by accident. So do trials that are shorter than the training: what is best for few
steps is too high for many (benchmarks/LOG.md). So a trial is as long as the training unless told otherwise, and the
best trial is the training. The rate of the gate is not swept.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mopcompress.data.dataset import EncodedDataset
from mopcompress.errors import DataError, NumericalError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, micro_average
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.pruning_modifiers import replace_checked
from mopcompress.recipe.recovery_modifier import SWEPT
from mopcompress.recover.adapter import TrainedAdapter
from mopcompress.results import Sweep, Trial
from mopcompress.storage import artifacts

FACTOR = 3.0  # from a rate to the next; the grid begins around the recipe's rate, else the arm's own
MOST = 6  # rates tried
TRIALS = "trials.json"

Train = Callable[[PromptRecoveryModifier], TrainedAdapter]


def sweep_rate(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: HiddenStateDataset,
    train: Train,
    *,
    batch_size: int,
    known: Mapping[float, Trial] | None = None,
    keep: Callable[[Sequence[Trial]], None] = lambda trials: None,
    agreed: Callable[[Trial], Trial] = lambda trial: trial,
) -> tuple[Sweep, TrainedAdapter | None]:
    """Train with every rate by `train`, and score on the validation rows; the training too, if a trial is as long.

    Trials in `known`, by their rates, are not repeated; `keep` is given all trials after each; `agreed` is what all
    processes take a trial for. Raises `NumericalError`
    when no rate gives a finite loss.
    """
    middle = modifier.rate
    assert middle is not None  # for mypy: arms without a rate are not swept
    shortened = replace_checked(modifier, steps=modifier.sweep_steps or modifier.steps)
    grid: dict[int, Trial] = {}
    winner: TrainedAdapter | None = None
    exponents = sorted(SWEPT, reverse=True)
    while exponents:
        exponent = exponents.pop()
        rate, recovered = middle * FACTOR**exponent, None
        if known and rate in known:
            grid[exponent] = known[rate]
        else:
            trial, recovered = _trial(shortened.at_rate(rate), model, validation, train, batch_size)
            grid[exponent] = agreed(trial)
        if _best(grid) == exponent:
            winner = recovered
        trials = [grid[exponent] for exponent in sorted(grid)]
        keep(trials)
        if not exponents and (edge := _beyond(grid)) is not None and len(grid) < MOST:
            exponents.append(edge)
    best = _checked(grid[_best(grid)], trials, modifier.arm)
    found = Sweep(
        arm=modifier.arm,
        steps=shortened.steps,
        batch_size=modifier.train_batch_size,
        validation_rows=len(validation.documents),
        trials=trials,
        learning_rate=best.learning_rate,
        at_edge=_beyond(grid) is not None,
        seconds=sum(trial.seconds for trial in trials),
    )
    return found, winner if shortened.steps == modifier.steps else None


def _trial(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: HiddenStateDataset,
    train: Train,
    batch_size: int,
) -> tuple[Trial, TrainedAdapter | None]:
    """What came of one rate; too high a one is what a sweep is there to find."""
    start = time.perf_counter()
    nats, recovered = None, None
    try:
        recovered = train(modifier)
        applied = recovered.adapter.compile_for_inference(model)
        loss = math.log(micro_average(evaluate(model, validation, applied, batch_size=batch_size)).perplexity)
        nats = loss if math.isfinite(loss) else None
    except NumericalError:
        pass
    seconds = recovered.seconds if recovered else time.perf_counter() - start
    assert modifier.rate is not None  # for mypy
    return Trial(learning_rate=modifier.rate, validation_nats=nats, seconds=seconds), recovered


def _checked(best: Trial, trials: Sequence[Trial], arm: str) -> Trial:
    if best.validation_nats is None:
        rates = f"from {trials[0].learning_rate:g} to {trials[-1].learning_rate:g}"
        raise NumericalError(f"sweep of {arm}: no rate {rates} gives a finite loss; lower --learning-rate")
    return best


def _best(grid: Mapping[int, Trial]) -> int:
    """The exponent of the least loss; of equal ones the lowest."""
    losses = {exponent: trial.validation_nats for exponent, trial in grid.items()}
    return min(sorted(losses), key=lambda exponent: math.inf if (nats := losses[exponent]) is None else nats)


def _beyond(grid: Mapping[int, Trial]) -> int | None:
    """The next exponent outside, where the best of the grid is at its edge."""
    best = _best(grid)
    return {min(grid): best - 1, max(grid): best + 1}.get(best)


def describe_sweep(sweep: Sweep) -> str:
    """One line for a person."""
    found = [trial.validation_nats for trial in sweep.trials]
    words = ["broke down" if nats is None else f"{nats:.4f}" for nats in found]
    tried = ", ".join(f"{trial.learning_rate:.3g}: {word}" for trial, word in zip(sweep.trials, words, strict=True))
    edge = " (at the edge of the grid: a rate outside may be better)" if sweep.at_edge else ""
    return (
        f"{sweep.arm}: learning rate {sweep.learning_rate:.3g}{edge}; validation nats a token after {sweep.steps} "
        f"steps: {tried}; {sweep.seconds:.0f} s"
    )


def check_validation(documents: EncodedDataset, data: str, modifiers: Sequence[PromptRecoveryModifier]) -> None:
    """Raise `DataError` when one of `modifiers` sweeps, and validation rows are none, or unknown to its oracle."""
    swept = [one for one in modifiers if one.sweeps]
    if swept and not documents.validation:
        raise DataError(
            f"data {data}: --sweep chooses by validation rows, and there are none; add some, or leave it out"
        )
    strangers = sorted({row.task for row in documents.validation} - set(documents.tasks))
    if strangers and any(ARM_DEFAULTS[one.arm].needs_tasks for one in swept):
        raise DataError(
            f"data {data}: validation rows are of {strangers[0]!r}, which no training row is, so oracle has no expert "
            "for them in a sweep; raise --train-rows, or leave --sweep or those rows out"
        )


def write_sweep(sweep: Sweep, path: Path) -> dict[str, Any]:
    """Keep what was found, so that a run that goes on does not sweep again."""
    path.parent.mkdir(exist_ok=True)
    artifacts.write_atomically(path, json.dumps(asdict(sweep), indent=1) + "\n")
    return asdict(sweep)


def write_trials(trials: Sequence[Trial], folder: Path) -> None:
    """Keep, in the folder of a training that goes on, what a sweep for it has tried."""
    artifacts.write_atomically(folder / TRIALS, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")


def read_trials(folder: Path) -> dict[float, Trial]:
    """What `write_trials` kept, by rate."""
    path = folder / TRIALS
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return {trial.learning_rate: trial for trial in (Trial(**one) for one in fields)}
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); without it the trials are trained again") from error
