"""Structured pruning: remove whole groups of a matrix's inputs and refit the remaining columns.

The inputs of an MLP's last matrix are its channels, those of attention's last matrix are its heads. Removing the
columns C of W costs tr(W_C (H⁻¹_CC)⁻¹ W_Cᵀ) of squared output error once the other columns K are refitted, and the
refit is W_K - W_C (H⁻¹_CC)⁻¹ H⁻¹_CK: Optimal Brain Surgeon (Hassibi & Stork 1993) for several weights at once, as in
SlimGPT (Ling et al., https://arxiv.org/abs/2412.18110). H is the Gram matrix of the inputs plus a ridge. Groups are
removed one by one, always the cheapest given the removed ones: of two equal channels, only the first costs nothing.

Differences from SlimGPT: channels are removed one by one, not in batches. Their count is the same in every block,
because the configuration of a stock model has one number for all blocks. FLAP (An et al.,
https://arxiv.org/abs/2312.11983) compensates the mean of the removed inputs by a bias alone; here the bias of a matrix
is part of the least squares.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.obs import inverse_factor
from mopcompress.errors import DataError, NumericalError


@dataclass(frozen=True)
class ReducedWeight:
    """A smaller matrix, and the columns of the given one that it still has, in ascending order."""

    weight: Float[Tensor, "out remaining"]
    columns: Int[Tensor, " remaining"]
    escalations: int = 0  # how often damping increased before the Gram matrix had a factor


def prune_input_groups(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    groups: int,
    remove: int,
    score: str = "error",
    damping: float = 0.01,
) -> ReducedWeight:
    """Remove exactly `remove` of the `groups` equal groups of consecutive inputs, and refit the remaining columns.

    `score` selects them: `error` removes those that cost least after the refit, `norm` those with the smallest sum of
    squared weight times mean squared input. For a matrix with a bias, pass the Gram matrix of the *centred* inputs, and
    add the lost output for the mean input to the bias afterwards. `remove` 0 returns the weight itself. Raises
    `DataError` for counts that do not fit, `NumericalError` when the Gram matrix cannot be factorised.
    """
    _check(weight, groups, remove)
    if remove == 0:
        return ReducedWeight(weight, torch.arange(weight.shape[1], device=weight.device))
    factor = inverse_factor(gram.to(weight), damping=damping)
    inverse = factor.upper.T @ factor.upper
    active = weight * (gram.diagonal() > 0)  # an input that never fires costs nothing, whatever its weight
    removed = (
        lowest_error_groups(active, inverse, groups, remove)
        if score == "error"
        else lowest_norm_groups(active, gram, groups, remove)
    )
    columns = _group_columns(sorted(set(range(groups)) - set(removed)), weight, groups)
    return ReducedWeight(refit_columns(active, inverse, columns), columns, factor.escalations)


def lowest_error_groups(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], groups: int, remove: int
) -> list[int]:
    """Return the groups that cost least, each given those before it, in the order of their removal.

    One pivoted Cholesky of `inverse` = H⁻¹: after the removal of the columns C, D = H⁻¹ - H⁻¹_:C (H⁻¹_CC)⁻¹ H⁻¹_C:
    remains, and the next group g costs tr(D_gg⁻¹ W_gᵀ W_g) with the W that is refitted by then. Only those diagonal
    blocks and the columns of removed groups are formed: in * (out + 2 * removed columns) multiply-adds per column.
    """
    out, size = weight.shape
    width = size // groups
    blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    rows = weight.T.contiguous()
    energy = torch.bmm(rows.view(groups, width, out), rows.view(groups, width, out).mT)
    factor = weight.new_zeros(size, remove * width)  # of the pivoted Cholesky, filled group by group
    losses = weight.new_zeros(out, remove * width)  # the weights of the removed columns over their pivots
    removed: list[int] = []
    penalty = weight.new_zeros(groups)  # infinite for removed groups
    for step in range(remove):
        group = int((_traces(blocks, energy) + penalty).argmin())
        columns, done = slice(group * width, (group + 1) * width), slice(0, step * width)
        pivot, failed = torch.linalg.cholesky_ex(blocks[group])
        if failed or not bool(pivot.isfinite().all()):
            raise NumericalError("the inverse Gram matrix lost its positive definiteness; raise damping")
        update = _divide(torch.addmm(inverse[:, columns], factor[:, done], factor[columns, done].T, alpha=-1), pivot)
        loss = _divide(torch.addmm(weight[:, columns], losses[:, done], factor[columns, done].T, alpha=-1), pivot)
        overlap = torch.addmm(rows @ loss, factor[:, done], losses[:, done].T @ loss, alpha=-1)
        update, overlap = update.view(groups, width, width), overlap.view(groups, width, width)
        blocks -= update @ update.mT
        cross = update @ overlap.mT
        energy += update @ (loss.T @ loss) @ update.mT - cross - cross.mT
        removed.append(group)
        penalty[group], blocks[group], energy[group] = torch.inf, torch.eye(width).to(blocks), 0.0
        span = slice(step * width, (step + 1) * width)
        factor[:, span], losses[:, span] = update.view(size, width), loss
    return removed


def lowest_norm_groups(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], groups: int, remove: int
) -> list[int]:
    """Return the groups with the smallest sum of squared weight times mean squared input; ignores the refit."""
    norms = (weight.square().sum(0) * gram.diagonal()).view(groups, -1).sum(1)
    return norms.argsort(stable=True)[:remove].tolist()


def refit_columns(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], columns: Int[Tensor, " remaining"]
) -> Float[Tensor, "out remaining"]:
    """Return these columns with the values of least squared output error when all other columns are zero.

    `inverse` is the inverse of the damped Gram matrix. Raises `NumericalError` when it is not positive definite.
    """
    removed = torch.ones(len(inverse), dtype=torch.bool, device=columns.device)
    removed[columns] = False
    pivot, failed = torch.linalg.cholesky_ex(inverse[removed][:, removed])
    if failed:
        raise NumericalError("the inverse Gram matrix lost its positive definiteness; raise damping")
    return weight[:, columns] - weight[:, removed] @ torch.cholesky_solve(inverse[removed][:, columns], pivot)


def _traces(blocks: Float[Tensor, "groups n n"], energy: Float[Tensor, "groups n n"]) -> Float[Tensor, " groups"]:
    """Return tr(blocks⁻¹ energy) of every group."""
    if blocks.shape[1] == 1:
        return (energy / blocks).flatten()
    return torch.linalg.solve(blocks, energy).diagonal(dim1=1, dim2=2).sum(1)


def _divide(matrix: Float[Tensor, "rows n"], pivot: Float[Tensor, "n n"]) -> Float[Tensor, "rows n"]:
    """Return matrix pivot⁻ᵀ for a lower triangular pivot."""
    return torch.linalg.solve_triangular(pivot.T, matrix, upper=True, left=False)


def _group_columns(remaining: list[int], weight: Tensor, groups: int) -> Int[Tensor, " remaining"]:
    columns = torch.arange(weight.shape[1], device=weight.device)
    return columns.view(groups, -1)[remaining].flatten()


def _check(weight: Float[Tensor, "out in"], groups: int, remove: int) -> None:
    size = weight.shape[1]
    if size % groups:
        raise DataError(f"{size} inputs cannot be cut into {groups} equal groups")
    if not 0 <= remove < groups:
        raise DataError(f"cannot remove {remove} of {groups} groups of inputs: at least one stays")
