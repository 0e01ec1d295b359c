"""One function is both the training loss and the metric: nats a response token."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.models.language_model import LanguageModel
from mopcompress.states import Batch


@dataclass(frozen=True)
class TokenScores:
    """One entry a scored token."""

    nats: Float[Tensor, " scored"]  # negative log-likelihood given everything before the token
    greedy: Bool[Tensor, " scored"]  # it is the most likely token


def score_response(model: LanguageModel, left: Float[Tensor, "batch time hidden"], batch: Batch) -> TokenScores:
    """Score the response tokens of `batch` from the model's last hidden states. The head sees no other position."""
    logits = model.logits(left[batch.example, batch.position])
    nats = torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
    return TokenScores(nats, logits.argmax(-1) == batch.target)
