"""Hidden states half-way up, computed once a document.

The blocks below an adapter are frozen and never see it, so their output is the same for every step, arm and seed on one
compressed model: about a third of the depth is paid for once. Gates read the same states. At layer 0 they are
embeddings.
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
    """All that an adapter may read of its examples: nothing of it depends on a response."""

    hidden: Float[Tensor, "batch time hidden"]  # instruction tokens at the adapter's layer; zeros after their end
    lengths: Int[Tensor, " batch"]  # instruction tokens per example
    mean: Float[Tensor, "batch hidden"]  # mean over the instruction's tokens
    tasks: Sequence[str] | None = None  # the true ones, where they are known
    shuffled_mean: Float[Tensor, "batch hidden"] | None = None  # means of other documents, whatever the batch


ApplyAdapter = Callable[[InstructionStates], AbstractContextManager[object]]
"""Inside `applied(instructions)`, a trained adapter acts on the network."""


Fill = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "documents hidden"]]
"""Writes the states of all documents, in place, and gives their summaries."""

Store = Callable[[int, int, Fill], tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "documents hidden"]]]
"""`store(tokens, hidden, fill)`: states and summaries, from where they are kept or by calling `fill`."""


@dataclass(frozen=True)
class ResponseBatch:
    """Right-padded documents at an adapter's layer, with what is to be predicted from them."""

    hidden: Float[Tensor, "batch time hidden"]
    instructions: InstructionStates
    example: Int[Tensor, " scored"]  # which document of the batch each scored token belongs to
    position: Int[Tensor, " scored"]  # the position that predicts it: one before its own
    target: Int[Tensor, " scored"]  # the response token itself


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
        store: Store | None = None,
    ) -> None:
        """Run the blocks below `layer` on every document, unless `store` has their states.

        `progress` is told how many are done. Raises `DataError` when the upper blocks read more than these states.
        """
        self.layer, self.documents, self.device = layer, tuple(documents), model.device
        lengths = torch.tensor([len(document.tokens) for document in documents])
        self._ends = lengths.cumsum(0)
        self._shuffled_rows = derangement(len(documents)) if len(documents) > 1 else None
        order = lengths.argsort(stable=True).tolist()

        def fill(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "documents hidden"]:
            model.require_separable(layer)
            self._hidden = hidden
            summaries = torch.empty(len(documents), model.hidden_size, device=model.device)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                with torch.inference_mode():
                    entering = model.run_lower(_padded([documents[row].tokens for row in rows], model.device), layer)
                for row, states in zip(rows, entering, strict=True):
                    document = documents[row]
                    self._of(row).copy_(states[: len(document.tokens)])
                    summaries[row] = states[: document.context_tokens].mean(0)
                progress(start + len(rows))
            return summaries

        size = int(lengths.sum()), model.hidden_size
        if store is None:
            self.summaries = fill(map_anonymous(*size, torch.float32))
        else:
            self._hidden, summaries = store(*size, fill)
            self.summaries = summaries.to(model.device)

    def batch(self, rows: Sequence[int]) -> ResponseBatch:
        """Gather some documents."""
        documents = [self.documents[row] for row in rows]
        longest = max(len(document.tokens) for document in documents)
        hidden = torch.zeros(len(rows), longest, self._hidden.shape[1])
        contexts = [document.context_tokens for document in documents]
        instructions = torch.zeros(len(rows), max(contexts), self._hidden.shape[1])
        example: list[int] = []
        position: list[int] = []
        target: list[int] = []
        for index, (row, document) in enumerate(zip(rows, documents, strict=True)):
            hidden[index, : len(document.tokens)] = self._of(row)
            instructions[index, : document.context_tokens] = hidden[index, : document.context_tokens]
            scored = range(document.context_tokens, len(document.tokens))
            example += [index] * len(scored)
            position += [time - 1 for time in scored]
            target += document.tokens[document.context_tokens :]
        indices = torch.tensor([example, position, target], device=self.device)
        read = InstructionStates(
            hidden=instructions.to(self.device),
            lengths=torch.tensor(contexts, device=self.device),
            mean=self.summaries[list(rows)],
            tasks=[document.task for document in documents],
            shuffled_mean=self.summaries[[self._shuffled_rows[row] for row in rows]] if self._shuffled_rows else None,
        )
        return ResponseBatch(hidden.to(self.device), read, *indices)

    def sample_states(
        self, rows: Sequence[int], count: int, generator: torch.Generator
    ) -> Float[Tensor, "count hidden"]:
        """States at `count` random instruction positions; not the first, which attention uses as a sink, of several."""
        picked = []
        for _ in range(count):
            row = rows[int(torch.randint(len(rows), (), generator=generator))]
            tokens = self.documents[row].context_tokens
            time = int(torch.randint(min(1, tokens - 1), tokens, (), generator=generator))
            picked.append(self._of(row)[time])
        return torch.stack(picked).to(self.device, torch.float32)

    def _of(self, row: int) -> Float[Tensor, "time hidden"]:
        return self._hidden[int(self._ends[row]) - len(self.documents[row].tokens) : int(self._ends[row])]


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "batch time"]:
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *([0] * (longest - len(sequence)))] for sequence in sequences], device=device)
