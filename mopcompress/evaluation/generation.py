"""Greedy answers to instructions through transformers' own `generate`, of a stock network or a recovered model."""

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
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the greedy answer to each instruction, without special tokens and outer white space.

    An answer ends with the turn, or after `max_new_tokens`. With a single instruction, `on_text` receives its answer
    in pieces as they are generated. Raises `DataError` when an instruction and its answer exceed the model's context.
    """
    if not prompts:
        return []
    contexts, end_tokens = encode_prompts(model, tokenizer, prompts)
    check_fits(model, contexts, max_new_tokens)
    return generate_from_contexts(
        model, tokenizer, contexts, end_tokens, max_new_tokens=max_new_tokens, use_cache=use_cache, on_text=on_text
    )


def generate_from_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int]],
    end_tokens: Set[int],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the answers to encoded prompts, as `generate` does. An answer stops before the first of `end_tokens`."""
    padding = tokenizer.pad_token_id
    # settings that are absent here would come from the model's own generation_config.json
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=use_cache,
        eos_token_id=sorted(end_tokens),
        pad_token_id=min(end_tokens) if padding is None else padding,
    )
    # padding stands on the left, where the mask hides it: all answers begin in one column
    tokens, mask = left_padded(contexts, settings.pad_token_id, model.device)
    with torch.inference_mode():
        generated = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=mask.long(),
            generation_config=settings,
            streamer=None if on_text is None else _TextStreamer(tokenizer, on_text),
        )
    new_tokens = [row[tokens.shape[1] :] for row in generated.tolist()]
    answers = [itertools.takewhile(lambda token: token not in end_tokens, row) for row in new_tokens]
    return [str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip() for answer in answers]


class _TextStreamer(TextStreamer):
    """Passes whole words to a function, without white space before the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.has_text = on_text, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on the new `text`, which may be empty at the end."""
        text = text if self.has_text else text.lstrip()
        self.has_text = self.has_text or bool(text)
        if text:
            self.on_text(text)


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[tuple[int, ...]], set[int]]:
    """Return the prompts as training and evaluation encode them, and the tokens that end an answer."""
    # the tokens before a response do not depend on the response
    rows = [Example(task="", instruction=prompt, input="", output="x") for prompt in prompts]
    documents = encode(rows, tokenizer, max_length=sys.maxsize).documents
    configured = model.generation_config.eos_token_id
    end_tokens = {configured} if isinstance(configured, int) else set(configured or ())
    return (
        [document.tokens[: document.context_tokens] for document in documents],
        end_tokens | {document.tokens[-1] for document in documents},
    )


def check_fits(model: PreTrainedModel, contexts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `DataError` when the longest context and its answer have more tokens than the model's context."""
    longest = max(map(len, contexts))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            f"a prompt of {longest} tokens and an answer of {max_new_tokens} exceed the model's context of {limit} "
            "tokens; shorten the prompt or ask for fewer new tokens"
        )
