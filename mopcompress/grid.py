"""The grid of a bench by name: setting x arm x seed, from the `run:` part of a recipe.

The stage that fills a grid and the report that tells what is missing read it alike, so that they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mopcompress.recipe.arms import TRAINED
from mopcompress.results import setting_name

QUANTISER = "gptq"


@dataclass(frozen=True)
class Setting:
    """One way to compress; `method` joins pruning and rounding with a plus when it is both."""

    method: str
    ratio: float | None  # share of weights to remove
    bits: int | None

    @property
    def name(self) -> str:
        """As in the rows and the report."""
        return setting_name(self.method, self.ratio, self.bits)

    @property
    def pruning(self) -> str | None:
        """The method that removes weights."""
        return None if self.ratio is None else self.method.partition("+")[0]


@dataclass(frozen=True)
class Cell:
    """One row to be."""

    setting: str
    arm: str
    seed: int


DENSE = Setting("dense", 0.0, None)


def compressed_settings(run: Mapping[str, Any]) -> list[Setting]:
    """Method by method, ratio by ratio; then the bit widths, or, in a joint run, every width of every pruned model."""
    pruned = [
        Setting(method, ratio, None)
        for method in run.get("methods") or ()
        for ratio in filter(None, run.get("ratios") or ())
    ]
    widths = list(run.get("bits") or ())
    if run.get("joint") and pruned and widths:
        return [Setting(f"{one.method}+{QUANTISER}", one.ratio, bits) for one in pruned for bits in widths]
    return pruned + [Setting(QUANTISER, None, bits) for bits in widths]


def draws(arm: str) -> bool:
    """Whether seeds make a difference to an arm: it takes training steps, as far as is known."""
    return arm != "none" and (arm not in TRAINED or TRAINED[arm].learning_rate is not None)


def cells_of(run: Mapping[str, Any], setting: Setting) -> list[Cell]:
    """Arms that draw nothing stand under seed 0 alone; the dense model has arms of its own, `none` always."""
    named = ("none", *(run.get("dense_arms") or ())) if setting == DENSE else run.get("arms") or ()
    arms = tuple(dict.fromkeys(named))
    fixed = [arm for arm in arms if not draws(arm)]
    drawn = [Cell(setting.name, arm, seed) for seed in run.get("seeds") or () for arm in arms if arm not in fixed]
    return [Cell(setting.name, arm, 0) for arm in fixed] + drawn
