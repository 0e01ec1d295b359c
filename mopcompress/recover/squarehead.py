"""SquareHead (Kurtic et al., arXiv 2310.06927): after every block, hidden states follow the dense model's.

A loss on the last layer says little to a network that is badly damaged half-way. This loss speaks to every block, and
no block's states weigh more for being larger. Only positions that predict a response token count. The teacher's mean
square is that of all training rows, not of the batch (ours), so that a step in parts is the same step.
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
    """The outputs of every block of the dense model at each position that predicts a response token.

    They lie in a file without a name, in bfloat16, which no state is too large for. A response token takes two bytes
    times blocks times hidden size: 35 kB for SmolLM2-135M. Running the teacher in every step instead would make a step
    half as long again.
    """

    def __init__(self, model: LanguageModel, scored: Sequence[int]) -> None:
        """Reserve room for documents with these numbers of response tokens."""
        self.blocks, self.hidden = len(model.blocks), model.hidden_size
        self._ends = torch.tensor(scored).cumsum(0).tolist()
        self._scored = list(scored)
        self._states = map_anonymous(sum(scored), self.blocks * self.hidden, torch.bfloat16)
        self._squares = torch.zeros(self.blocks, dtype=torch.float64)  # sum of mean squares over response tokens

    def record(self, rows: Sequence[int], batch: ResponseBatch, outputs: Sequence[Tensor]) -> None:
        """Store, in place, the output of every block for these documents."""
        states = response_states(outputs, batch).cpu()
        self._squares += states.double().square().mean(2).sum(1)
        by_document = states.transpose(0, 1).flatten(1).split([self._scored[row] for row in rows])
        for row, document_states in zip(rows, by_document, strict=True):
            self._row(row).copy_(document_states)

    def loss(self, outputs: Sequence[Tensor], batch: ResponseBatch, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Return the SquareHead loss of a student's outputs, those of its last `len(outputs)` blocks."""
        student = response_states(outputs, batch)
        teacher = torch.cat([self._row(row) for row in rows]).to(student.device, student.dtype)
        teacher = teacher.unflatten(1, (self.blocks, self.hidden)).transpose(0, 1)[-len(outputs) :]
        mean_square = (self._squares / sum(self._scored))[-len(outputs) :].to(student)
        return squarehead(student, teacher, mean_square)

    def _row(self, row: int) -> Float[Tensor, "scored columns"]:
        return self._states[self._ends[row] - self._scored[row] : self._ends[row]]


def squarehead(
    student: Float[Tensor, "blocks scored hidden"],
    teacher: Float[Tensor, "blocks scored hidden"],
    mean_square: Float[Tensor, " blocks"],
) -> Float[Tensor, ""]:
    """Return the mean over blocks of the mean squared error, in units of the teacher's mean square of that block."""
    return ((student - teacher).square().mean((1, 2)) / mean_square).mean()


def response_states(outputs: Sequence[Tensor], batch: ResponseBatch) -> Float[Tensor, "blocks scored hidden"]:
    """Return the part of the blocks' outputs for a batch that predicts response tokens."""
    return torch.stack([hidden[batch.example, batch.position] for hidden in outputs])


@contextmanager
def record_outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that every run of one of the blocks, inside the context, adds its output to."""
    outputs: list[Tensor] = []

    def record(_block: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    with forward_hooks(blocks, record):
        yield outputs
