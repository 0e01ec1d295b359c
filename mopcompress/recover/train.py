"""One training loop, one loss, one order of the data for every arm."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mopcompress.errors import NumericalError
from mopcompress.models.attention import attending_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.mixture import MixtureOfPrompts
from mopcompress.scoring import score_response
from mopcompress.states import CachedStates, batches_by_length


@dataclass(frozen=True, kw_only=True)
class Training:
    """How prompts and gate are trained."""

    steps: int
    batch_size: int
    prompt_learning_rate: float
    gate_learning_rate: float
    warmup_fraction: float
    clip_norm: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    nats: float  # mean over the step's response tokens
    tokens: int  # real tokens that ran through the upper blocks, padding not counted
    seconds: float


def fit(
    mixture: MixtureOfPrompts,
    model: LanguageModel,
    states: CachedStates,
    training: Training,
    *,
    progress: Callable[[TrainRow], None] = lambda row: None,
) -> list[TrainRow]:
    """Train prompts and gate, in place, by cross-entropy on response tokens; the model stays frozen.

    AdamW without weight decay, linear warm-up, cosine decay to zero. Raises `NumericalError` when a loss is not finite.
    """
    groups = [{"params": [mixture.prompts, mixture.log_opening], "lr": training.prompt_learning_rate}]
    if mixture.gate is not None:
        groups.append({"params": list(mixture.gate.parameters()), "lr": training.gate_learning_rate})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, training))
    rows = []
    order = _order(states, training)
    for step in range(1, training.steps + 1):
        start = time.perf_counter()
        chosen = next(order)
        batch = states.batch(chosen)
        with attending_to(mixture.prefix(model, batch.summary)):
            left = model.resume(batch.hidden, mixture.layer)
        loss = score_response(model, left, batch).nats.mean()
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"training step {step}: the loss is {loss.item()} with --prompt-learning-rate "
                f"{training.prompt_learning_rate:g}; lower it"
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixture.parameters(), training.clip_norm)
        optimiser.step()
        schedule.step()
        row = TrainRow(
            step=step,
            steps=training.steps,
            nats=loss.item(),
            tokens=sum(len(states.documents[row].tokens) for row in chosen),
            seconds=time.perf_counter() - start,
        )
        rows.append(row)
        progress(row)
    return rows


def _rate(step: int, training: Training) -> float:
    """The share of the full learning rate at a step (from 0)."""
    warmup = max(1, round(training.warmup_fraction * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training.steps - warmup)))


def _order(states: CachedStates, training: Training) -> Iterator[list[int]]:
    """Endless epochs; the order depends on the seed alone, so every arm sees the same batches."""
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        yield from batches_by_length(states.documents, training.batch_size, generator=generator)
