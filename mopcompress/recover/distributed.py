"""Data-parallel training: every process runs a share of each step's rows, and gradients are added up.

Started by `torchrun`, or by `accelerate launch`, which tell each process its place in the environment. Only the adapter
is trained, a few hundred thousand numbers, so one sum over all of them a step is all that is sent: torch.distributed
does it alone, and accelerate's wrappers of model, optimiser and data would hide the loop and add nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.recover.checkpoint import TrainingState

PATIENCE = timedelta(days=1)  # the first process may compute states for hours while the others wait
Known = TypeVar("Known")


@dataclass(frozen=True)
class Workers:
    """This process's place among those that train together; alone, nothing is sent."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """It is the one that writes."""
        return self.rank == 0

    def add_up(self, losses: Float[Tensor, " losses"], parameters: Sequence[nn.Parameter]) -> None:
        """Make losses and gradients, in place, the sums over all processes; those with no rows add zeros."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = torch.cat([losses, *(one.flatten() for one in gradients)])
        torch.distributed.all_reduce(flat)
        totals, *sums = flat.split([len(losses), *(one.numel() for one in gradients)])
        losses.copy_(totals)
        for parameter, one in zip(parameters, sums, strict=True):
            parameter.grad = one.view_as(parameter)

    def make_equal(self, standing: TrainingState) -> None:
        """Bring every process, in place, to where the first one stands."""
        if self.count > 1:
            standing.restore(*self.same((standing.tensors(), standing.rows)))

    def same(self, known: Known) -> Known:
        """What the first process knows, in every process."""
        given = [known]
        if self.count > 1:
            torch.distributed.broadcast_object_list(given, src=0)
        return given[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before all others do: what it leaves on disk is there for them."""
        if self.count > 1 and not self.first:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.first:
            torch.distributed.barrier()


@contextmanager
def join_workers(device: torch.device) -> Iterator[Workers]:
    """The processes that a launcher started, joined while the block runs; without one, this process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means in this process
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Workers(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
