"""What stands beside the weights that other modifiers compressed."""

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

    Ours. The weights stay as they were compressed; what is added is stored beside them.
    """

    method: ClassVar[str] = "eora"

    rank: Rank
    targets: BlockTargets = ("Linear",)  # of those linears that a modifier before it compresses
    ignore: Targets = ()


def misplaced_repairs(placed: Sequence[tuple[Path, Spec]]) -> list[Fault]:
    """There is one repair, of all that compresses, so it comes last. `placed`: the modifiers in order, with paths."""
    faults, before, repair = [], False, ""
    for path, one in placed:
        if isinstance(one, LowRankRepairModifier):
            if repair:
                faults.append(
                    Fault(path, f"a linear has one repair, and {repair} makes it; keep one, of the rank of both")
                )
            elif not before:
                faults.append(
                    Fault(path, "repairs what modifiers before it compressed, and there is none; put it last")
                )
            repair = repair or path[0]
        elif isinstance(one, Pruning | GPTQModifier):
            if repair:
                what = (
                    f"would change weights that the LowRankRepairModifier of {repair} has repaired; put it before that"
                )
                faults.append(Fault(path, what))
            before = True
    return faults
