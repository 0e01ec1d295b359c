"""SquareHead (Kurtic et al., arXiv 2310.06927): after every block, hidden states follow the dense model's.

A loss on what comes out at the end has little to say to a network that is badly damaged half-way; this one speaks to
every block, and no block's states weigh more for being larger. Only positions that predict a response token count. The
teacher's mean square is that of all training rows, not of the batch (ours), so that a step in parts is the same step.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ResponseBatch
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import forward_hooks
from mopcompress.storage.memmap import map_anonymous


class TeacherStates:
    """What leaves every block of the dense model at each position that predicts a response token.

    In a file without a name, in bfloat16, which no state is too large for: two bytes times blocks times the hidden size
    a response token, 35 kB for SmolLM2-135M. Running the teacher in every step instead would cost half a step more.
    """

    def __init__(self, model: LanguageModel, scored: Sequence[int]) -> None:
        """Room for documents with so many response tokens each."""
        self.blocks, self.hidden = len(model.blocks), model.hidden_size
        self._ends = torch.tensor(scored).cumsum(0).tolist()
        self._scored = list(scored)
        self._states = map_anonymous(sum(scored), self.blocks * self.hidden, torch.bfloat16)
        self._squares = torch.zeros(self.blocks, dtype=torch.float64)

    def keep(self, rows: Sequence[int], batch: ResponseBatch, seen: Sequence[Tensor]) -> None:
        """Put down, in place, what every block gave for these documents."""
        states = responses(seen, batch).cpu()
        self._squares += states.double().square().mean(2).sum(1)
        of_documents = states.transpose(0, 1).flatten(1).split([self._scored[row] for row in rows])
        for row, own in zip(rows, of_documents, strict=True):
            self._of(row).copy_(own)

    def loss(self, seen: Sequence[Tensor], batch: ResponseBatch, rows: Sequence[int]) -> Float[Tensor, ""]:
        """How far the last `len(seen)` blocks are from theirs: the mean over blocks of MSE / mean square."""
        own = responses(seen, batch)
        theirs = torch.cat([self._of(row) for row in rows]).to(own.device, own.dtype)
        theirs = theirs.unflatten(1, (self.blocks, self.hidden)).transpose(0, 1)[-len(seen) :]
        return squarehead(own, theirs, (self._squares / sum(self._scored))[-len(seen) :].to(own))

    def _of(self, row: int) -> Float[Tensor, "scored columns"]:
        return self._states[self._ends[row] - self._scored[row] : self._ends[row]]


def squarehead(
    student: Float[Tensor, "blocks scored hidden"],
    teacher: Float[Tensor, "blocks scored hidden"],
    mean_square: Float[Tensor, " blocks"],
) -> Float[Tensor, ""]:
    """The mean over blocks of each block's mean squared error in units of its teacher's mean square."""
    return ((student - teacher).square().mean((1, 2)) / mean_square).mean()


def responses(seen: Sequence[Tensor], batch: ResponseBatch) -> Float[Tensor, "blocks scored hidden"]:
    """Of what blocks gave for a batch: the positions that predict a response token."""
    return torch.stack([hidden[batch.example, batch.position] for hidden in seen])


@contextmanager
def record_outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside it, what each of these blocks gives is added to the list."""
    seen: list[Tensor] = []

    def note(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    with forward_hooks(blocks, note):
        yield seen
