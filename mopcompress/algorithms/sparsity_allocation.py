"""Allocation of a total sparsity over the linears of a model; the total count is exact.

Three allocations besides the uniform one, each from profiles of the dense linears (`LayerProfile`). OWL prunes blocks
with many outliers less (Yin et al., https://arxiv.org/abs/2310.05175 sec. 3.2). The ramp prunes deeper blocks more
(Huang et al., https://arxiv.org/abs/2502.14770 eq. 5). The error-driven one (ours) gives the last weight that each
linear loses the same relative output error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.errors import DataError

HIGHEST = 0.99  # sparsity of a linear, at most
CURVE_POINTS = 200  # of an error curve
LayerSparsities = dict[str, float]
"""The sparsity of each linear, by name."""


@dataclass(frozen=True)
class LayerProfile:
    """A dense linear before pruning."""

    block: int
    weights: int
    outliers: float  # fraction of the weights of its *block* with |w| norm above `multiple` times the block's mean
    costs: Float[Tensor, " points"]  # of the weight at each of CURVE_POINTS even ranks: (w norm)² over the sum of all


def profile_block(
    weights: Mapping[str, Float[Tensor, "_ _"]],
    norms: Mapping[str, Float[Tensor, " _"]],
    *,
    block: int,
    multiple: float,
) -> dict[str, LayerProfile]:
    """Profile the linears of one block from the root mean squares of their inputs (Wanda's scores, squared)."""
    scores = {name: weight.detach().abs() * norms[name].to(weight) for name, weight in weights.items()}
    count = sum(score.numel() for score in scores.values())
    mean = sum(float(score.sum()) for score in scores.values()) / count
    outliers = sum(int((score > multiple * mean).sum()) for score in scores.values()) / count
    return {name: LayerProfile(block, score.numel(), outliers, _error_curve(score)) for name, score in scores.items()}


def uniform(profiles: Mapping[str, LayerProfile], sparsity: float) -> LayerSparsities:
    """Give every linear the same sparsity."""
    return match_total(dict.fromkeys(profiles, sparsity), profiles, sparsity)


def owl(profiles: Mapping[str, LayerProfile], sparsity: float, *, spread: float) -> LayerSparsities:
    """Prune blocks less the more outliers they have; the extremes differ by `2 * spread` in sparsity."""
    outliers = {profile.block: profile.outliers for profile in profiles.values()}
    lowest, highest = min(outliers.values()), max(outliers.values())
    width = (highest - lowest) or 1.0
    sparsities = {
        name: sparsity - 2 * spread * (profile.outliers - lowest) / width for name, profile in profiles.items()
    }
    return match_total(sparsities, profiles, sparsity)


def ramp(profiles: Mapping[str, LayerProfile], sparsity: float, *, rise: float) -> LayerSparsities:
    """Let the sparsity rise linearly over the blocks, by `rise` from the first to the last."""
    last = max(profile.block for profile in profiles.values()) or 1
    sparsities = {name: sparsity + rise * profile.block / last for name, profile in profiles.items()}
    return match_total(sparsities, profiles, sparsity)


def equal_marginal_error(profiles: Mapping[str, LayerProfile], sparsity: float, *, spread: float) -> LayerSparsities:
    """Remove the weights of every linear that cost less than one common price.

    The sparsity of a linear differs from `sparsity` by `spread` at most, before all are shifted to the exact total.
    """

    def sparsities_at(log_price: float) -> LayerSparsities:
        below = {name: float((layer.costs.log() < log_price).double().mean()) for name, layer in profiles.items()}
        return {name: min(max(number, sparsity - spread), sparsity + spread) for name, number in below.items()}

    def excess(log_price: float) -> float:
        return _total_sparsity(sparsities_at(log_price), profiles) - sparsity

    return match_total(sparsities_at(_find_root(excess, -100.0, 10.0)), profiles, sparsity)


def match_total(
    sparsities: Mapping[str, float], profiles: Mapping[str, LayerProfile], sparsity: float
) -> LayerSparsities:
    """Shift all sparsities by one number, clamp them to 0 and HIGHEST, and round them to counts.

    Together they remove `round(sparsity * weights)` weights, counted over all linears. Raises `DataError` when
    `sparsity` is below 0 or above HIGHEST.
    """
    if not 0 <= sparsity <= HIGHEST:
        raise DataError(f"cannot allocate a sparsity of {sparsity:g}: no linear may lose more than {HIGHEST:g}")

    def shifted(shift: float) -> LayerSparsities:
        return {name: min(max(number + shift, 0.0), HIGHEST) for name, number in sparsities.items()}

    targets = shifted(_find_root(lambda shift: _total_sparsity(shifted(shift), profiles) - sparsity, -10.0, 10.0))
    rounded, exact_total, total = {}, 0.0, 0
    for name, target in targets.items():
        exact_total += target * profiles[name].weights
        count = min(round(exact_total) - total, profiles[name].weights)
        rounded[name] = count / profiles[name].weights
        total += count
    return rounded


def _error_curve(scores: Tensor) -> Float[Tensor, " points"]:
    ranks = ((torch.arange(CURVE_POINTS, device=scores.device) + 0.5) / CURVE_POINTS * scores.numel()).long()
    values = scores.flatten().abs().sort().values[ranks].cpu().double()  # on the CPU: some devices have no float64
    return values.square() / max(float(scores.norm()) ** 2, 1e-300)


def _total_sparsity(sparsities: Mapping[str, float], profiles: Mapping[str, LayerProfile]) -> float:
    weights = sum(profile.weights for profile in profiles.values())
    return sum(number * profiles[name].weights for name, number in sparsities.items()) / weights


def _find_root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Find the zero of an increasing function by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2
