"""How likely continuations of contexts are, and what a model goes on with: what evaluation harnesses ask for.

A recovered model reads the context alone, never what it is asked the likelihood of.
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
    """Of one continuation, given everything before each of its tokens."""

    log_likelihood: float  # natural, summed over its tokens
    greedy: bool  # each of them is the most likely one


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_size: int, longest: int
) -> list[Likelihood]:
    """One entry a pair. Contexts lose their beginning where a pair is longer than `longest` tokens.

    Raises `DataError` when a continuation leaves its context no token.
    """
    scores: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda place: sum(map(len, pairs[place])))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        some = [_shortened(pairs[place], longest) for place in places]
        for place, score in zip(places, _scores(model, some), strict=True):
            scores[place] = score
    return [score for score in scores if score is not None]


def _scores(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[Likelihood]:
    # padding stands on the left, so that what is scored stands together at the end, where alone the head has to look
    tokens, mask = left_padded([[*context, *rest][:-1] for context, rest in pairs], 0, model.device)
    inputs: dict[str, Any] = {"logits_to_keep": max(1, *(len(rest) for _, rest in pairs))}
    if isinstance(model, MopForCausalLM):
        scored = torch.tensor([max(0, len(rest) - 1) for _, rest in pairs], device=model.device)
        before = torch.arange(tokens.shape[1], device=model.device) < tokens.shape[1] - scored[:, None]
        inputs["instruction_mask"] = mask & before
    logits = model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions(mask), **inputs).logits
    scores = []
    for row, (_, rest) in zip(logits, pairs, strict=True):
        said = row[len(row) - len(rest) :].float().log_softmax(-1)
        target = torch.tensor(rest, dtype=torch.long, device=model.device)
        log_likelihood = said.gather(1, target[:, None]).cpu().double().sum()
        scores.append(Likelihood(float(log_likelihood), bool((said.argmax(-1) == target).all())))
    return scores


@torch.inference_mode()
def write_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    longest: int,
    **settings: Any,
) -> list[str]:
    """What the model writes after each context, up to the first of the texts in `until`; `settings` are generation's.

    Contexts lose their beginning where there would be no room for the answer.
    """
    room = longest - max_new_tokens
    if room < 1:
        raise DataError(f"{max_new_tokens} new tokens leave no room in a model of {longest}; ask for fewer")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens, mask = left_padded([context[-room:] for context in contexts], padding or 0, model.device)
    first = tokens.shape[1]

    def texts(written: Tensor) -> list[str]:
        return [str(text) for text in tokenizer.batch_decode(written[:, first:], skip_special_tokens=True)]

    def stopped(written: Tensor, _logits: object, **_settings: Any) -> Tensor:
        # transformers' own stop strings need a tokenizer whose tokens can be told apart in text
        found = [any(stop in text for stop in until) for text in texts(written)]
        return torch.tensor(found, device=written.device)

    asked = {"max_new_tokens": max_new_tokens, "pad_token_id": padding or 0, "do_sample": False, **settings}
    criteria = StoppingCriteriaList([stopped] if until else [])
    written = model.generate(input_ids=tokens, attention_mask=mask.long(), stopping_criteria=criteria, **asked)  # type: ignore[operator]
    return [_cut(text, until) for text in texts(written)]


def _shortened(pair: Pair, longest: int) -> Pair:
    context, rest = pair
    room = longest + 1 - len(rest)  # the last token is predicted, not read
    if room < 1 or not context:
        raise DataError(
            f"a continuation of {len(rest)} tokens after a context of {len(context)}: the model has {longest}, and at "
            "least one must be the context's; leave the text out"
        )
    return context[-room:], rest


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
