"""Where a training stands after a step: all that its next step depends on, the order of the data apart.

That order depends on the seed and the number of steps alone, so it is walked through again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mopcompress.recover.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    nats: float  # mean over the step's response tokens
    tokens: int  # real tokens that ran through the upper blocks, padding not counted
    seconds: float
    norms: Mapping[str, float]  # of the gradients before they were clipped, by the group that was clipped by itself


@dataclass
class Standing:
    """The adapter, AdamW's means, and the steps that are done."""

    adapter: Adapter
    optimiser: torch.optim.Optimizer
    rows: list[TrainRow] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Every number but the rows, by name: `adapter.NAME`, and `optimiser.PARAMETER.NAME` after the first step."""
        weights = {f"adapter.{name}": tensor.cpu() for name, tensor in self.adapter.state_dict().items()}
        means = {
            f"optimiser.{index}.{name}": tensor.cpu()
            for index, named in self.optimiser.state_dict()["state"].items()
            for name, tensor in named.items()
        }
        return weights | means

    def restore(self, tensors: dict[str, Tensor], rows: list[TrainRow]) -> None:
        """Take the place, in place, of a standing whose `tensors()` these were."""
        with torch.no_grad():
            for name, weight in self.adapter.state_dict().items():
                weight.copy_(tensors[f"adapter.{name}"])
        means: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, which = rest.partition(".")
                means.setdefault(int(index), {})[which] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": means})
        self.rows[:] = rows


@runtime_checkable  # so that the test run can check it
class Keeping(Protocol):
    """Keeps a training, so that it can be stopped anywhere and go on."""

    def restore(self, standing: Standing) -> None:
        """Bring `standing`, in place, to where the training stood; leave it alone when there was none."""
        ...

    def keep(self, standing: Standing) -> None:
        """Take note of it, or not yet."""
        ...
