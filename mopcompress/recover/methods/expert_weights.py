"""How much each group of prompts counts for each example, and what that means in attention.

Dun et al. (2310.02842) scale the attention that is paid to a group by a gate; which of three formulae that is stays
open, so each is a *reading*. With g the weight of a prompt's group and o the opening, one trained number for all:

- `renormalised`: ``softmax(s + log g + o)`` over prompts and text together. At g = 0 no text attends to a group.
- `values`: ``softmax(s + o)`` together, and the prompts' values times g. At g = 0 a group still takes attention.
- `separate`: text attends to text alone, plus ``g exp(o) softmax(s)`` over each group by itself (as LLaMA-Adapter).

At g = 1 the first two are the plain prompt; at o = -inf each is no prompt at all. A gate weighs the attention of text.
Among themselves the groups stand one after another as in one prompt, so that a closed one still shapes the keys and
values of those behind it (groups that could not see each other were worse: benchmarks/LOG.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.hidden_states import InstructionStates
from mopcompress.models.attention import Prefix
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.methods.gate import Gate

KeyValues = tuple[dict[int, Tensor], dict[int, Tensor]]
ExpertWeightFn = Callable[[Gate | None, InstructionStates], Float[Tensor, "batch experts"]]
"""Log weights of the experts, summing to their number; what takes the place of the gate's own."""


@dataclass(frozen=True, kw_only=True)
class ExpertWeighting:
    """How groups are weighed."""

    weighing: ExpertWeightFn | None = None  # None: by the gate; without one, every group counts fully
    reading: str = "renormalised"
    shared: bool = False  # the last group is no expert: it weighs 1 for every example
    top_k: int | None = None  # at inference only so many experts act; None: all


@runtime_checkable  # so that the test run can check it
class ReportsExpertWeights(Protocol):
    """An adapter that makes something of an instruction which can be reported."""

    def chosen(self, model: LanguageModel, instructions: InstructionStates) -> Float[Tensor, "batch experts"] | None:
        """The experts' weights at inference, 1 as in a plain prompt; None when they do not depend on what is read."""
        ...


def shuffled_weights(gate: Gate | None, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
    """The gate's weights for another document: as sharp as its own, and about nothing that this one says.

    Which other is fixed by all documents of a split (a random cycle), never by the batch: batches are sorted by length,
    and documents as long as each other are often of one task. Where there are no others, as in generation, it gets what
    the gate gives for the mean of the training instructions.
    """
    assert gate is not None  # for mypy: the arm builds one
    strangers = instructions.shuffled_mean
    return gate(gate.mean.expand_as(instructions.mean) if strangers is None else strangers)


def oracle_weights(
    tasks: Sequence[str], gate: Gate | None, instructions: InstructionStates
) -> Float[Tensor, "batch experts"]:
    """All weight on the expert of the true task.

    Raises `UsageError` when tasks are not known, as in generation, and `DataError` for one that has no expert.
    """
    if instructions.tasks is None:
        raise UsageError(
            "arm oracle: it needs the true task of every example, which generation does not know; "
            "use an adapter with a gate, such as arm mop"
        )
    if unknown := set(instructions.tasks) - set(tasks):
        raise DataError(
            f"arm oracle: no expert for the task {min(unknown)!r}, only for {', '.join(tasks)}; "
            "score rows of the tasks it was trained on"
        )
    place = torch.tensor([tasks.index(task) for task in instructions.tasks], device=instructions.mean.device)
    return torch.nn.functional.one_hot(place, len(tasks)).to(instructions.mean.dtype).mul(len(tasks)).log()


def top_k_weights(log_weights: Float[Tensor, "batch experts"], count: int) -> Float[Tensor, "batch experts"]:
    """The log weights of the `count` experts that weigh most, the others' -inf; the sum stays the number of experts.

    So what all experts together weigh does not change (ours). Of equal ones the first are kept. Where `values` is read,
    the others still take attention, as that reading has it, and nothing is saved.
    """
    experts = log_weights.shape[1]
    if count >= experts:
        return log_weights
    weakest = log_weights.argsort(dim=1, descending=True, stable=True)[:, count:]
    return log_weights.scatter(1, weakest, -math.inf).log_softmax(1) + math.log(experts)


def to_prefix(
    keys_and_values: KeyValues,
    log_weights: Float[Tensor, "batch groups"],
    prompt_log_weight: Float[Tensor, ""],
    reading: str,
) -> Prefix:
    """What text attends to when groups of equally many prompts weigh so much."""
    keys, values = keys_and_values
    groups = log_weights.shape[1]
    log_gate = log_weights.repeat_interleave(next(iter(keys.values())).shape[1] // groups, dim=1)
    match reading:
        case "renormalised":
            return Prefix(keys, values, log_gate + prompt_log_weight)
        case "values":
            return Prefix(keys, values, prompt_log_weight.expand_as(log_gate), value_gate=log_gate.exp())
        case "separate":
            scale = (log_gate + prompt_log_weight).exp()
            return Prefix(keys, values, torch.zeros_like(log_gate), value_gate=scale, separate=groups)
    raise DataError(f"gate reading {reading!r}: not renormalised, values or separate; train the adapter again")


def drop_inactive_groups(
    keys_and_values: KeyValues, log_weights: Float[Tensor, "batch groups"], reading: str
) -> tuple[KeyValues, Float[Tensor, "batch some_groups"]]:
    """The same without the groups that weigh nothing for any example, where what weighs nothing is absent."""
    heard = (log_weights > -math.inf).any(0)
    if reading == "values" or bool(heard.all()):
        return keys_and_values, log_weights
    keys, values = keys_and_values
    prompts = next(iter(keys.values())).shape[1] // len(heard)
    rows = heard.repeat_interleave(prompts).nonzero()[:, 0]
    return (
        {layer: key[:, rows] for layer, key in keys.items()},
        {layer: value[:, rows] for layer, value in values.items()},
    ), log_weights[:, heard]
