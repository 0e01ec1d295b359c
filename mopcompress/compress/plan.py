"""What is to be done to which linears, and doing it to linears that share their inputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.algorithms import METHODS, Method, Solution
from mopcompress.algorithms.dense_targets import DenseActivations, dense_target
from mopcompress.algorithms.eora import eora
from mopcompress.algorithms.input_statistics import Statistic, with_ridge
from mopcompress.algorithms.refit import refit
from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError
from mopcompress.models.targets import select_targets

DAMPING = 0.01  # of the refit, for methods that have none
REPAIR = "eora"  # the method that changes no weight: it makes what is computed beside those that others compressed


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method with its settings, and the linears that it goes to (SparseML's `targets` and `ignore`)."""

    method: str
    options: Mapping[str, object]  # the keyword arguments of the method's function; see `Step.options_for`
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ()
    match_dense: float = 0.0  # share of the way from the linear's own outputs (0) to the dense model's (1)
    match_samples: float = 1.0  # share of the calibration samples that the dense model sees for it
    allocation: str = "uniform"  # where the shares in `sparsity` come from, for the record
    refit_steps: int = 0  # of conjugate gradients on the mask that the method found, for methods that prune

    def dense_samples(self, samples: int) -> int:
        """How many of the calibration samples the dense model must see."""
        return math.ceil(self.match_samples * samples) if self.match_dense else 0


@dataclass(frozen=True)
class PlannedMethod:
    """A compression, and the linears of this model that it goes to, each with the place of the target that means it."""

    compression: MethodConfig
    target_index: Mapping[str, int]

    def options_for(self, names: Sequence[str]) -> dict[str, object]:
        """The settings for linears that are solved together; `sparsity` may be one share a linear or one a target.

        Raises `DataError` for a linear that has none.
        """
        options = dict(self.compression.options)
        shares = options.get("sparsity")
        if isinstance(shares, Mapping):
            missing = [name for name in names if name not in shares]
            if missing:
                raise DataError(f"no sparsity is given for {missing[0]}; name every linear that is compressed")
            return options | {"sparsity": [shares[name] for name in names]}
        if isinstance(shares, Sequence):
            return options | {"sparsity": [shares[self.target_index[name]] for name in names]}
        return options


def assign_targets(compressions: Sequence[MethodConfig], names: Sequence[str]) -> list[PlannedMethod]:
    """Which of a model's linears each compression goes to. Raises `DataError` when a target means none of them.

    A repair goes to linears that were compressed before, and is the last step: another would take no notice of it.
    """
    if REPAIR in [one.method for one in compressions[:-1]]:
        raise DataError("a repair is of all that was lost; put it after all that compresses")
    steps: list[PlannedMethod] = []
    for one in compressions:
        place = select_targets(names, one.targets, one.ignore)
        if one.method == REPAIR:
            place = {
                name: index for name, index in place.items() if any(name in before.target_index for before in steps)
            }
            if not place:
                raise DataError(f"nothing to repair: no linear of {list(one.targets)} is compressed; name others")
        steps.append(PlannedMethod(one, place))
    return steps


def apply_methods(
    linears: Mapping[str, Float[Tensor, "_ in"]],
    inputs: Float[Tensor, "tokens in"],
    dense: DenseActivations | None,
    steps: Sequence[PlannedMethod],
) -> dict[str, Solution]:
    """Compress linears that share `inputs`, each by those steps that go to it, one after the other.

    The inputs are looked at once, whatever the number of linears and steps. Before its first step a
    linear is moved towards the dense model, as far as any of them asks: later ones then keep to what became of that.
    A repair is towards what the first step was given, since that has the outputs that are wanted on these inputs:
    towards the dense weight, it would undo what the linear was moved for.
    """
    statistics = _Statistics(inputs)
    solved = {name: Solution(weight) for name, weight in linears.items()}
    if dense is not None:
        pull = dense.target_shift(torch.cat(list(linears.values())), inputs)
        solved |= _match_dense(linears, statistics.gram(), pull, steps)
    wanted = {name: one.weight for name, one in solved.items()}
    for step in steps:
        names = [name for name in linears if name in step.target_index]
        if not names:
            continue
        if step.compression.method == REPAIR:
            rank: Any = step.compression.options["rank"]
            for name in names:
                repair = eora(wanted[name], solved[name].weight, statistics.gram(), rank=rank)
                solved[name] = replace(solved[name], repair=LowRankFactors(*repair))
            continue
        method = METHODS[step.compression.method]
        weights = [solved[name].weight for name in names]
        together = method.solve_together(weights, statistics.of(method), **step.options_for(names))
        if step.compression.refit_steps:
            together = _refit(weights, statistics.gram(), together, step.compression)
        for name, one in zip(names, together, strict=True):
            solved[name] = replace(one, escalations=solved[name].escalations + one.escalations)
    return solved


def _match_dense(
    weights: Mapping[str, Tensor], gram: Tensor, pull: Float[Tensor, "rows in"], steps: Sequence[PlannedMethod]
) -> dict[str, Solution]:
    """Those linears of which a step asks it; equal wishes are granted together. `pull` has the rows of all of them."""
    pulls = dict(zip(weights, torch.split(pull, [len(weight) for weight in weights.values()]), strict=True))
    wishes: dict[tuple[float, bool], list[str]] = {}
    for name in weights:
        going = [step.compression for step in steps if name in step.target_index]
        share = max(one.match_dense for one in going)
        if share:
            keep_zeros = any(one.options.get("keep_zeros") is True for one in going)
            wishes.setdefault((share, keep_zeros), []).append(name)
    moved: dict[str, Solution] = {}
    for (share, keep_zeros), names in wishes.items():
        stack = torch.cat([weights[name] for name in names])
        pulled = torch.cat([pulls[name] for name in names])
        target = dense_target(stack, gram, pulled, share=share, keep_zeros=keep_zeros)
        parts = torch.split(target.weight, [len(weights[name]) for name in names])
        moved |= {name: Solution(part, target.escalations) for name, part in zip(names, parts, strict=True)}
    return moved


def _refit(
    weights: Sequence[Tensor], gram: Float[Tensor, "in in"], pruned: Sequence[Solution], compression: MethodConfig
) -> list[Solution]:
    """The least-squares values for the weights that pruning kept, with the method's own damping if it has one."""
    damping: Any = compression.options.get("damping", DAMPING)
    stack, found = torch.cat(list(weights)), torch.cat([one.weight for one in pruned])
    best = refit(stack, with_ridge(gram.to(stack), damping), found == 0, found, steps=compression.refit_steps)
    parts = torch.split(best, [len(weight) for weight in weights])
    return [replace(one, weight=part) for one, part in zip(pruned, parts, strict=True)]


class _Statistics:
    """Each statistic of the inputs, computed when it is first asked for: methods share it when they can."""

    def __init__(self, inputs: Float[Tensor, "tokens in"]) -> None:
        self._inputs = inputs
        self._known: dict[Callable[[], Statistic], Tensor | None] = {}

    def of(self, method: Method) -> Tensor | None:
        if method.accumulator not in self._known:
            self._known[method.accumulator] = method.statistic(self._inputs)
        return self._known[method.accumulator]

    def gram(self) -> Float[Tensor, "in in"]:
        """The Gram matrix, whether or not the methods ask for it."""
        gram = self.of(METHODS["sparsegpt"])
        assert gram is not None  # for mypy: other methods need no statistic
        return gram
