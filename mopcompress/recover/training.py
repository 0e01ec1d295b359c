"""One training loop, one loss, one order of the data for every arm.

A step's rows decide what is learned; in how many parts they run, one after the other or in several processes, only
what memory and time it takes.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.errors import NumericalError
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.loss import response_logits, token_nll
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter, TrainRow
from mopcompress.recover.checkpoint import Keeping, TrainingState
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.distributed import Workers


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an adapter is trained."""

    steps: int
    batch_size: int  # rows a step, whatever the parts
    learning_rate: float  # of all but the gate
    gate_learning_rate: float
    warmup_fraction: float
    max_grad_norm: float  # the greatest norm of a gradient
    grad_clip_percentile: (
        float  # nor is it left longer than so many per cent of those above 0 were until then; 100: it is
    )
    clip_gate_separately: bool  # the gradient of a gate is clipped by itself, not together with that of what it weighs
    seed: int
    gradient_accumulation_steps: int = (
        1  # parts of a step, one after the other: the same to rounding, but for the noise of `smop`
    )


def fit(
    adapter: Adapter,
    model: LanguageModel,
    states: HiddenStateDataset,
    training: TrainingConfig,
    *,
    distillation: Distillation | None = None,
    progress: Callable[[TrainRow], None] = lambda row: None,
    keeping: Keeping | None = None,
    workers: Workers | None = None,
) -> list[TrainRow]:
    """Train an adapter, in place, by cross-entropy on response tokens; the model stays frozen.

    With `distillation` a share of the loss is the divergence from a teacher's distributions.

    AdamW without weight decay, linear warm-up, cosine decay to zero, gradients clipped by their norms so far and to
    `max_grad_norm` at most. Goes on where `keeping` says that it stopped.
    Raises `NumericalError` when a loss or a gradient is not finite.
    """
    workers = workers or Workers()
    rates = {"adapter": training.learning_rate, "gate": training.gate_learning_rate}
    learned = _trainable_groups(adapter, rates)
    parameters = [parameter for group in learned.values() for parameter in group]
    clipped = learned if training.clip_gate_separately else {"all": parameters}
    optimiser = torch.optim.AdamW([{"params": group} for group in learned.values()], weight_decay=0.0)
    standing = TrainingState(adapter, optimiser)
    if keeping:
        keeping.restore(standing)
    workers.make_equal(standing)
    order = itertools.islice(_batches(states, training), len(standing.rows), None)
    for step in range(len(standing.rows) + 1, training.steps + 1):
        start = time.perf_counter()
        chosen = next(order)
        for group, name in zip(optimiser.param_groups, learned, strict=True):
            group["lr"] = rates[name] * _lr_factor(step - 1, training)
        optimiser.zero_grad()
        losses = _backward(adapter, model, states, chosen, distillation, training.gradient_accumulation_steps, workers)
        workers.add_up(losses, parameters)
        loss, nats = losses.tolist()
        _check(loss, "loss", step, training)
        norms = {
            name: _clip_gradient(group, [row.norms[name] for row in standing.rows], step, training)
            for name, group in clipped.items()
        }
        optimiser.step()
        row = TrainRow(
            step=step,
            steps=training.steps,
            nats=nats,
            tokens=sum(len(states.documents[row].tokens) for row in chosen),
            seconds=time.perf_counter() - start,
            norms=norms,
        )
        standing.rows.append(row)
        if keeping:
            keeping.keep(standing)
        progress(row)
    return standing.rows


def _clip_gradient(
    parameters: Sequence[nn.Parameter], before: Sequence[float], step: int, training: TrainingConfig
) -> float:
    """Clip a group's gradient, in place, and return its norm before.

    AutoClip (Seetharaman et al., 2020, arXiv 2007.14469): to a percentile of all norms so far, this one among them, and
    to `max_grad_norm` at most. What is long for a gradient differs by orders of magnitude between arms, groups and models
    here, so that no fixed norm fits all; and AdamW's steps are short for long after an outlier. Norms of 0 are left
    out: the gate of `mop+` has no gradient until its paths have moved, and would be held where it is.
    """
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    _check(float(norm), "gradient's norm", step, training)
    most, norms = training.max_grad_norm, [one for one in (*before, float(norm)) if one > 0]
    if norms and training.grad_clip_percentile < 100:
        most = min(most, float(torch.tensor(norms).quantile(training.grad_clip_percentile / 100)))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


def _check(value: float, name: str, step: int, training: TrainingConfig) -> None:
    if not math.isfinite(value):
        rate = f"{training.learning_rate:g}"
        raise NumericalError(f"training step {step}: the {name} is {value} with --learning-rate {rate}; lower it")


def _trainable_groups(adapter: Adapter, rates: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
    """The groups that are trained. One of rate 0 is frozen, in place."""
    groups = {name: list(group) for name, group in adapter.parameter_groups().items()}
    for name, group in groups.items():
        for parameter in group:
            parameter.requires_grad_(rates[name] > 0)
    return {name: group for name, group in groups.items() if group and rates[name] > 0}


def compute_losses(
    adapter: Adapter,
    model: LanguageModel,
    states: HiddenStateDataset,
    rows: Sequence[int],
    distillation: Distillation | None = None,
) -> Float[Tensor, " loss_and_nats"]:
    """What training lowers and the nats, means over response tokens; without distillation they are the same."""
    batch = states.batch(rows)
    # watched after the adapter began to act: what prompts give on their own way up is none of the text's
    with adapter.active(model, batch.instructions), _watched(distillation, model, states.layer) as seen:
        logits = response_logits(model, batch, states.layer)
    nats = token_nll(logits, batch).mean()
    return torch.stack([distillation.loss(nats, logits, seen, batch, rows) if distillation else nats, nats])


def _watched(
    distillation: Distillation | None, model: LanguageModel, layer: int
) -> AbstractContextManager[list[Tensor]]:
    return distillation.watched(model, layer) if distillation else nullcontext([])


def _backward(
    adapter: Adapter,
    model: LanguageModel,
    states: HiddenStateDataset,
    chosen: Sequence[int],
    distillation: Distillation | None,
    gradient_accumulation_steps: int,
    workers: Workers,
) -> Float[Tensor, " loss_and_nats"]:
    """This process's share of the step's mean losses; the first one's gradient is added to the parameters'."""
    parts = gradient_accumulation_steps * workers.count
    scored = _scored_tokens(states, chosen)
    share = torch.zeros(2, device=states.device)
    for part in range(workers.rank, parts, workers.count):
        rows = chosen[part::parts]  # chosen is sorted by length: every part gets of each
        if rows:
            losses = compute_losses(adapter, model, states, rows, distillation) * (
                _scored_tokens(states, rows) / scored
            )
            losses[0].backward()
            share += losses.detach()
    return share


def _scored_tokens(states: HiddenStateDataset, rows: Sequence[int]) -> int:
    documents = [states.documents[row] for row in rows]
    return sum(len(document.tokens) - document.context_tokens for document in documents)


def _lr_factor(step: int, training: TrainingConfig) -> float:
    """The share of the full learning rate at a step (from 0)."""
    warmup = max(1, round(training.warmup_fraction * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training.steps - warmup)))


def _batches(states: HiddenStateDataset, training: TrainingConfig) -> Iterator[list[int]]:
    """Endless epochs; the order depends on the seed alone, so every arm sees the same batches."""
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        yield from batches_by_length(states.documents, training.batch_size, generator=generator)
