"""How much each linear loses, so that all together lose exactly the share asked for.

Three profiles besides the uniform one, each from what a dense pass shows (`LayerProfile`): OWL spares blocks with many
outliers (Yin et al., https://arxiv.org/abs/2310.05175 sec. 3.2), the ramp takes more the deeper a block stands (Huang
et al., https://arxiv.org/abs/2502.14770 eq. 5), and the error-driven one makes the last weight that each linear loses
cost the same relative output error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.errors import DataError

HIGHEST = 0.99  # no linear loses all
GRID = 200  # points of an error curve
LayerSparsities = dict[str, float]


@dataclass(frozen=True)
class LayerProfile:
    """A dense linear before anything is removed."""

    block: int
    weights: int
    outliers: float  # share of the weights of its *block* with |w| norm above `multiple` times the block's mean
    costs: Float[Tensor, " grid"]  # of the weight at each of GRID even ranks: (w norm)² over the sum of all


def profile_block(
    weights: Mapping[str, Float[Tensor, "_ _"]],
    norms: Mapping[str, Float[Tensor, " _"]],
    *,
    block: int,
    multiple: float,
) -> dict[str, LayerProfile]:
    """LayerProfile the linears of one block from the root mean squares of their inputs (Wanda's scores, squared)."""
    scores = {name: weight.detach().abs() * norms[name].to(weight) for name, weight in weights.items()}
    count = sum(one.numel() for one in scores.values())
    mean = sum(float(one.sum()) for one in scores.values()) / count
    outliers = sum(int((one > multiple * mean).sum()) for one in scores.values()) / count
    return {name: LayerProfile(block, one.numel(), outliers, _costs(one)) for name, one in scores.items()}


def uniform(surveys: Mapping[str, LayerProfile], sparsity: float) -> LayerSparsities:
    """The same share of every linear."""
    return match_total(dict.fromkeys(surveys, sparsity), surveys, sparsity)


def owl(surveys: Mapping[str, LayerProfile], sparsity: float, *, spread: float) -> LayerSparsities:
    """Blocks keep the more, the more outliers they have; the densest keeps `2 * spread` more than the sparsest."""
    found = {survey.block: survey.outliers for survey in surveys.values()}
    lowest, highest = min(found.values()), max(found.values())
    width = (highest - lowest) or 1.0
    return match_total(
        {name: sparsity - 2 * spread * (one.outliers - lowest) / width for name, one in surveys.items()},
        surveys,
        sparsity,
    )


def ramp(surveys: Mapping[str, LayerProfile], sparsity: float, *, rise: float) -> LayerSparsities:
    """An arithmetic progression over the blocks: the last loses `rise` more than the first."""
    last = max(survey.block for survey in surveys.values()) or 1
    return match_total({name: sparsity + rise * one.block / last for name, one in surveys.items()}, surveys, sparsity)


def equal_marginal_error(surveys: Mapping[str, LayerProfile], sparsity: float, *, spread: float) -> LayerSparsities:
    """Every linear loses the weights that cost less than one common price, within `spread` of the share asked for."""

    def at(log_price: float) -> LayerSparsities:
        shares = {name: float((one.costs.log() < log_price).double().mean()) for name, one in surveys.items()}
        return {name: min(max(share, sparsity - spread), sparsity + spread) for name, share in shares.items()}

    return match_total(at(_root(lambda price: _total(at(price), surveys) - sparsity, -100.0, 10.0)), surveys, sparsity)


def match_total(shares: Mapping[str, float], surveys: Mapping[str, LayerProfile], sparsity: float) -> LayerSparsities:
    """Shift all shares alike, within 0 and HIGHEST, and round: `round(sparsity * weights)` go, counted over all.

    Raises `DataError` when that many cannot.
    """
    if not 0 <= sparsity <= HIGHEST:
        raise DataError(f"cannot allocate a sparsity of {sparsity:g}: no linear may lose more than {HIGHEST:g}")

    def shifted(shift: float) -> LayerSparsities:
        return {name: min(max(share + shift, 0.0), HIGHEST) for name, share in shares.items()}

    wanted = shifted(_root(lambda shift: _total(shifted(shift), surveys) - sparsity, -10.0, 10.0))
    rounded, exactly, gone = {}, 0.0, 0
    for name, share in wanted.items():
        exactly += share * surveys[name].weights
        count = min(round(exactly) - gone, surveys[name].weights)
        rounded[name] = count / surveys[name].weights
        gone += count
    return rounded


def _costs(scores: Tensor) -> Float[Tensor, " grid"]:
    ranks = ((torch.arange(GRID, device=scores.device) + 0.5) / GRID * scores.numel()).long()
    chosen = scores.flatten().abs().sort().values[ranks].cpu().double()  # not before: some devices have no float64
    return chosen.square() / max(float(scores.norm()) ** 2, 1e-300)


def _total(shares: Mapping[str, float], surveys: Mapping[str, LayerProfile]) -> float:
    weights = sum(one.weights for one in surveys.values())
    return sum(share * surveys[name].weights for name, share in shares.items()) / weights


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that rises passes zero, by bisection."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
