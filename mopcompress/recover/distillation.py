"""Distillation (Hinton et al., arXiv 1503.02531): the adapted model learns the dense model's distributions, not text.

A response token is one sample of what the dense model knows at its position. The whole distribution says more, which
pays most where there are few rows. The teacher runs once per training document. Of each distribution the `TOP`
likeliest tokens are stored, and all other tokens form one bucket (ours). Teacher and student are then distributions
over the same `TOP` + 1 outcomes, and a student that equals its teacher has a divergence of 0.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from mopcompress.recover.squarehead import TeacherStates, record_outputs
from mopcompress.storage.cache import cached

FILE = "distributions.safetensors"
TOP = 64  # tokens of a distribution that are stored


@dataclass(frozen=True)
class TopKDistribution:
    """The likeliest tokens of a teacher's distributions, an entry per scored token."""

    tokens: Int[Tensor, "scored top"]
    log_probs: Float[Tensor, "scored top+1"]  # of those tokens in nats, and of all others together


class Teacher:
    """The dense model's distributions over every response token of the training documents, at one temperature.

    They take half a gigabyte per million response tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Sequence[Document],
        *,
        temperature: float,
        batch_size: int,
        with_hidden_states: bool = False,
        weights_sha256: str | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Run the whole model on every document, or read its distributions from the user's cache.

        The cache is used when `weights_sha256` names the model's weights. Hidden states, if asked for, are too large
        for it: the model runs for them. `progress` receives the number of documents that are done.
        """
        self.temperature = temperature
        self._documents, self._batch_size, self._progress = documents, batch_size, progress
        self._scored = [len(document.tokens) - document.context_tokens for document in documents]
        self._ends = torch.tensor(self._scored).cumsum(0).tolist()
        self.hidden_states = TeacherStates(model, self._scored) if with_hidden_states else None
        if with_hidden_states or weights_sha256 is None:
            self._all = self._run(model)
        else:
            self._all = self._load_or_run(model, weights_sha256)

    def _load_or_run(self, model: LanguageModel, weights_sha256: str) -> TopKDistribution:
        key = cache_key(model, weights_sha256, self._documents) | {
            "kind": "distributions of a teacher",
            "top": TOP,
            # the probability of all tokens that are not stored cannot be computed at another temperature
            "temperature": self.temperature,
        }

        def write(scratch: Path, _manifest: dict[str, Any]) -> None:
            computed = self._run(model)
            save_file({"tokens": computed.tokens, "log_shares": computed.log_probs}, scratch / FILE)

        def read(folder: Path) -> TopKDistribution:
            tensors = load_file(folder / FILE)
            return TopKDistribution(tensors["tokens"], tensors["log_shares"])

        size = sum(self._scored) * (2 * TOP + 1) * 4
        return cached(key, size=size, write=write, read=read, compute=lambda: self._run(model))

    def _run(self, model: LanguageModel) -> TopKDistribution:
        by_row: dict[int, TopKDistribution] = {}
        states = HiddenStateDataset(model, self._documents, 0, batch_size=self._batch_size)
        for rows in batches_by_length(self._documents, self._batch_size, generator=None):
            batch = states.batch(rows)
            with torch.inference_mode(), record_outputs(model.blocks if self.hidden_states else ()) as outputs:
                hidden = model.run_upper(batch.hidden, 0)
                logits = model.logits(hidden[batch.example, batch.position])
                distributions = top_k_distribution(logits, temperature=self.temperature)
            if self.hidden_states is not None:
                self.hidden_states.record(rows, batch, outputs)
            for index, row in enumerate(rows):
                of_row = batch.example == index
                by_row[row] = TopKDistribution(
                    distributions.tokens[of_row].int().cpu(), distributions.log_probs[of_row].cpu()
                )
            self._progress(len(by_row))
        in_order = [by_row[row] for row in range(len(self._documents))]
        return TopKDistribution(
            torch.cat([distribution.tokens for distribution in in_order]),
            torch.cat([distribution.log_probs for distribution in in_order]),
        )

    def distributions(self, rows: Sequence[int], device: torch.device) -> TopKDistribution:
        """Return those of some documents, in the order in which a batch of them is scored."""
        slices = [slice(self._ends[row] - self._scored[row], self._ends[row]) for row in rows]
        tokens = torch.cat([self._all.tokens[of_row] for of_row in slices]).long()
        log_probs = torch.cat([self._all.log_probs[of_row] for of_row in slices])
        return TopKDistribution(tokens.to(device), log_probs.to(device))


@dataclass(frozen=True)
class Distillation:
    """A teacher, and its weight in the training loss.

    Hidden states need a teacher that was built with them.
    """

    teacher: Teacher
    fraction: float  # of the loss that is the divergence from the teacher; the rest is cross-entropy on the text
    squarehead_weight: float = 0.0  # of the loss on hidden states, which is added to both

    def record_outputs(self, model: LanguageModel, layer: int) -> AbstractContextManager[list[Tensor]]:
        """Record the outputs of the blocks from `layer` on inside the context, if the loss needs them."""
        return record_outputs(model.blocks[layer:] if self.squarehead_weight else ())

    def loss(
        self,
        nll: Float[Tensor, ""],
        logits: Float[Tensor, "scored vocab"],
        outputs: Sequence[Tensor],
        batch: ResponseBatch,
        rows: Sequence[int],
    ) -> Float[Tensor, ""]:
        """Mix the cross-entropy `nll` with the divergence from the teacher, and add the loss on hidden states.

        All are in nats per response token, but the loss on hidden states, which has no unit.
        """
        loss = nll
        if self.fraction:
            taught = self.teacher.distributions(rows, logits.device)
            divergence = kl_divergence(taught, logits, temperature=self.teacher.temperature).mean()
            loss = (1 - self.fraction) * nll + self.fraction * divergence
        if self.squarehead_weight:
            states = self.teacher.hidden_states
            assert states is not None, "squarehead: its teacher was built without hidden states"
            loss = loss + self.squarehead_weight * states.loss(outputs, batch, rows)
        return loss


def top_k_distribution(logits: Float[Tensor, "scored vocab"], *, temperature: float) -> TopKDistribution:
    """Return the `TOP` likeliest tokens with their log probabilities; at least one token stays in the bucket."""
    tokens = logits.topk(min(TOP, logits.shape[1] - 1), dim=1).indices
    return TopKDistribution(tokens, log_probs(logits, tokens, temperature=temperature))


def log_probs(
    logits: Float[Tensor, "scored vocab"], tokens: Int[Tensor, "scored top"], *, temperature: float
) -> Float[Tensor, "scored top+1"]:
    """Return log softmax(logits / temperature) of `tokens`, and last that of all other tokens together, in nats."""
    cooled = logits / temperature
    total = cooled.logsumexp(1, keepdim=True)
    # summed over the others, not 1 minus the sum: exact however small it is
    others = cooled.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([cooled.gather(1, tokens), others], dim=1) - total


def kl_divergence(
    teacher: TopKDistribution, logits: Float[Tensor, "scored vocab"], *, temperature: float
) -> Float[Tensor, " scored"]:
    """Return KL(teacher || student) in nats per token, times temperature squared.

    The factor keeps gradients as large as at temperature 1.
    """
    student = log_probs(logits, teacher.tokens, temperature=temperature)
    return (teacher.log_probs.exp() * (teacher.log_probs - student)).sum(1) * temperature**2
