"""Data-parallel training: every process runs a part of each step's rows, and the gradients are summed.

The processes are started by `torchrun` or `accelerate launch`, which pass each its rank in the environment. Only the
adapter is trained, a few hundred thousand numbers, so one sum of them per step is all that is sent. torch.distributed
alone does that: accelerate's wrappers of model, optimizer and data would hide the training loop and add nothing.
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

TIMEOUT = timedelta(days=1)  # the first process may compute states for hours while the others wait
Value = TypeVar("Value")


@dataclass(frozen=True)
class Workers:
    """The processes that train together, seen from this one. A process alone sends nothing."""

    rank: int = 0  # of this process, from 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """True for the first process, which alone writes files."""
        return self.rank == 0

    def sum_over(self, losses: Float[Tensor, " losses"], parameters: Sequence[nn.Parameter]) -> None:
        """Replace losses and gradients, in place, by their sums over all processes. A missing gradient counts as 0."""
        if self.count == 1:
            return
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters
        ]
        flat = torch.cat([losses, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        totals, *sums = flat.split([len(losses), *(gradient.numel() for gradient in gradients)])
        losses.copy_(totals)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view_as(parameter)

    def sync_state(self, state: TrainingState) -> None:
        """Bring the state of every process, in place, to that of the first one."""
        if self.count > 1:
            state.load_state_dict(*self.same_for_all((state.state_dict(), state.rows)))

    def same_for_all(self, value: Value) -> Value:
        """Return the first process's value in every process."""
        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the first process before all others, which find there what it left on disk."""
        if self.count > 1 and not self.is_main:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.is_main:
            torch.distributed.barrier()


@contextmanager
def join_workers(device: torch.device) -> Iterator[Workers]:
    """Join the processes that a launcher started while the block runs; without a launcher, this process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Workers()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means in this process
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Workers(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
