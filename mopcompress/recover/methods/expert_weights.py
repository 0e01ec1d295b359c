"""Weights of the experts for each example, and the formula by which they act in attention: the gate mode.

Dun et al. (2310.02842) scale the attention that text pays to a group of prompts by a gate. The paper leaves open which
of three formulae that is, so each is a gate mode. With s_ij the scaled dot product of query i and key j, g_e the weight
of group e, e(j) the group of prompt j, v_j the value of key j, and o `prompt_log_weight`, a trained number for all:

- `renormalised`: one softmax over text and prompts, with the weight as a bias on the logits,
  ``a_ij = softmax_j(s_ij + b_j)`` with ``b_j = log g_e(j) + o`` for prompts and 0 for text; output ``sum_j a_ij v_j``.
  At g = 0 no text attends to a group.
- `values`: one softmax with ``b_j = o`` for prompts, and the weight as a factor on the prompts' values; output
  ``sum_text a_ij v_j + sum_prompts g_e(j) a_ij v_j``. At g = 0 a group still takes attention.
- `separate`: a softmax over text alone, plus one over each group by itself (as LLaMA-Adapter); output
  ``sum_text softmax_j(s_ij) v_j + sum_e g_e exp(o) sum_(j in e) softmax_(j in e)(s_ij) v_j``.

At g = 1 the first two are the plain prompt; at o = -inf each is no prompt at all. A gate weighs the attention of text.
Among themselves the groups follow one another as in one prompt. A group of weight 0 therefore still shapes the keys
and values of those after it (groups that could not see each other were worse: benchmarks/LOG.md).
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
"""Keys and values of all prompts by layer, each [kv_heads, prompts, head]."""

ExpertWeightFn = Callable[[Gate | None, InstructionStates], Float[Tensor, "batch experts"]]
"""Gives log weights of the experts in place of the gate; the weights sum to the number of experts."""


@dataclass(frozen=True, kw_only=True)
class ExpertWeighting:
    """Settings by which groups of prompts are weighed."""

    weight_fn: ExpertWeightFn | None = None  # None: the gate, or weight 1 for every group if there is none
    mode: str = "renormalised"
    shared: bool = False  # the last group is no expert: it has weight 1 for every example
    top_k: int | None = None  # number of experts that act at inference; None: all


@runtime_checkable  # so that the test run can check it
class ReportsExpertWeights(Protocol):
    """An adapter whose weights of the experts depend on the instruction and can be reported."""

    def expert_weights(
        self, model: LanguageModel, instructions: InstructionStates
    ) -> Float[Tensor, "batch experts"] | None:
        """Return the experts' weights at inference, 1 as in a plain prompt; None if no instruction changes them."""
        ...


def shuffled_weights(gate: Gate | None, instructions: InstructionStates) -> Float[Tensor, "batch experts"]:
    """Return the gate's log weights for another document: as sharp as its own, and unrelated to this document.

    The other document is fixed by a random cycle through all documents of a split, never by the batch: batches are
    sorted by length, and documents of equal length are often of one task. In generation there is no other document, and
    the gate reads the mean of the training instructions.
    """
    assert gate is not None  # for mypy: the arm builds one
    shuffled = instructions.shuffled_mean
    return gate(gate.mean.expand_as(instructions.mean) if shuffled is None else shuffled)


def oracle_weights(
    tasks: Sequence[str], gate: Gate | None, instructions: InstructionStates
) -> Float[Tensor, "batch experts"]:
    """Return log weights with all weight on the expert of the true task.

    Raises `UsageError` when tasks are unknown, as in generation, and `DataError` for a task without an expert.
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
    experts = torch.tensor([tasks.index(task) for task in instructions.tasks], device=instructions.mean.device)
    return torch.nn.functional.one_hot(experts, len(tasks)).to(instructions.mean.dtype).mul(len(tasks)).log()


def top_k_weights(log_weights: Float[Tensor, "batch experts"], count: int) -> Float[Tensor, "batch experts"]:
    """Return the log weights of the `count` strongest experts, with -inf for the others.

    The weights still sum to the number of experts, so that the total weight of the prompts does not change (ours). Of
    equal experts the first ones stay. In the gate mode `values` the others still take attention, and nothing is saved.
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
    mode: str,
) -> Prefix:
    """Return the prefix of groups of equally many prompts with these weights, by the formula of the gate mode.

    Raises `DataError` for an unknown mode.
    """
    keys, values = keys_and_values
    groups = log_weights.shape[1]
    log_gate = log_weights.repeat_interleave(next(iter(keys.values())).shape[1] // groups, dim=1)
    match mode:
        case "renormalised":
            return Prefix(keys, values, log_gate + prompt_log_weight)
        case "values":
            return Prefix(keys, values, prompt_log_weight.expand_as(log_gate), value_gate=log_gate.exp())
        case "separate":
            scale = (log_gate + prompt_log_weight).exp()
            return Prefix(keys, values, torch.zeros_like(log_gate), value_gate=scale, separate=groups)
    raise DataError(f"gate mode {mode!r}: not renormalised, values or separate; train the adapter again")


def drop_inactive_groups(
    keys_and_values: KeyValues, log_weights: Float[Tensor, "batch groups"], mode: str
) -> tuple[KeyValues, Float[Tensor, "batch active_groups"]]:
    """Return keys, values and log weights without the groups that have weight 0 for every example of the batch.

    In the gate mode `values` all groups stay, because a group of weight 0 takes attention there.
    """
    active = (log_weights > -math.inf).any(0)
    if mode == "values" or bool(active.all()):
        return keys_and_values, log_weights
    keys, values = keys_and_values
    prompts_per_group = next(iter(keys.values())).shape[1] // len(active)
    prompts = active.repeat_interleave(prompts_per_group).nonzero()[:, 0]
    return (
        {layer: key[:, prompts] for layer, key in keys.items()},
        {layer: value[:, prompts] for layer, value in values.items()},
    ), log_weights[:, active]
