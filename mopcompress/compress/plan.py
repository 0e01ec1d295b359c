"""Compression methods assigned to the linears of a model, and their application to linears that share inputs."""

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

DAMPING = 0.01  # of the refit, for methods without a damping of their own
REPAIR = "eora"  # the method that changes no weight: it adds a low-rank repair to those that others compressed


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method with its options, and the linears that it goes to (SparseML's `targets` and `ignore`).

    `options` are the keyword arguments of the method's function in `METHODS`. They are not checked here: the recipe
    checks them, and tests of the recipe run every method with the options that it makes.
    """

    method: str
    options: Mapping[str, object]
    targets: Sequence[str] = ("Linear",)
    ignore: Sequence[str] = ()
    match_dense: float = 0.0  # fraction of the way from the linear's own outputs (0) to the dense model's (1)
    match_samples: float = 1.0  # fraction of the calibration samples that the dense model processes for it
    allocation: str = "uniform"  # the origin of the numbers in `sparsity`, for the record
    refit_steps: int = 0  # of conjugate gradients on the mask that the method found, for methods that prune

    def dense_samples(self, samples: int) -> int:
        """Return the number of calibration samples, of `samples`, that the dense model must process."""
        return math.ceil(self.match_samples * samples) if self.match_dense else 0


@dataclass(frozen=True)
class PlannedMethod:
    """A method and the linears assigned to it, each with the index of the matching entry of `targets`."""

    config: MethodConfig
    target_index: Mapping[str, int]

    def options_for(self, names: Sequence[str]) -> dict[str, object]:
        """Return the options for linears that are solved together, with one `sparsity` per linear if they differ.

        The config's `sparsity` may be one number, one per linear by name, or one per target. Raises `DataError` for a
        linear without any.
        """
        options = dict(self.config.options)
        sparsity = options.get("sparsity")
        if isinstance(sparsity, Mapping):
            missing = [name for name in names if name not in sparsity]
            if missing:
                raise DataError(f"no sparsity is given for {missing[0]}; name every linear that is compressed")
            return options | {"sparsity": [sparsity[name] for name in names]}
        if isinstance(sparsity, Sequence):
            return options | {"sparsity": [sparsity[self.target_index[name]] for name in names]}
        return options


def assign_targets(configs: Sequence[MethodConfig], names: Sequence[str]) -> list[PlannedMethod]:
    """Assign each method to the linears, of `names`, that it goes to.

    A repair goes to linears that an earlier method compresses, and must be last, because no later method would see it.
    Raises `DataError` when a target matches no linear, and when a repair is not last or has nothing to repair.
    """
    if REPAIR in [config.method for config in configs[:-1]]:
        raise DataError("a repair is of all that was lost; put it after all that compresses")
    methods: list[PlannedMethod] = []
    for config in configs:
        target_index = select_targets(names, config.targets, config.ignore)
        if config.method == REPAIR:
            target_index = {
                name: index
                for name, index in target_index.items()
                if any(name in earlier.target_index for earlier in methods)
            }
            if not target_index:
                raise DataError(f"nothing to repair: no linear of {list(config.targets)} is compressed; name others")
        methods.append(PlannedMethod(config, target_index))
    return methods


def apply_methods(
    linears: Mapping[str, Float[Tensor, "_ in"]],
    inputs: Float[Tensor, "tokens in"],
    dense: DenseActivations | None,
    methods: Sequence[PlannedMethod],
) -> dict[str, Solution]:
    """Compress linears that share `inputs`; apply a linear's methods in order. Returns a solution per name.

    Each statistic of the inputs is computed once for all linears and methods. If any method asks to match the dense
    model, the weight is first replaced by its dense target (the largest `match_dense` wins), and later methods
    compress the target. A low-rank repair is fitted to the same target: fitted to the original weight, it would undo
    the matching.
    """
    statistics = _Statistics(inputs)
    solutions = {name: Solution(weight) for name, weight in linears.items()}
    if dense is not None:
        shift = dense.target_shift(torch.cat(list(linears.values())), inputs)
        solutions |= _match_dense(linears, statistics.gram(), shift, methods)
    targets = {name: solution.weight for name, solution in solutions.items()}
    for method in methods:
        names = [name for name in linears if name in method.target_index]
        if not names:
            continue
        if method.config.method == REPAIR:
            rank: Any = method.config.options["rank"]
            for name in names:
                repair = eora(targets[name], solutions[name].weight, statistics.gram(), rank=rank)
                solutions[name] = replace(solutions[name], repair=LowRankFactors(*repair))
            continue
        algorithm = METHODS[method.config.method]
        weights = [solutions[name].weight for name in names]
        solved = algorithm.solve_together(weights, statistics.of(algorithm), **method.options_for(names))
        if method.config.refit_steps:
            solved = _refit(weights, statistics.gram(), solved, method.config)
        for name, solution in zip(names, solved, strict=True):
            escalations = solutions[name].escalations + solution.escalations
            solutions[name] = replace(solution, escalations=escalations)
    return solutions


def _match_dense(
    weights: Mapping[str, Tensor], gram: Tensor, shift: Float[Tensor, "rows in"], methods: Sequence[PlannedMethod]
) -> dict[str, Solution]:
    """Replace the weights that a method asks to match by their dense targets, together where the settings agree.

    `shift` has the rows of all weights, one after the other.
    """
    shifts = dict(zip(weights, torch.split(shift, [len(weight) for weight in weights.values()]), strict=True))
    names_by_setting: dict[tuple[float, bool], list[str]] = {}
    for name in weights:
        configs = [method.config for method in methods if name in method.target_index]
        fraction = max(config.match_dense for config in configs)
        if fraction:
            keep_zeros = any(config.options.get("keep_zeros") is True for config in configs)
            names_by_setting.setdefault((fraction, keep_zeros), []).append(name)
    matched: dict[str, Solution] = {}
    for (fraction, keep_zeros), names in names_by_setting.items():
        stack = torch.cat([weights[name] for name in names])
        stacked_shift = torch.cat([shifts[name] for name in names])
        target = dense_target(stack, gram, stacked_shift, fraction=fraction, keep_zeros=keep_zeros)
        parts = torch.split(target.weight, [len(weights[name]) for name in names])
        matched |= {name: Solution(part, target.escalations) for name, part in zip(names, parts, strict=True)}
    return matched


def _refit(
    weights: Sequence[Tensor], gram: Float[Tensor, "in in"], pruned: Sequence[Solution], config: MethodConfig
) -> list[Solution]:
    """Return the least-squares values on the masks of `pruned`, with the method's own damping if it has one."""
    damping: Any = config.options.get("damping", DAMPING)
    stack, pruned_stack = torch.cat(list(weights)), torch.cat([solution.weight for solution in pruned])
    best = refit(stack, with_ridge(gram.to(stack), damping), pruned_stack == 0, pruned_stack, steps=config.refit_steps)
    parts = torch.split(best, [len(weight) for weight in weights])
    return [replace(solution, weight=part) for solution, part in zip(pruned, parts, strict=True)]


class _Statistics:
    """The statistics of the inputs, each computed on first use and then shared by all methods."""

    def __init__(self, inputs: Float[Tensor, "tokens in"]) -> None:
        self._inputs = inputs
        self._cache: dict[Callable[[], Statistic], Tensor | None] = {}

    def of(self, method: Method) -> Tensor | None:
        if method.accumulator not in self._cache:
            self._cache[method.accumulator] = method.statistic(self._inputs)
        return self._cache[method.accumulator]

    def gram(self) -> Float[Tensor, "in in"]:
        """Return the Gram matrix, which dense targets, refits and repairs need whatever the methods."""
        gram = self.of(METHODS["sparsegpt"])
        assert gram is not None  # for mypy: other methods need no statistic
        return gram
