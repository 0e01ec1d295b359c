"""The negative log-likelihood of response tokens, in nats: one function for the training loss and the metric."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mopcompress.evaluation.hidden_states import ResponseBatch
from mopcompress.models.language_model import LanguageModel


@dataclass(frozen=True)
class TokenScores:
    """An entry per scored token, in the order of `ResponseBatch.target`."""

    nll: Float[Tensor, " scored"]  # negative log-likelihood in nats, given everything before the token
    greedy: Bool[Tensor, " scored"]  # True where the token is the most likely one


def score_responses(model: LanguageModel, batch: ResponseBatch, layer: int) -> TokenScores:
    """Run the blocks from `layer` on, and score the response tokens. The head sees no other position."""
    return token_scores(response_logits(model, batch, layer), batch)


def response_logits(model: LanguageModel, batch: ResponseBatch, layer: int) -> Float[Tensor, "scored vocab"]:
    """Run the blocks from `layer` on, and the head at each position that predicts a response token."""
    hidden = model.run_upper(batch.hidden, layer)
    return model.logits(hidden[batch.example, batch.position])


def token_scores(logits: Float[Tensor, "scored vocab"], batch: ResponseBatch) -> TokenScores:
    """Score the response tokens of a batch by their logits."""
    return TokenScores(token_nll(logits, batch), logits.argmax(-1) == batch.target)


def token_nll(logits: Float[Tensor, "scored vocab"], batch: ResponseBatch) -> Float[Tensor, " scored"]:
    """Return the negative log-likelihood of each response token, in nats."""
    return torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
