"""Slow definitions, written straight from the equations. They share no trick with the package."""

from collections.abc import Callable

import torch
from torch import Tensor


def lowest_by_sorting(scores: list[float], count: int) -> list[bool]:
    """True for the `count` lowest; Python's sort is stable, so of equal ones the first."""
    chosen = set(sorted(range(len(scores)), key=lambda index: scores[index])[:count])
    return [index in chosen for index in range(len(scores))]


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def layer_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Mean over tokens of |(weight - other) x|², summed over outputs."""
    return float(((weight - other) @ gram @ (weight - other).T).trace())


def settle_by_least_squares(
    weight: Tensor, gram: Tensor, panel: int, begin: Callable[[int, Tensor], Callable[[int, Tensor], Tensor]]
) -> Tensor:
    """After settling column j, solve for all later columns anew, so that the layer error is least.

    `begin(first, columns)` is told the present weights of every `panel` columns and returns how to settle each.
    """
    start, weight = weight.clone(), weight.clone()
    size = weight.shape[1]
    for j in range(size):
        if j % panel == 0:
            project = begin(j, weight[:, j : j + panel].clone())
        weight[:, j] = project(j, weight[:, j].clone())
        if j + 1 < size:
            loss = weight[:, : j + 1] - start[:, : j + 1]
            shift = torch.linalg.solve(gram[j + 1 :, j + 1 :], gram[j + 1 :, : j + 1] @ loss.T).T
            weight[:, j + 1 :] = start[:, j + 1 :] - shift
    return weight


def cost_of_zero(gram: Tensor, j: int, column: Tensor) -> Tensor:
    """OBS: what zeroing each weight of column j costs when columns j, j+1, ... are still free: w² / [H⁻¹]jj."""
    return column**2 / torch.linalg.inv(gram[j:, j:])[0, 0]


def sparsegpt_slowly(
    weight: Tensor, gram: Tensor, *, sparsity: float, block: int, pattern: tuple[int, int] | None = None
) -> Tensor:
    """SparseGPT on an already damped Gram matrix."""
    rows = len(weight)

    def begin(first: int, columns: Tensor) -> Callable[[int, Tensor], Tensor]:
        width = columns.shape[1]
        costs = torch.stack([cost_of_zero(gram, first + k, columns[:, k]) for k in range(width)], 1)
        if pattern:
            mask = torch.tensor([lowest_by_sorting(row, pattern[0]) for row in costs.tolist()])
        else:
            wanted = [round(sparsity * rows * end) for end in (first, first + width)]
            chosen = lowest_by_sorting(costs.flatten().tolist(), wanted[1] - wanted[0])
            mask = torch.tensor(chosen).reshape(rows, width)
        return lambda j, column: torch.where(mask[:, j - first], 0.0, column)

    return settle_by_least_squares(weight, gram, pattern[1] if pattern else block, begin)


def scale_slowly(values: list[float], importance: list[float], bits: int) -> float:
    """The best of 15 scales for one group of one row, by weighted squared error."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = max(abs(value) for value in values) / (highest + 0.5)
    best = (float("inf"), 0.0)
    for step in range(15):
        scale = float(torch.tensor(widest * (1 - 0.05 * step)).half())
        error = 0.0
        for value, share in zip(values, importance, strict=True):
            code = min(max(round(value / scale), lowest), highest)
            error += share * (value - code * scale) ** 2
        best = min(best, (error, scale), key=lambda pair: pair[0])
    return best[1]


def gptq_slowly(
    weight: Tensor,
    gram: Tensor,
    importance: Tensor,
    *,
    bits: int,
    group: int,
    act_order: bool,
    keep_zeros: bool = False,
) -> Tensor:
    """GPTQ on an already damped Gram matrix; `importance` is the mean square of each input before damping."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    size = weight.shape[1]
    order = sorted(range(size), key=lambda j: -float(importance[j])) if act_order else list(range(size))

    def scales_of(first: int, columns: Tensor) -> Tensor:
        share = importance[first : first + group].tolist()
        return torch.tensor([scale_slowly(row, share, bits) for row in columns.tolist()], dtype=weight.dtype)

    static = {g: scales_of(g * group, weight[:, g * group : (g + 1) * group]) for g in range(size // group)}

    def begin(first: int, columns: Tensor) -> Callable[[int, Tensor], Tensor]:
        survivors = columns.masked_fill(weight[:, first : first + group] == 0, 0.0) if keep_zeros else columns
        reached = None if act_order else scales_of(first, survivors)

        def project(j: int, column: Tensor) -> Tensor:
            scale = static[order[j] // group] if reached is None else reached
            rounded = torch.clamp(torch.round(column / scale), lowest, highest) * scale
            return torch.where(weight[:, order[j]] == 0, 0.0, rounded) if keep_zeros else rounded

        return project

    permuted = settle_by_least_squares(weight[:, order], gram[order][:, order], group, begin)
    result = torch.empty_like(weight)
    result[:, order] = permuted
    return result


def masked_least_squares(weight: Tensor, gram: Tensor, removed: Tensor) -> Tensor:
    """Row by row: the values in the places that are kept with the least layer error."""
    solved = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = ~removed[row]
        if kept.any():
            wanted = gram[kept] @ weight[row]
            solved[row, kept] = torch.linalg.solve(gram[kept][:, kept], wanted)
    return solved


def alps_slowly(
    weight: Tensor, gram: Tensor, count: int, *, steps: int, first: float, every: int, growth: float, relaxation: float
) -> Tensor:
    """ADMM with the multiplier written out, on an already damped Gram matrix, then exact masked least squares.

    Over-relaxed as in Boyd et al., Distributed Optimization and Statistical Learning via ADMM, sec. 3.4.3.
    """
    scale = gram.diagonal().sqrt()
    hessian, target = gram / torch.outer(scale, scale), weight * scale

    def keep_largest(matrix: Tensor) -> Tensor:
        chosen = lowest_by_sorting(matrix.abs().flatten().tolist(), count)
        return matrix.masked_fill(torch.tensor(chosen).reshape(matrix.shape), 0.0)

    penalty, sparse, multiplier = first, keep_largest(target), torch.zeros_like(target)
    for step in range(steps):
        if step and step % every == 0:
            penalty *= growth
        system = hessian + penalty * torch.eye(len(gram), dtype=gram.dtype)
        free = torch.linalg.solve(system, (target @ hessian - multiplier + penalty * sparse).T).T
        free = relaxation * free + (1 - relaxation) * sparse
        sparse = keep_largest(free + multiplier / penalty)
        multiplier = multiplier + penalty * (free - sparse)
    return masked_least_squares(weight, gram, sparse == 0)
