"""Slow definitions, written straight from the equations. They share no trick with the package."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def lowest_by_sorting(scores: list[float], count: int) -> list[bool]:
    """True for the `count` lowest; Python's sort is stable, so of equal ones the first."""
    lowest = set(sorted(range(len(scores)), key=lambda index: scores[index])[:count])
    return [index in lowest for index in range(len(scores))]


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def layer_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Mean over tokens of |(weight - other) x|², summed over outputs."""
    return float(((weight - other) @ gram @ (weight - other).T).trace())


def fix_by_least_squares(
    weight: Tensor, gram: Tensor, panel: int, solve_panel: Callable[[int, Tensor], Callable[[int, Tensor], Tensor]]
) -> Tensor:
    """Fix column after column; after each, solve for all later columns anew, so that the layer error is least.

    `solve_panel(first, columns)` receives the updated weights of `panel` columns, and returns the function that fixes
    each of them.
    """
    start, weight = weight.clone(), weight.clone()
    size = weight.shape[1]
    for j in range(size):
        if j % panel == 0:
            solve_column = solve_panel(j, weight[:, j : j + panel].clone())
        weight[:, j] = solve_column(j, weight[:, j].clone())
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

    def solve_panel(first: int, columns: Tensor) -> Callable[[int, Tensor], Tensor]:
        width = columns.shape[1]
        costs = torch.stack([cost_of_zero(gram, first + k, columns[:, k]) for k in range(width)], 1)
        if pattern:
            mask = torch.tensor([lowest_by_sorting(row, pattern[0]) for row in costs.tolist()])
        else:
            ends = [round(sparsity * rows * end) for end in (first, first + width)]
            lowest = lowest_by_sorting(costs.flatten().tolist(), ends[1] - ends[0])
            mask = torch.tensor(lowest).reshape(rows, width)
        return lambda j, column: torch.where(mask[:, j - first], 0.0, column)

    return fix_by_least_squares(weight, gram, pattern[1] if pattern else block, solve_panel)


def scale_slowly(values: list[float], importance: list[float], bits: int) -> float:
    """The best of 15 scales for one group of one row, by weighted squared error."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = max(abs(value) for value in values) / (highest + 0.5)
    best = (float("inf"), 0.0)
    for step in range(15):
        scale = float(torch.tensor(widest * (1 - 0.05 * step)).half())
        error = 0.0
        for value, weight in zip(values, importance, strict=True):
            code = min(max(round(value / scale), lowest), highest)
            error += weight * (value - code * scale) ** 2
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
        group_importance = importance[first : first + group].tolist()
        return torch.tensor([scale_slowly(row, group_importance, bits) for row in columns.tolist()], dtype=weight.dtype)

    static = {g: scales_of(g * group, weight[:, g * group : (g + 1) * group]) for g in range(size // group)}

    def solve_panel(first: int, columns: Tensor) -> Callable[[int, Tensor], Tensor]:
        survivors = columns.masked_fill(weight[:, first : first + group] == 0, 0.0) if keep_zeros else columns
        reached = None if act_order else scales_of(first, survivors)

        def solve_column(j: int, column: Tensor) -> Tensor:
            scale = static[order[j] // group] if reached is None else reached
            rounded = torch.clamp(torch.round(column / scale), lowest, highest) * scale
            return torch.where(weight[:, order[j]] == 0, 0.0, rounded) if keep_zeros else rounded

        return solve_column

    permuted = fix_by_least_squares(weight[:, order], gram[order][:, order], group, solve_panel)
    result = torch.empty_like(weight)
    result[:, order] = permuted
    return result


def masked_least_squares(weight: Tensor, gram: Tensor, removed: Tensor) -> Tensor:
    """Return the values with the least layer error, row by row, where `removed` is False; the others are zero."""
    solved = torch.zeros_like(weight)
    for row in range(len(weight)):
        free = ~removed[row]
        if free.any():
            target = gram[free] @ weight[row]
            solved[row, free] = torch.linalg.solve(gram[free][:, free], target)
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
        lowest = lowest_by_sorting(matrix.abs().flatten().tolist(), count)
        return matrix.masked_fill(torch.tensor(lowest).reshape(matrix.shape), 0.0)

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


def inputs_with_ridge(inputs: Tensor, damping: float) -> Tensor:
    """Return inputs whose plain Gram matrix is the damped one: the ridge as further observations."""
    ridge = damping * (inputs.T @ inputs / len(inputs)).diagonal().mean()
    return torch.cat([inputs / len(inputs) ** 0.5, ridge.sqrt() * torch.eye(inputs.shape[1], dtype=inputs.dtype)])


def fit_columns(weight: Tensor, inputs: Tensor, columns: list[int], *, damping: float = 0.01) -> tuple[Tensor, float]:
    """Return the values of these columns and their squared error, by numpy's lstsq on the inputs themselves."""
    rows = inputs_with_ridge(inputs, damping).numpy()
    outputs = rows @ weight.numpy().T
    solution = np.linalg.lstsq(rows[:, columns], outputs, rcond=None)[0]
    return torch.from_numpy(solution.T), float(((outputs - rows[:, columns] @ solution) ** 2).sum())


def eora_slowly(weight: Tensor, compressed: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return B A by the paper's equation, with the symmetric root of the Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-12 * values.max())  # where it is singular, the paper divides by zero
    root = vectors @ values.sqrt().diag() @ vectors.T
    inverse = vectors @ values.rsqrt().diag() @ vectors.T
    left, sizes, right = torch.linalg.svd((weight - compressed) @ root, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank] @ inverse
