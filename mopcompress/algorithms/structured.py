"""Structured pruning: whole groups of a matrix's inputs go, and the others take over what they did.

The inputs of an MLP's last matrix are its channels, those of attention's last matrix are its heads. Removing the
columns C of W costs tr(W_C (H⁻¹_CC)⁻¹ W_Cᵀ) of squared output error once the kept columns K are refitted, and the refit
is W_K - W_C (H⁻¹_CC)⁻¹ H⁻¹_CK: Optimal Brain Surgeon (Hassibi & Stork 1993) for several weights at once, as in SlimGPT
(Ling et al., https://arxiv.org/abs/2412.18110). H is the Gram matrix of the inputs plus a ridge. Groups go one by one,
the cheapest first, given those that went before: of two channels that do the same, only one is worth nothing.

Differences from SlimGPT: channels go one by one, not in batches, and their count is the same in every block, because
the configuration of a stock model has one number for all. FLAP (An et al., https://arxiv.org/abs/2312.11983) makes up
for the mean of what goes by a bias alone; here a bias, where a matrix has one, is part of the least squares.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.algorithms.obs import inverse_factor
from mopcompress.errors import DataError, NumericalError


@dataclass(frozen=True)
class ReducedWeight:
    """A smaller matrix and the inputs that it still reads, ascending."""

    weight: Float[Tensor, "out kept"]
    kept: Int[Tensor, " kept"]
    escalations: int = 0  # how often the damping had to be raised


def prune_input_groups(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    groups: int,
    remove: int,
    score: str = "error",
    damping: float = 0.01,
) -> ReducedWeight:
    """Remove exactly `remove` of the `groups` equal groups of consecutive inputs, and refit the columns that stay.

    `score` decides which: `error` takes those that cost least after the refit, `norm` those with the smallest sum of
    squared weight times mean squared input. With a bias, pass the Gram matrix of the *centred* inputs, and move what
    the mean loses into the bias afterwards. `remove` 0 gives the weight itself.
    """
    _check(weight, groups, remove)
    if remove == 0:
        return ReducedWeight(weight, torch.arange(weight.shape[1], device=weight.device))
    factor = inverse_factor(gram.to(weight), damping=damping)
    inverse = factor.upper.T @ factor.upper
    heard = weight * (gram.diagonal() > 0)  # what never fires costs nothing, whatever its weight
    gone = (
        lowest_error_groups(heard, inverse, groups, remove)
        if score == "error"
        else lowest_norm_groups(heard, gram, groups, remove)
    )
    kept = _columns(sorted(set(range(groups)) - set(gone)), weight, groups)
    return ReducedWeight(refit_columns(heard, inverse, kept), kept, factor.escalations)


def lowest_error_groups(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], groups: int, remove: int
) -> list[int]:
    """The groups whose loss costs least, each given those that went before it, in that order.

    One pivoted Cholesky of `inverse` = H⁻¹: when the columns C are gone, D = H⁻¹ - H⁻¹_:C (H⁻¹_CC)⁻¹ H⁻¹_C: is left
    and the next group g costs tr(D_gg⁻¹ W_gᵀ W_g), with W as it is refitted by then. Only those diagonal blocks and the
    columns of the groups that went are ever formed: in * (out + 2 * columns gone) multiply-adds a column.
    """
    out, size = weight.shape
    width = size // groups
    blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    rows = weight.T.contiguous()
    energy = torch.bmm(rows.view(groups, width, out), rows.view(groups, width, out).mT)
    shares = weight.new_zeros(size, remove * width)  # pivoted Cholesky factor, a group's columns at a time
    losses = weight.new_zeros(out, remove * width)  # what those columns did, seen through their pivots
    gone: list[int] = []
    penalty = weight.new_zeros(groups)  # infinite for what is gone
    for step in range(remove):
        group = int((_traces(blocks, energy) + penalty).argmin())
        here, done = slice(group * width, (group + 1) * width), slice(0, step * width)
        pivot, failed = torch.linalg.cholesky_ex(blocks[group])
        if failed or not bool(pivot.isfinite().all()):
            raise NumericalError("the inverse Gram matrix lost its positive definiteness; raise damping")
        share = _over(torch.addmm(inverse[:, here], shares[:, done], shares[here, done].T, alpha=-1), pivot)
        loss = _over(torch.addmm(weight[:, here], losses[:, done], shares[here, done].T, alpha=-1), pivot)
        pull = torch.addmm(rows @ loss, shares[:, done], losses[:, done].T @ loss, alpha=-1)
        share, pull = share.view(groups, width, width), pull.view(groups, width, width)
        blocks -= share @ share.mT
        both = share @ pull.mT
        energy += share @ (loss.T @ loss) @ share.mT - both - both.mT
        gone.append(group)
        penalty[group], blocks[group], energy[group] = torch.inf, torch.eye(width).to(blocks), 0.0
        span = slice(step * width, (step + 1) * width)
        shares[:, span], losses[:, span] = share.view(size, width), loss
    return gone


def lowest_norm_groups(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], groups: int, remove: int
) -> list[int]:
    """The groups with the smallest sum of squared weight times mean squared input: blind to what the others can do."""
    norms = (weight.square().sum(0) * gram.diagonal()).view(groups, -1).sum(1)
    return norms.argsort(stable=True)[:remove].tolist()


def refit_columns(
    weight: Float[Tensor, "out in"], inverse: Float[Tensor, "in in"], kept: Int[Tensor, " kept"]
) -> Float[Tensor, "out kept"]:
    """The kept columns with the least squared output error when all others are zero; `inverse` is that of the Gram."""
    lost = torch.ones(len(inverse), dtype=torch.bool, device=kept.device)
    lost[kept] = False
    pivot, failed = torch.linalg.cholesky_ex(inverse[lost][:, lost])
    if failed:
        raise NumericalError("the inverse Gram matrix lost its positive definiteness; raise damping")
    return weight[:, kept] - weight[:, lost] @ torch.cholesky_solve(inverse[lost][:, kept], pivot)


def _traces(blocks: Float[Tensor, "groups n n"], energy: Float[Tensor, "groups n n"]) -> Float[Tensor, " groups"]:
    """tr(blocks⁻¹ energy) of every group."""
    if blocks.shape[1] == 1:
        return (energy / blocks).flatten()
    return torch.linalg.solve(blocks, energy).diagonal(dim1=1, dim2=2).sum(1)


def _over(left: Float[Tensor, "rows n"], pivot: Float[Tensor, "n n"]) -> Float[Tensor, "rows n"]:
    """left pivot⁻ᵀ, with a lower triangular pivot."""
    return torch.linalg.solve_triangular(pivot.T, left, upper=True, left=False)


def _columns(groups_kept: list[int], weight: Tensor, groups: int) -> Int[Tensor, " kept"]:
    everything = torch.arange(weight.shape[1], device=weight.device)
    return everything.view(groups, -1)[groups_kept].flatten()


def _check(weight: Float[Tensor, "out in"], groups: int, remove: int) -> None:
    size = weight.shape[1]
    if size % groups:
        raise DataError(f"{size} inputs cannot be cut into {groups} equal groups")
    if not 0 <= remove < groups:
        raise DataError(f"cannot remove {remove} of {groups} groups of inputs: at least one stays")
