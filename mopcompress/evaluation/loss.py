"""One function is both the training loss and the metric: nats a response token."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.evaluation.hidden_states import ResponseBatch
from mopcompress.models.language_model import LanguageModel


@dataclass(frozen=True)
class TokenScores:
    """One entry a scored token."""

    nats: Float[Tensor, " scored"]  # negative log-likelihood given everything before the token
    greedy: Bool[Tensor, " scored"]  # it is the most likely token


def score_responses(model: LanguageModel, batch: ResponseBatch, layer: int) -> TokenScores:
    """Run the blocks from `layer` on, and score the response tokens. The head sees no other position."""
    return token_scores(response_logits(model, batch, layer), batch)


def response_logits(model: LanguageModel, batch: ResponseBatch, layer: int) -> Float[Tensor, "scored vocab"]:
    """What the blocks from `layer` on and the head say before each response token."""
    left = model.run_upper(batch.hidden, layer)
    return model.logits(left[batch.example, batch.position])


def token_scores(logits: Float[Tensor, "scored vocab"], batch: ResponseBatch) -> TokenScores:
    """The scores of response tokens whose logits are known."""
    return TokenScores(token_nll(logits, batch), logits.argmax(-1) == batch.target)


def token_nll(logits: Float[Tensor, "scored vocab"], batch: ResponseBatch) -> Float[Tensor, " scored"]:
    """The negative log-likelihood of each response token."""
    return torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
