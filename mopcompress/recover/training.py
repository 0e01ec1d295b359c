"""One training loop, one loss and one order of the data for every recovery method.

The rows of a step decide what is learned. In how many parts they run, one after the other or in several processes,
only changes the memory and the time that a step takes.
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
from mopcompress.recover.checkpoint import TrainingCheckpoint, TrainingState
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.distributed import Workers


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a training."""

    steps: int  # optimizer steps
    batch_size: int  # rows per step, in however many parts they run
    learning_rate: float  # of all parameters but a gate's
    gate_learning_rate: float  # 0 freezes the gate
    warmup_fraction: float  # of the steps, in which the learning rate rises linearly
    max_grad_norm: float  # gradients are never longer
    grad_clip_percentile: float  # also clip to this percentile of the non-zero norms so far (AutoClip); 100: do not
    clip_gate_separately: bool  # clip a gate's gradient by its own norm, apart from that of the prompts it weighs
    seed: int  # of the order of the rows
    gradient_accumulation_steps: int = 1  # parts of a step; equal up to rounding, except for the noise of `smop`


def fit(
    adapter: Adapter,
    model: LanguageModel,
    states: HiddenStateDataset,
    training: TrainingConfig,
    *,
    distillation: Distillation | None = None,
    progress: Callable[[TrainRow], None] = lambda row: None,
    checkpoint: TrainingCheckpoint | None = None,
    workers: Workers | None = None,
) -> list[TrainRow]:
    """Train an adapter, in place, to lower the cross-entropy of response tokens; the model stays frozen.

    The optimizer is AdamW without weight decay. The learning rate rises linearly, then decays to zero as a cosine.
    Gradients are clipped by their norms so far, and to `max_grad_norm` at most.

    Args:
        adapter: The adapter, initialized for `model`; its parameters change in place.
        model: The frozen model.
        states: The training documents' hidden states at the adapter's layer, [documents, tokens, hidden].
        training: Steps, rows per step, learning rates, clipping and seed.
        distillation: A teacher, whose divergence replaces a fraction of the cross-entropy; None: the text alone.
        progress: Receives the record of each step.
        checkpoint: Where the state is saved, and resumed from if there is one; None: nothing is saved.
        workers: The processes that train together; None: this one alone.

    Returns:
        A row per step: its cross-entropy in nats per response token, its tokens, seconds and gradient norms.

    Raises:
        NumericalError: A loss or a gradient is not finite.
        StorageError: The checkpoint cannot be written.

    Example:
        >>> import torch
        >>> from mopcompress import fit
        >>> from mopcompress.data.encoding import Document
        >>> from mopcompress.evaluation.hidden_states import HiddenStateDataset
        >>> from mopcompress.models.language_model import LanguageModel
        >>> from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
        >>> from mopcompress.recover.training import TrainingConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, attn_implementation="mopcompress", **sizes)
        >>> model = LanguageModel(LlamaForCausalLM(config).eval())
        >>> documents = [Document(task="count", tokens=(1, 2, 3, 4, 5), context_tokens=3)]  # instruction: 1, 2, 3
        >>> states = HiddenStateDataset(model, documents, layer=1, batch_size=1)
        >>> prompt = MixtureOfPrompts(torch.randn(1, 4, 16), layer=1, gate=None)  # one group of four prompt tokens
        >>> settings = TrainingConfig(
        ...     steps=20,
        ...     batch_size=1,
        ...     learning_rate=0.1,
        ...     gate_learning_rate=0.0,
        ...     warmup_fraction=0.1,
        ...     max_grad_norm=1.0,
        ...     grad_clip_percentile=100.0,
        ...     clip_gate_separately=True,
        ...     seed=0,
        ... )
        >>> rows = fit(prompt, model, states, settings)
        >>> rows[-1].nll < rows[0].nll
        True
    """
    workers = workers or Workers()
    rates = {"adapter": training.learning_rate, "gate": training.gate_learning_rate}
    groups = _trainable_groups(adapter, rates)
    parameters = [parameter for group in groups.values() for parameter in group]
    clipped = groups if training.clip_gate_separately else {"all": parameters}
    optimizer = torch.optim.AdamW([{"params": group} for group in groups.values()], weight_decay=0.0)
    state = TrainingState(adapter, optimizer)
    if checkpoint:
        checkpoint.load_into(state)
    workers.sync_state(state)
    batches = itertools.islice(_batches(states, training), len(state.rows), None)
    for step in range(len(state.rows) + 1, training.steps + 1):
        start = time.perf_counter()
        rows = next(batches)
        for param_group, name in zip(optimizer.param_groups, groups, strict=True):
            param_group["lr"] = rates[name] * _lr_factor(step - 1, training)
        optimizer.zero_grad()
        losses = _backward(adapter, model, states, rows, distillation, training.gradient_accumulation_steps, workers)
        workers.sum_over(losses, parameters)
        loss, nll = losses.tolist()
        _check_finite(loss, "loss", step, training)
        norms = {
            name: _clip_gradient(group, [row.norms[name] for row in state.rows], step, training)
            for name, group in clipped.items()
        }
        optimizer.step()
        finished = TrainRow(
            step=step,
            steps=training.steps,
            nll=nll,
            tokens=sum(len(states.documents[row].tokens) for row in rows),
            seconds=time.perf_counter() - start,
            norms=norms,
        )
        state.rows.append(finished)
        if checkpoint:
            checkpoint.save_if_due(state)
        progress(finished)
    return state.rows


