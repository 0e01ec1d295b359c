"""The sweep of a learning rate: each rate of a small grid trains the arm, and the best on validation rows wins.

While the best rate is at the edge of the grid, the grid grows there. One rate for all arms, or a rate from the
literature, would choose the winner of a comparison by accident. So would trials shorter than the training: the best
rate for few steps is too high for many (benchmarks/LOG.md). A trial is therefore as long as the training by default,
and the best trial is the training. The gate's learning rate is not swept.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

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
from mopcompress.recover.distributed import Workers
from mopcompress.results import Sweep, Trial
from mopcompress.storage import artifacts

FACTOR = 3.0  # from a rate to the next; the grid starts around the recipe's rate, else the arm's default
MAX_TRIALS = 6
TRIALS_FILE = "trials.json"

Train = Callable[[PromptRecoveryModifier], TrainedAdapter]


def sweep_rate(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: HiddenStateDataset,
    train: Train,
    *,
    batch_size: int,
    folder: Path | None = None,
    workers: Workers | None = None,
) -> tuple[Sweep, TrainedAdapter | None]:
    """Train with every rate of the grid, and choose the one with the lowest loss on the validation rows.

    Returns the best trained adapter too, when trials are as long as the training and this call trained it. Trials are
    saved in `folder`, and those that are there already are not repeated. All `workers` use the trials of the first one.
    Raises `NumericalError` when no rate gives a finite loss.
    """
    workers = workers or Workers()
    middle = modifier.rate
    assert middle is not None  # for mypy: arms without a rate are not swept
    shortened = replace_checked(modifier, steps=modifier.sweep_steps or modifier.steps)
    finished_trials = workers.same_for_all(read_trials(folder) if folder else {})
    grid: dict[int, Trial] = {}
    winner: TrainedAdapter | None = None
    exponents = sorted(SWEPT, reverse=True)
    while exponents:
        exponent = exponents.pop()
        rate, trained = middle * FACTOR**exponent, None
        if rate in finished_trials:
            grid[exponent] = finished_trials[rate]
        else:
            trial, trained = _run_trial(shortened.at_rate(rate), model, validation, train, batch_size)
            grid[exponent] = workers.same_for_all(trial)
        if _best(grid) == exponent:
            winner = trained
        trials = [grid[exponent] for exponent in sorted(grid)]
        if folder:
            write_trials(trials, folder)
        if not exponents and (edge := _beyond(grid)) is not None and len(grid) < MAX_TRIALS:
            exponents.append(edge)
    best = _require_finite(grid[_best(grid)], trials, modifier.arm)
    sweep = Sweep(
        arm=modifier.arm,
        steps=shortened.steps,
        batch_size=modifier.train_batch_size,
        validation_rows=len(validation.documents),
        trials=trials,
        learning_rate=best.learning_rate,
        at_edge=_beyond(grid) is not None,
        seconds=sum(trial.seconds for trial in trials),
    )
    return sweep, winner if shortened.steps == modifier.steps else None


def _run_trial(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: HiddenStateDataset,
    train: Train,
    batch_size: int,
) -> tuple[Trial, TrainedAdapter | None]:
    """Train with one rate and score it; a rate that is too high for a finite loss is a result too."""
    start = time.perf_counter()
    loss, trained = None, None
    try:
        trained = train(modifier)
        apply_adapter = trained.adapter.compile_for_inference(model)
        scores = evaluate(model, validation, apply_adapter, batch_size=batch_size)
        measured = math.log(micro_average(scores).perplexity)
        loss = measured if math.isfinite(measured) else None
    except NumericalError:
        pass
    seconds = trained.seconds if trained else time.perf_counter() - start
    assert modifier.rate is not None  # for mypy
    return Trial(learning_rate=modifier.rate, validation_nats=loss, seconds=seconds), trained


def _require_finite(best: Trial, trials: Sequence[Trial], arm: str) -> Trial:
    if best.validation_nats is None:
        rates = f"from {trials[0].learning_rate:g} to {trials[-1].learning_rate:g}"
        raise NumericalError(f"sweep of {arm}: no rate {rates} gives a finite loss; lower recovery.learning_rate")
    return best


def _best(grid: Mapping[int, Trial]) -> int:
    """Return the exponent with the lowest loss; of equal ones the smallest exponent."""
    losses = {exponent: trial.validation_nats for exponent, trial in grid.items()}
    return min(sorted(losses), key=lambda exponent: math.inf if (loss := losses[exponent]) is None else loss)


def _beyond(grid: Mapping[int, Trial]) -> int | None:
    """Return the next exponent outside when the best is at the edge of the grid, else None."""
    best = _best(grid)
    return {min(grid): best - 1, max(grid): best + 1}.get(best)


def describe_sweep(sweep: Sweep) -> str:
    """Return the result of a sweep in one line for a person."""
    losses = [trial.validation_nats for trial in sweep.trials]
    words = ["broke down" if loss is None else f"{loss:.4f}" for loss in losses]
    trials = ", ".join(f"{trial.learning_rate:.3g}: {word}" for trial, word in zip(sweep.trials, words, strict=True))
    edge = " (at the edge of the grid: a rate outside may be better)" if sweep.at_edge else ""
    return (
        f"{sweep.arm}: learning rate {sweep.learning_rate:.3g}{edge}; validation loss in nats per token after "
        f"{sweep.steps} steps: {trials}; {sweep.seconds:.0f} s"
    )


def check_validation(dataset: EncodedDataset, data: str, modifiers: Sequence[PromptRecoveryModifier]) -> None:
    """Raise `DataError` when a sweep has no validation rows, or has some that `oracle` has no expert for."""
    swept = [modifier for modifier in modifiers if modifier.sweeps]
    if swept and not dataset.validation:
        raise DataError(
            f"data {data}: --sweep chooses by validation rows, and there are none; add some, or leave it out"
        )
    unknown_tasks = sorted({document.task for document in dataset.validation} - set(dataset.tasks))
    if unknown_tasks and any(ARM_DEFAULTS[modifier.arm].needs_tasks for modifier in swept):
        raise DataError(
            f"data {data}: validation rows are of {unknown_tasks[0]!r}, which no training row is, so oracle has no "
            "expert for them in a sweep; raise --train-rows, or leave --sweep or those rows out"
        )


def write_sweep(sweep: Sweep, path: Path) -> None:
    """Write a finished sweep, so that a resumed run does not repeat it."""
    path.parent.mkdir(exist_ok=True)
    artifacts.write_atomically(path, json.dumps(asdict(sweep), indent=1) + "\n")


def write_trials(trials: Sequence[Trial], folder: Path) -> None:
    """Write the finished trials of a sweep into the checkpoint folder of its training."""
    artifacts.write_atomically(folder / TRIALS_FILE, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")


def read_trials(folder: Path) -> dict[float, Trial]:
    """Read the trials that `write_trials` wrote, by learning rate. Raises `DataError` when the file is damaged."""
    path = folder / TRIALS_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return {trial.learning_rate: trial for trial in (Trial(**entry) for entry in entries)}
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); without it the trials are trained again") from error
