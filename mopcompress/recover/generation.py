"""Text from a model and its adapter, through the network's own `generate`.

The gate reads each instruction once, by itself and unpadded, before the first token; then its weights stand.
"""

import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import GenerationConfig

from mopcompress.data.encoding import encode
from mopcompress.data.splits import Example
from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import Adapter
from mopcompress.states import Instructions


def generate(
    model: LanguageModel,
    adapter: Adapter | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
) -> list[str]:
    """The greedy answer to each instruction, without special tokens and outer white space.

    An answer ends with the turn, or after `max_new_tokens`. Without an adapter it is the stock model's. Raises
    `DataError` when an instruction and its answer do not fit the model's context.
    """
    if not prompts:
        return []
    contexts, ends = _contexts(model, prompts)
    _check_fits(model, contexts, max_new_tokens)
    longest = max(map(len, contexts))
    padding = model.tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if padding is None else padding,
    )
    # padding stands on the left, where the mask hides it: all answers begin in one column
    tokens = [[settings.pad_token_id] * (longest - len(context)) + [*context] for context in contexts]
    mask = [[0] * (longest - len(context)) + [1] * len(context) for context in contexts]
    with torch.inference_mode():
        applied = adapter.compiled(model)(_instructions(model, contexts, adapter.layer)) if adapter else nullcontext()
        with applied:
            written = model.network.generate(
                input_ids=torch.tensor(tokens, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=settings,
            )
    answers = [itertools.takewhile(lambda token: token not in ends, row[longest:]) for row in written.tolist()]
    return [str(model.tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]


def _contexts(model: LanguageModel, prompts: Sequence[str]) -> tuple[list[tuple[int, ...]], set[int]]:
    """The prompts as they are encoded for training and evaluation, and the tokens that end an answer."""
    # what comes before a response does not depend on the response
    rows = [Example(task="", instruction=prompt, input="", output="x") for prompt in prompts]
    documents = encode(rows, model.tokenizer, max_length=sys.maxsize).documents
    stock = model.network.generation_config.eos_token_id
    ends = {stock} if isinstance(stock, int) else set(stock or ())
    return (
        [document.tokens[: document.context_tokens] for document in documents],
        ends | {document.tokens[-1] for document in documents},
    )


def _instructions(model: LanguageModel, contexts: Sequence[tuple[int, ...]], layer: int) -> Instructions:
    """What the adapter reads of the prompts: their own tokens' states that enter `layer`."""
    states = [model.enter(torch.tensor([context], device=model.device), layer)[0] for context in contexts]
    return Instructions(
        hidden=torch.nn.utils.rnn.pad_sequence(states, batch_first=True),
        tokens=torch.tensor([len(context) for context in contexts], device=model.device),
        summary=torch.stack([one.mean(0) for one in states]),
    )


def _check_fits(model: LanguageModel, contexts: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
    longest, limit = max(map(len, contexts)), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed the model's context of {limit} "
            "tokens; shorten the prompt or ask for fewer"
        )
