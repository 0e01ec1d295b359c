"""One training loop, one loss, one order of the data for every arm."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mopcompress.errors import NumericalError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.distillation import Distillation
from mopcompress.scoring import response_logits, scores_of
from mopcompress.states import CachedStates, batches_by_length


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an adapter is trained."""

    steps: int
    batch_size: int
    learning_rate: float  # of all but the gate
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
    adapter: Adapter,
    model: LanguageModel,
    states: CachedStates,
    training: Training,
    *,
    distillation: Distillation | None = None,
    progress: Callable[[TrainRow], None] = lambda row: None,
) -> list[TrainRow]:
    """Train an adapter, in place, by cross-entropy on response tokens; the model stays frozen.

    With `distillation` a share of the loss is the divergence from a teacher's distributions.

    AdamW without weight decay, linear warm-up, cosine decay to zero. Raises `NumericalError` when a loss is not finite.
    """
    rates = {"adapter": training.learning_rate, "gate": training.gate_learning_rate}
    learned = adapter.learned()
    parameters = [parameter for group in learned.values() for parameter in group]
    groups = [{"params": list(group), "lr": rates[name]} for name, group in learned.items() if group]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, training))
    rows = []
    order = _order(states, training)
    for step in range(1, training.steps + 1):
        start = time.perf_counter()
        chosen = next(order)
        batch = states.batch(chosen)
        with adapter.applied(model, batch.instructions):
            logits = response_logits(model, batch, states.layer)
        nats = scores_of(logits, batch).nats.mean()
        loss = distillation.loss(nats, logits, chosen) if distillation else nats
        if not bool(torch.isfinite(loss)):
            raise NumericalError(
                f"training step {step}: the loss is {loss.item()} with --learning-rate "
                f"{training.learning_rate:g}; lower it"
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimiser.step()
        schedule.step()
        row = TrainRow(
            step=step,
            steps=training.steps,
            nats=nats.item(),
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
