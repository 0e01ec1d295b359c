"""Answers to instructions, through transformers' own `generate`, from a stock network or a recovered model."""

import itertools
import sys
from collections.abc import Callable, Sequence, Set

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mopcompress.data.encoding import encode
from mopcompress.data.splits import Example
from mopcompress.errors import DataError
from mopcompress.evaluation.batching import left_padded


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    told: Callable[[str], None] | None = None,
) -> list[str]:
    """The greedy answer to each instruction, without special tokens and outer white space.

    An answer ends with the turn, or after `max_new_tokens`. `told` hears the answer to a single instruction in pieces,
    as it comes. Raises `DataError` when an instruction and its answer do not fit the model's context.
    """
    if not prompts:
        return []
    contexts, ends = contexts_of(model, tokenizer, prompts)
    check_fits(model, contexts, max_new_tokens)
    return answer_contexts(
        model, tokenizer, contexts, ends, max_new_tokens=max_new_tokens, use_cache=use_cache, told=told
    )


def answer_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int]],
    ends: Set[int],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    told: Callable[[str], None] | None = None,
) -> list[str]:
    """The same for encoded prompts; an answer stops before the first token of `ends`."""
    padding = tokenizer.pad_token_id
    # what is not said here, a checkpoint's own generation_config.json decides
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=use_cache,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if padding is None else padding,
    )
    # padding stands on the left, where the mask hides it: all answers begin in one column
    tokens, real = left_padded(contexts, settings.pad_token_id, model.device)
    with torch.inference_mode():
        written = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=real.long(),
            generation_config=settings,
            streamer=None if told is None else _TextStreamer(tokenizer, told),
        )
    answers = [itertools.takewhile(lambda token: token not in ends, row[tokens.shape[1] :]) for row in written.tolist()]
    return [str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]


class _TextStreamer(TextStreamer):
    """Gives whole words to a function, without the white space before the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.told, self.begun = told, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """`text` is what is new; the last may be empty."""
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        if text:
            self.told(text)


def contexts_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[tuple[int, ...]], set[int]]:
    """The prompts as they are encoded for training and evaluation, and the tokens that end an answer."""
    # what comes before a response does not depend on the response
    rows = [Example(task="", instruction=prompt, input="", output="x") for prompt in prompts]
    documents = encode(rows, tokenizer, max_length=sys.maxsize).documents
    stock = model.generation_config.eos_token_id
    ends = {stock} if isinstance(stock, int) else set(stock or ())
    return (
        [document.tokens[: document.context_tokens] for document in documents],
        ends | {document.tokens[-1] for document in documents},
    )


def check_fits(model: PreTrainedModel, contexts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `DataError` when a context and its answer are longer than what the model takes."""
    longest = max(map(len, contexts))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            f"a prompt of {longest} tokens and an answer of {max_new_tokens} exceed the model's context of {limit} "
            "tokens; shorten the prompt or ask for fewer new tokens"
        )