def _clip_gradient(
    parameters: Sequence[nn.Parameter], earlier_norms: Sequence[float], step: int, training: TrainingConfig
) -> float:
    """Clip the gradient of a group of parameters, in place, and return its norm before clipping.

    AutoClip (Seetharaman et al., 2020, arXiv 2007.14469): clip to a percentile of all norms so far, this one included,
    and to `max_grad_norm` at most. The usual norm differs by orders of magnitude between methods, groups and models, so
    no fixed norm fits all; and after an outlier AdamW's steps stay short for long. Norms of 0 are left out: the gate of
    `mop+` has no gradient until its paths have moved, and would otherwise be held where it is.
    """
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    _check_finite(float(norm), "gradient's norm", step, training)
    limit = training.max_grad_norm
    norms = [norm_so_far for norm_so_far in (*earlier_norms, float(norm)) if norm_so_far > 0]
    if norms and training.grad_clip_percentile < 100:
        limit = min(limit, float(torch.tensor(norms).quantile(training.grad_clip_percentile / 100)))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _check_finite(value: float, name: str, step: int, training: TrainingConfig) -> None:
    if not math.isfinite(value):
        rate = f"{training.learning_rate:g}"
        raise NumericalError(
            f"training step {step}: the {name} is {value} with recovery.learning_rate {rate}; lower it"
        )


def _trainable_groups(adapter: Adapter, rates: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
    """Return the groups that are trained. A group whose learning rate is 0 is frozen, in place."""
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
) -> Float[Tensor, " loss_and_nll"]:
    """Return the training loss and the NLL of these rows, both in nats per response token.

    Without distillation the two are equal.
    """
    batch = states.batch(rows)
    # recorded after the adapter became active: the outputs for its prompts, before that, are not those of the text
    with adapter.active(model, batch.instructions), _recorded_outputs(distillation, model, states.layer) as outputs:
        logits = response_logits(model, batch, states.layer)
    nll = token_nll(logits, batch).mean()
    return torch.stack([distillation.loss(nll, logits, outputs, batch, rows) if distillation else nll, nll])


def _recorded_outputs(
    distillation: Distillation | None, model: LanguageModel, layer: int
) -> AbstractContextManager[list[Tensor]]:
    return distillation.record_outputs(model, layer) if distillation else nullcontext([])


def _backward(
    adapter: Adapter,
    model: LanguageModel,
    states: HiddenStateDataset,
    rows: Sequence[int],
    distillation: Distillation | None,
    gradient_accumulation_steps: int,
    workers: Workers,
) -> Float[Tensor, " loss_and_nll"]:
    """Return this process's part of the step's mean loss and NLL; add the loss's gradient to the parameters'."""
    parts = gradient_accumulation_steps * workers.count
    scored = _count_scored(states, rows)
    sums = torch.zeros(2, device=states.device)
    for part in range(workers.rank, parts, workers.count):
        part_rows = rows[part::parts]  # rows are sorted by length: every part gets short and long ones
        if part_rows:
            losses = compute_losses(adapter, model, states, part_rows, distillation) * (
                _count_scored(states, part_rows) / scored
            )
            losses[0].backward()
            sums += losses.detach()
    return sums


def _count_scored(states: HiddenStateDataset, rows: Sequence[int]) -> int:
    documents = [states.documents[row] for row in rows]
    return sum(len(document.tokens) - document.context_tokens for document in documents)


def _lr_factor(step: int, training: TrainingConfig) -> float:
    """Return the fraction of the full learning rate at a step, counted from 0."""
    warmup = max(1, round(training.warmup_fraction * training.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training.steps - warmup)))


def _batches(states: HiddenStateDataset, training: TrainingConfig) -> Iterator[list[int]]:
    """Yield batches of rows without end. Their order depends on the seed alone: every method sees the same batches."""
    generator = torch.Generator().manual_seed(training.seed)
    while True:
        yield from batches_by_length(states.documents, training.batch_size, generator=generator)
