"""Modifier of the low-rank repair of what other modifiers compressed."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from mopcompress.recipe.field_types import BlockTargets, Spec, Targets
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.recipe.validation_errors import Fault

Rank = Annotated[int, Field(ge=1, le=65536)]
Path = tuple[str, ...]


class LowRankRepairModifier(Spec):
    """A matrix of low rank beside each compressed linear, in closed form from its inputs (arXiv 2410.21271).

    Ours. The weights stay as they were compressed; the added matrix is stored apart from them.
    """

    method: ClassVar[str] = "eora"

    rank: Rank
    targets: BlockTargets = ("Linear",)  # of the linears that an earlier modifier compresses
    ignore: Targets = ()


def misplaced_repairs(placed: Sequence[tuple[Path, Spec]]) -> list[Fault]:
    """Return a fault for each repair but a single last one. `placed` has the modifiers in order, with their paths."""
    faults, compressed, repair = [], False, ""
    for path, modifier in placed:
        if isinstance(modifier, LowRankRepairModifier):
            if repair:
                faults.append(
                    Fault(path, f"a linear has one repair, and {repair} makes it; keep one, of the rank of both")
                )
            elif not compressed:
                faults.append(
                    Fault(path, "repairs what modifiers before it compressed, and there is none; put it last")
                )
            repair = repair or path[0]
        elif isinstance(modifier, Pruning | GPTQModifier):
            if repair:
                what = (
                    f"would change weights that the LowRankRepairModifier of {repair} has repaired; put it before that"
                )
                faults.append(Fault(path, what))
            compressed = True
    return faults
