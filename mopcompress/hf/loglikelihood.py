"""Likelihoods of given continuations, and generated continuations, as evaluation harnesses ask for them.

A recovered model reads the context alone, never the continuation that is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from mopcompress.errors import DataError
from mopcompress.evaluation.batching import left_padded, positions
from mopcompress.hf.model import MopForCausalLM

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, and of its continuation."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation, given everything before each of its tokens."""

    log_likelihood: float  # natural, summed over its tokens
    greedy: bool  # whether each of them is the most likely token


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int, max_length: int
) -> list[Likelihood]:
    """Return the likelihood of each pair's continuation.

    In pairs longer than `max_length` tokens the context loses its beginning. Raises `DataError` when a continuation
    leaves its context no token.
    """
    scores: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [_shortened(pairs[index], max_length) for index in indices]
        for index, score in zip(indices, _score_batch(model, batch), strict=True):
            scores[index] = score
    return [score for score in scores if score is not None]


def _score_batch(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Likelihood]:
    # padding is on the left, so that all scored positions are at the end, and the head runs on those alone
    tokens, mask = left_padded([[*context, *continuation][:-1] for context, continuation in pairs], 0, model.device)
    inputs: dict[str, Any] = {"logits_to_keep": max(1, *(len(continuation) for _, continuation in pairs))}
    if isinstance(model, MopForCausalLM):
        scored = torch.tensor([max(0, len(continuation) - 1) for _, continuation in pairs], device=model.device)
        in_context = torch.arange(tokens.shape[1], device=model.device) < tokens.shape[1] - scored[:, None]
        inputs["instruction_mask"] = mask & in_context
    logits = model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions(mask), **inputs).logits
    scores = []
    for row, (_, continuation) in zip(logits, pairs, strict=True):
        log_probs = row[len(row) - len(continuation) :].float().log_softmax(-1)
        target = torch.tensor(continuation, dtype=torch.long, device=model.device)
        log_likelihood = log_probs.gather(1, target[:, None]).cpu().double().sum()
        scores.append(Likelihood(float(log_likelihood), bool((log_probs.argmax(-1) == target).all())))
    return scores


@torch.inference_mode()
def generate_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    max_length: int,
    **settings: Any,
) -> list[str]:
    """Generate a continuation of each context, up to the first of the texts in `until`.

    `settings` are those of transformers' `generate`. Contexts lose their beginning if the answer needs the room. Raises
    `DataError` when the answer leaves no room for a context.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise DataError(f"{max_new_tokens} new tokens leave no room in a model of {max_length}; ask for fewer")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens, mask = left_padded([context[-room:] for context in contexts], padding or 0, model.device)
    prompt_tokens = tokens.shape[1]

    def decode(sequences: Tensor) -> list[str]:
        texts = tokenizer.batch_decode(sequences[:, prompt_tokens:], skip_special_tokens=True)
        return [str(text) for text in texts]

    def has_stopped(sequences: Tensor, _logits: object, **_settings: Any) -> Tensor:
        # transformers' own stop strings need a tokenizer whose tokens can be told apart in text
        stopped = [any(stop in text for stop in until) for text in decode(sequences)]
        return torch.tensor(stopped, device=sequences.device)

    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": padding or 0, "do_sample": False, **settings}
    criteria = StoppingCriteriaList([has_stopped] if until else [])
    sequences = model.generate(input_ids=tokens, attention_mask=mask.long(), stopping_criteria=criteria, **settings)  # type: ignore[operator]
    return [_cut(text, until) for text in decode(sequences)]


def _shortened(pair: Pair, max_length: int) -> Pair:
    context, continuation = pair
    room = max_length + 1 - len(continuation)  # the last token is predicted, not read
    if room < 1 or not context:
        raise DataError(
            f"a continuation of {len(continuation)} tokens after a context of {len(context)}: the model has "
            f"{max_length}, and at least one must be the context's; leave the text out"
        )
    return context[-room:], continuation


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((index for stop in until if (index := text.find(stop)) >= 0), default=len(text))]
