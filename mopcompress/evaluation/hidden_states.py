"""Hidden states at an adapter's layer, computed once per document.

The blocks below an adapter are frozen and never see it. Their output is therefore the same for every step, arm and seed
on one compressed model: about a third of the depth is computed once. Gates read the same states. At layer 0 the states
are embeddings.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mopcompress.data.encoding import Document
from mopcompress.evaluation.batching import derangement
from mopcompress.models.language_model import LanguageModel
from mopcompress.storage.memmap import map_anonymous


@dataclass(frozen=True)
class InstructionStates:
    """All that an adapter may read of its examples: nothing in it depends on a response."""

    hidden: Float[Tensor, "batch time hidden"]  # instruction tokens at the adapter's layer; zeros after their end
    lengths: Int[Tensor, " batch"]  # instruction tokens per example
    mean: Float[Tensor, "batch hidden"]  # over the instruction's tokens
    tasks: Sequence[str] | None = None  # the true task per example, where it is known
    shuffled_mean: Float[Tensor, "batch hidden"] | None = None  # `mean` of other documents, whatever the batch


ApplyAdapter = Callable[[InstructionStates], AbstractContextManager[object]]
"""Inside `apply_adapter(instructions)`, a trained adapter acts on the network."""


@dataclass(frozen=True)
class ResponseBatch:
    """Documents at an adapter's layer, padded on the right, with the response tokens to predict from them."""

    hidden: Float[Tensor, "batch time hidden"]  # all tokens; zeros after their end
    instructions: InstructionStates
    example: Int[Tensor, " scored"]  # index in the batch of each scored token's document
    position: Int[Tensor, " scored"]  # the position that predicts the token: one before its own
    target: Int[Tensor, " scored"]  # the response token itself


@dataclass(frozen=True)
class PackedStates:
    """States of all documents without padding, one document after the other."""

    hidden: Float[Tensor, "tokens hidden"]  # may be memory-mapped, and in another precision
    means: Float[Tensor, "documents hidden"]  # over each instruction's tokens, before any rounding of `hidden`


class HiddenStateDataset:
    """The states of all documents that enter block `layer`, memory-mapped so that they need not fit in memory."""

    def __init__(
        self,
        model: LanguageModel,
        documents: Sequence[Document],
        layer: int,
        *,
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
        packed: PackedStates | None = None,
    ) -> None:
        """Take the states from `packed`, or else run the blocks below `layer` on every document.

        `progress` receives the number of documents that are done. Raises `DataError` when the blocks from `layer` on
        read more than these states.
        """
        if packed is None:
            hidden = map_anonymous(count_tokens(documents), model.hidden_size, torch.float32)
            means = compute_states(model, documents, layer, hidden, batch_size=batch_size, progress=progress)
            packed = PackedStates(hidden, means)
        self.layer, self.documents, self.device = layer, tuple(documents), model.device
        self.means = packed.means.to(model.device)
        self._hidden, self._ends = packed.hidden, _ends(documents)
        self._shuffled_rows = derangement(len(documents)) if len(documents) > 1 else None

    def batch(self, rows: Sequence[int]) -> ResponseBatch:
        """Gather the documents of these rows, in their order."""
        documents = [self.documents[row] for row in rows]
        longest = max(len(document.tokens) for document in documents)
        hidden = torch.zeros(len(rows), longest, self._hidden.shape[1])
        contexts = [document.context_tokens for document in documents]
        instructions = torch.zeros(len(rows), max(contexts), self._hidden.shape[1])
        example: list[int] = []
        position: list[int] = []
        target: list[int] = []
        for index, (row, document) in enumerate(zip(rows, documents, strict=True)):
            hidden[index, : len(document.tokens)] = self._row(row)
            instructions[index, : document.context_tokens] = hidden[index, : document.context_tokens]
            scored = range(document.context_tokens, len(document.tokens))
            example += [index] * len(scored)
            position += [time - 1 for time in scored]
            target += document.tokens[document.context_tokens :]
        indices = torch.tensor([example, position, target], device=self.device)
        readable = InstructionStates(
            hidden=instructions.to(self.device),
            lengths=torch.tensor(contexts, device=self.device),
            mean=self.means[list(rows)],
            tasks=[document.task for document in documents],
            shuffled_mean=self.means[[self._shuffled_rows[row] for row in rows]] if self._shuffled_rows else None,
        )
        return ResponseBatch(hidden.to(self.device), readable, *indices)

    def sample_states(
        self, rows: Sequence[int], count: int, generator: torch.Generator
    ) -> Float[Tensor, "count hidden"]:
        """Return the states at `count` random instruction positions.

        Position 0 is skipped, which attention uses as a sink, unless the instruction has one token.
        """
        samples = []
        for _ in range(count):
            row = rows[int(torch.randint(len(rows), (), generator=generator))]
            tokens = self.documents[row].context_tokens
            time = int(torch.randint(min(1, tokens - 1), tokens, (), generator=generator))
            samples.append(self._row(row)[time])
        return torch.stack(samples).to(self.device, torch.float32)

    def _row(self, row: int) -> Float[Tensor, "time hidden"]:
        return self._hidden[self._ends[row] - len(self.documents[row].tokens) : self._ends[row]]


def compute_states(
    model: LanguageModel,
    documents: Sequence[Document],
    layer: int,
    hidden: Float[Tensor, "tokens hidden"],
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "documents hidden"]:
    """Run the blocks below `layer`, write the states of all documents to `hidden`, in place, and return their means.

    The means are those of `PackedStates`. Documents run in the order of their lengths. Raises `DataError` when the
    blocks from `layer` on read more than these states.
    """
    model.require_separable(layer)
    ends, order = _ends(documents), sorted(range(len(documents)), key=lambda row: len(documents[row].tokens))
    means = torch.empty(len(documents), model.hidden_size, device=model.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with torch.inference_mode():
            entering = model.run_lower(_right_padded([documents[row].tokens for row in rows], model.device), layer)
        for row, states in zip(rows, entering, strict=True):
            length = len(documents[row].tokens)
            hidden[ends[row] - length : ends[row]].copy_(states[:length])
            means[row] = states[: documents[row].context_tokens].mean(0)
        progress(start + len(rows))
    return means


def count_tokens(documents: Sequence[Document]) -> int:
    """Return the number of tokens of all documents."""
    return sum(len(document.tokens) for document in documents)


def _ends(documents: Sequence[Document]) -> list[int]:
    """Return the index after each document's last token, where documents stand one after the other."""
    return torch.tensor([len(document.tokens) for document in documents]).cumsum(0).tolist()


def _right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "batch time"]:
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *([0] * (longest - len(sequence)))] for sequence in sequences], device=device)
