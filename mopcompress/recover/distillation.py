"""Distillation (Hinton et al., arXiv 1503.02531): the adapted model learns the dense model's distributions, not text.

A response token is one sample of what the dense model knows there; its distribution says more, which pays most where
there are few rows. The teacher is run once a training document, and of each distribution the `TOP` likeliest tokens are
kept; all others are one bucket (ours), so that teacher and student are distributions over the same `TOP` + 1 outcomes
and a student that equals its teacher has a divergence of 0.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopcompress.data.encoding import Document
from mopcompress.evaluation.batching import batches_by_length
from mopcompress.evaluation.hidden_states import HiddenStateDataset, ResponseBatch
from mopcompress.evaluation.state_cache import cache_key
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover import distillation
from mopcompress.recover.squarehead import TeacherStates, record_outputs
from mopcompress.storage.cache import cached

FILE = "distributions.safetensors"


TOP = 64


@dataclass(frozen=True)
class TopKDistribution:
    """What is kept of a teacher's distributions, an entry a scored token."""

    tokens: Int[Tensor, "scored top"]
    log_shares: Float[Tensor, "scored top+1"]  # of those tokens, and of all others together


Store = Callable[[Callable[[], TopKDistribution]], TopKDistribution]
"""`store(run)`: the distributions of all documents, from where they are kept or by calling `run`."""


class Teacher:
    """The dense model's distributions over every response token of the training documents, at one temperature.

    They take half a gigabyte for a million response tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Sequence[Document],
        *,
        temperature: float,
        batch_size: int,
        hidden: bool = False,
        progress: Callable[[int], None] = lambda done: None,
        store: Store | None = None,
    ) -> None:
        """Run the whole model on every document, and keep its hidden states too if asked to.

        Without hidden states it is not run where `store` has its distributions. `progress` is told how many documents
        are done.
        """
        self.temperature = temperature
        self._scored = [len(document.tokens) - document.context_tokens for document in documents]
        self._ends = torch.tensor(self._scored).cumsum(0).tolist()
        self.states = TeacherStates(model, self._scored) if hidden else None
        run = partial(self._run, model, documents, batch_size, progress)
        self._kept = run() if hidden or store is None else store(run)

    def _run(
        self, model: LanguageModel, documents: Sequence[Document], batch_size: int, progress: Callable[[int], None]
    ) -> TopKDistribution:
        found: dict[int, TopKDistribution] = {}
        states = HiddenStateDataset(model, documents, 0, batch_size=batch_size)
        for rows in batches_by_length(documents, batch_size, generator=None):
            batch = states.batch(rows)
            with torch.inference_mode(), record_outputs(model.blocks if self.states else ()) as seen:
                left = model.run_upper(batch.hidden, 0)
                kept = top_k_distribution(
                    model.logits(left[batch.example, batch.position]), temperature=self.temperature
                )
            if self.states is not None:
                self.states.keep(rows, batch, seen)
            for index, row in enumerate(rows):
                own = batch.example == index
                found[row] = TopKDistribution(kept.tokens[own].int().cpu(), kept.log_shares[own].cpu())
            progress(len(found))
        in_order = [found[row] for row in range(len(documents))]
        return TopKDistribution(
            torch.cat([one.tokens for one in in_order]), torch.cat([one.log_shares for one in in_order])
        )

    def of(self, rows: Sequence[int], device: torch.device) -> TopKDistribution:
        """Of these documents, in the order in which a batch scores them."""
        places = [slice(self._ends[row] - self._scored[row], self._ends[row]) for row in rows]
        tokens = torch.cat([self._kept.tokens[place] for place in places]).long()
        return TopKDistribution(
            tokens.to(device), torch.cat([self._kept.log_shares[place] for place in places]).to(device)
        )


@dataclass(frozen=True)
class Distillation:
    """How much of the loss is the teacher's: `share` of 1 leaves nothing to the text.

    `squarehead` is the weight of a loss on hidden states, which is added; it needs a teacher that keeps them.
    """

    teacher: Teacher
    share: float
    squarehead: float = 0.0

    def watched(self, model: LanguageModel, layer: int) -> AbstractContextManager[list[Tensor]]:
        """Inside it, what the blocks from `layer` on give is noted, if it is part of the loss."""
        return record_outputs(model.blocks[layer:] if self.squarehead else ())

    def loss(
        self,
        nats: Float[Tensor, ""],
        logits: Float[Tensor, "scored vocab"],
        seen: Sequence[Tensor],
        batch: ResponseBatch,
        rows: Sequence[int],
    ) -> Float[Tensor, ""]:
        """Cross-entropy (`nats`) and divergence from the teacher, mixed, and what hidden states add."""
        loss = nats
        if self.share:
            kept = self.teacher.of(rows, logits.device)
            far = kl_divergence(kept, logits, temperature=self.teacher.temperature).mean()
            loss = (1 - self.share) * nats + self.share * far
        if self.squarehead:
            assert self.teacher.states is not None, "squarehead: its teacher was built without hidden states"
            loss = loss + self.squarehead * self.teacher.states.loss(seen, batch, rows)
        return loss


def top_k_distribution(logits: Float[Tensor, "scored vocab"], *, temperature: float) -> TopKDistribution:
    """The likeliest tokens and their log shares, and that of the rest, which is at least one token."""
    tokens = logits.topk(min(TOP, logits.shape[1] - 1), dim=1).indices
    return TopKDistribution(tokens, log_probs(logits, tokens, temperature=temperature))


def log_probs(
    logits: Float[Tensor, "scored vocab"], tokens: Int[Tensor, "scored top"], *, temperature: float
) -> Float[Tensor, "scored top+1"]:
    """Of softmax(logits / temperature): the log shares of `tokens`, and of all others together."""
    cooled = logits / temperature
    whole = cooled.logsumexp(1, keepdim=True)
    # summed over the others, not 1 minus the sum: exact however little is left
    rest = cooled.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([cooled.gather(1, tokens), rest], dim=1) - whole


def kl_divergence(
    kept: TopKDistribution, logits: Float[Tensor, "scored vocab"], *, temperature: float
) -> Float[Tensor, " scored"]:
    """KL(teacher || student) in nats, times temperature squared, which keeps gradients as large as at 1."""
    student = log_probs(logits, kept.tokens, temperature=temperature)
    return (kept.log_shares.exp() * (kept.log_shares - student)).sum(1) * temperature**2


def store_of(teacher: LanguageModel, sha256: str, documents: Sequence[Document], *, temperature: float) -> Store:
    """Keeps what a teacher with these weights says of the documents.

    At one temperature: the share of all tokens that are not kept one by one cannot be had at another.
    """
    facts = cache_key(teacher, sha256, documents) | {
        "kind": "distributions of a teacher",
        "top": distillation.TOP,
        "temperature": temperature,
    }
    scored = sum(len(document.tokens) - document.context_tokens for document in documents)
    return partial(_kept, facts, scored * (2 * distillation.TOP + 1) * 4)


def _kept(facts: Mapping[str, Any], size: int, run: Callable[[], TopKDistribution]) -> TopKDistribution:
    def write(scratch: Path, _manifest: dict[str, Any]) -> None:
        found = run()
        save_file({"tokens": found.tokens, "log_shares": found.log_shares}, scratch / FILE)

    return cached(
        facts, size=size, write=write, read=lambda folder: TopKDistribution(**load_file(folder / FILE)), otherwise=run
    )
