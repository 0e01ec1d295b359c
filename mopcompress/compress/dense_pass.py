"""The dense model's pass through a block, which records what its linears compute as targets for the compressed ones.

The dense pass runs a few samples at a time, because it compresses nothing. So the intermediate activations of a block,
such as the inner states of the MLP, are never in memory for all samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.dense_targets import DenseActivations
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, forward_hooks, weight_of

_TOKENS = 2048  # per run of a block, about


def dense_activations(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: Float[Tensor, "samples time hidden"] | None,
    index: int,
    groups: Sequence[Sequence[Linear]],
) -> tuple[Float[Tensor, "samples time hidden"], dict[Linear, DenseActivations]]:
    """Run block `index` and return its outputs, and the activations of each group under the group's first linear.

    A group is a list of linears that share their input. Tokens are paired by position, so a group that only some tokens
    reach, such as an expert's, is left out.
    """
    output_groups = [group for group in groups if _has_fewer_outputs(group)]
    input_groups = [group for group in groups if not _has_fewer_outputs(group)]
    recorded: dict[Linear, Tensor] = {}
    block_outputs = tokens.new_empty(0)
    samples = max(1, _TOKENS // tokens.shape[1])
    for first in range(0, len(tokens), samples):
        chunk = slice(first, first + samples)
        input_linears = [group[0] for group in input_groups]
        output_linears = [linear for group in output_groups for linear in group]
        with record_inputs(input_linears) as inputs, _record_outputs(output_linears) as outputs:
            chunk_outputs = model.run_block(tokens[chunk], None if hidden is None else hidden[chunk], index)
        if first == 0:
            block_outputs = chunk_outputs.new_empty(len(tokens), *chunk_outputs.shape[1:])
        block_outputs[chunk] = chunk_outputs
        values = inputs | {
            group[0]: torch.cat([outputs[linear] for linear in group], -1)
            for group in output_groups
            if all(linear in outputs for linear in group)
        }
        if first == 0:
            recorded = {linear: value.new_empty(tokens.numel(), value.shape[-1]) for linear, value in values.items()}
        positions = slice(first * tokens.shape[1], (first + samples) * tokens.shape[1])
        recorded = {
            linear: rows
            for linear, rows in recorded.items()
            if linear in values and values[linear][..., 0].numel() == len(rows[positions])
        }
        for linear, rows in recorded.items():
            rows[positions] = values[linear].flatten(0, -2)
    with_outputs = {group[0] for group in output_groups}
    return block_outputs, {linear: DenseActivations(rows, linear in with_outputs) for linear, rows in recorded.items()}


@contextmanager
def record_inputs(linears: Iterable[Linear]) -> Iterator[dict[Linear, Tensor]]:
    """Record the first input of each linear inside the `with` block."""
    inputs: dict[Linear, Tensor] = {}
    with on_input(linears, lambda linear, value: inputs.setdefault(linear, value)):
        yield inputs


@contextmanager
def on_input(linears: Iterable[Linear], act: Callable[[Linear, Tensor], object]) -> Iterator[None]:
    """Call `act(linear, input)` before each linear runs, inside the `with` block."""

    def act_on_input(linear: Linear, inputs: tuple[Tensor, ...]) -> None:
        act(linear, inputs[0])  # nothing is returned: a hook's result would replace the input

    with forward_hooks(linears, act_on_input, pre=True):
        yield


@contextmanager
def _record_outputs(linears: Iterable[Linear]) -> Iterator[dict[Linear, Tensor]]:
    """Record the first output of each linear, without its bias, inside the `with` block."""
    outputs: dict[Linear, Tensor] = {}

    def record(linear: Linear, _inputs: object, output: Tensor) -> None:
        if linear not in outputs:
            outputs[linear] = output if linear.bias is None else output - linear.bias

    with forward_hooks(linears, record):
        yield outputs


def _has_fewer_outputs(group: Sequence[Linear]) -> bool:
    """Return True when outputs take fewer multiplications and less memory than inputs, at no loss of precision.

    In half precision, rounding of the outputs would hide small shifts.
    """
    weights = [weight_of(linear) for linear in group]
    return sum(map(len, weights)) < weights[0].shape[1] and weights[0].dtype.itemsize >= 4
