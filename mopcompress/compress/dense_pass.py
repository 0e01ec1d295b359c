"""The dense model's pass through a block, where what its linears had is noted for those that are to match it.

Nothing is compressed here, so a few samples go through at a time: what is made on the way, such as the inner states of
the MLP, is never there for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.dense_targets import DenseActivations
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, forward_hooks, weight_of

_TOKENS = 2048  # that go through a block at a time, about


def dense_activations(
    model: LanguageModel,
    tokens: Int[Tensor, "samples time"],
    hidden: Float[Tensor, "samples time hidden"] | None,
    index: int,
    groups: Sequence[Sequence[Linear]],
) -> tuple[Float[Tensor, "samples time hidden"], dict[Linear, DenseActivations]]:
    """What leaves block `index`, and what each group of linears that share their input had, under its first linear.

    Tokens are paired by position: a group that only some of them reach, such as an expert's, is left out.
    """
    outputs_of = [group for group in groups if _has_fewer_outputs(group)]
    inputs_of = [group for group in groups if not _has_fewer_outputs(group)]
    noted: dict[Linear, Tensor] = {}
    left = tokens.new_empty(0)
    samples = max(1, _TOKENS // tokens.shape[1])
    for first in range(0, len(tokens), samples):
        here = slice(first, first + samples)
        firsts, every = [group[0] for group in inputs_of], [one for group in outputs_of for one in group]
        with record_inputs(firsts) as inputs, _record_outputs(every) as outputs:
            leaving = model.run_block(tokens[here], None if hidden is None else hidden[here], index)
        if first == 0:
            left = leaving.new_empty(len(tokens), *leaving.shape[1:])
        left[here] = leaving
        seen = inputs | {
            group[0]: torch.cat([outputs[one] for one in group], -1)
            for group in outputs_of
            if all(one in outputs for one in group)
        }
        if first == 0:
            noted = {one: value.new_empty(tokens.numel(), value.shape[-1]) for one, value in seen.items()}
        positions = slice(first * tokens.shape[1], (first + samples) * tokens.shape[1])
        noted = {
            one: rows
            for one, rows in noted.items()
            if one in seen and seen[one][..., 0].numel() == len(rows[positions])
        }
        for one, rows in noted.items():
            rows[positions] = seen[one].flatten(0, -2)
    from_outputs = {group[0] for group in outputs_of}
    return left, {one: DenseActivations(rows, one in from_outputs) for one, rows in noted.items()}


@contextmanager
def record_inputs(linears: Iterable[Linear]) -> Iterator[dict[Linear, Tensor]]:
    """Inside the block, note the first input of each linear."""
    seen: dict[Linear, Tensor] = {}
    with on_input(linears, lambda linear, value: seen.setdefault(linear, value)):
        yield seen


@contextmanager
def on_input(linears: Iterable[Linear], act: Callable[[Linear, Tensor], object]) -> Iterator[None]:
    """Inside the block, `act(linear, input)` runs before each linear. Narrowing has hooks of its own: they replace."""

    def act_on_input(linear: Linear, inputs: tuple[Tensor, ...]) -> None:
        act(linear, inputs[0])  # its result would replace the input

    with forward_hooks(linears, act_on_input, pre=True):
        yield


@contextmanager
def _record_outputs(linears: Iterable[Linear]) -> Iterator[dict[Linear, Tensor]]:
    """Inside the block, note the first output of each linear, without its bias."""
    seen: dict[Linear, Tensor] = {}

    def note(linear: Linear, _inputs: object, output: Tensor) -> None:
        if linear not in seen:
            seen[linear] = output if linear.bias is None else output - linear.bias

    with forward_hooks(linears, note):
        yield seen


def _has_fewer_outputs(group: Sequence[Linear]) -> bool:
    """Then they are cheaper to multiply and to keep. Rounded to half precision they would hide how little moved."""
    weights = [weight_of(one) for one in group]
    return sum(map(len, weights)) < weights[0].shape[1] and weights[0].dtype.itemsize >= 4
