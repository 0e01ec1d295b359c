"""Examples -> tokens, with prompt and response apart.

With a chat template the prompt is the user's turn (instruction, blank line, input) and the opening of the assistant's
turn. The response is the rest, up to and including the token that ends the turn. A tokenizer without a chat template
gets the plain template

    {instruction}
    {input}
    Answer: {output}

without the second line when there is no input, and after BOS if the tokenizer adds one. The space after the colon
belongs to the response, because byte-pair tokenizers join a space to the next word. White space around an output is
removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mopcompress.data.splits import Example
from mopcompress.errors import DataError


@dataclass(frozen=True)
class Document:
    """An example, or a window of plain text, as token ids.

    `tokens[:context_tokens]` is the context (the prompt) and `tokens[context_tokens:]` the response. The response to an
    instruction ends with EOS or the token that ends the turn.
    """

    task: str
    tokens: tuple[int, ...]
    context_tokens: int


@dataclass(frozen=True)
class EncodedSplit:
    """Documents of at most `max_length` tokens, in the order of their examples; `dropped` counts longer examples."""

    documents: tuple[Document, ...]
    dropped: int


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the template of prompts, for the report."""
    return "chat template" if tokenizer.chat_template else "plain template"


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> EncodedSplit:
    """Encode examples as documents of at most `max_length` tokens; longer ones are dropped and counted.

    Raises `DataError` when a response alone is longer, when the template fails, when the conversation does not begin
    with the prompt, and when no row of a split that had rows is left. The message names the example by its `where`, or
    by its number when that is empty.
    """
    if not examples:
        return EncodedSplit((), 0)
    origins = [
        example.where or f"row {number} ({(example.instruction or example.input)[:40]!r})"
        for number, example in enumerate(examples, start=1)
    ]
    texts = [_render(example, tokenizer, where) for example, where in zip(examples, origins, strict=True)]
    prompts = _tokenize([prompt for prompt, _ in texts], tokenizer)
    conversations = _tokenize([conversation for _, conversation in texts], tokenizer)
    ends = _end_tokens(tokenizer)
    documents = []
    for example, where, context, tokens in zip(examples, origins, prompts, conversations, strict=True):
        _check_prefix(context, tokens, tokenizer, where)
        response = _end_response(tokens[len(context) :], ends, tokenizer, where)
        if len(response) > max_length:
            raise DataError(
                f"{where}: the response alone has {len(response)} tokens and the limit is {max_length}; "
                "raise --max-length or shorten the response"
            )
        documents.append(Document(example.task, (*context, *response), len(context)))
    fitting = tuple(document for document in documents if len(document.tokens) <= max_length)
    if not fitting:
        shortest = min(len(document.tokens) for document in documents)
        raise DataError(
            f"all {len(documents)} rows are longer than {max_length} tokens (the shortest has {shortest}); "
            "raise --max-length"
        )
    return EncodedSplit(fitting, len(documents) - len(fitting))


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """Return the prompt and the whole conversation as text."""
    parts = [part for part in (example.instruction, example.input) if part]
    answer = example.output.strip()
    if not tokenizer.chat_template:
        prompt = "\n".join([*parts, "Answer:"])
        return prompt, f"{prompt} {answer}"
    user = {"role": "user", "content": "\n\n".join(parts)}
    assistant = {"role": "assistant", "content": answer}
    try:
        opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        conversation = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {_template_label(tokenizer)} fails ({error}); correct it, or use a tokenizer with another"
        ) from error
    return str(opened), str(conversation)


def _template_label(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the {template_name(tokenizer)} of '{tokenizer.name_or_path or type(tokenizer).__name__}'"


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # a chat template writes its own BOS; for plain text the tokenizer decides
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or tokenizer("a")["input_ids"][0] != bos:
        return tokens
    return [ids if ids[:1] == [bos] else [bos, *ids] for ids in tokens]


def _check_prefix(context: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if tokens[: len(context)] != context:
        pairs = enumerate(zip(context, tokens, strict=False))
        first_difference = next((index for index, pair in pairs if pair[0] != pair[1]), len(tokens))
        raise DataError(
            f"{where}: {_template_label(tokenizer)} does not begin the conversation with the prompt (they differ from "
            f"token {first_difference} of {len(context)}); use one whose generation prompt opens the assistant's turn"
        )


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that may end a turn: EOS and every special token without another purpose."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return (special - others) | ({tokenizer.eos_token_id} - {None})


def _end_response(response: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Cut the response after its last end token, or add EOS if the template does not end the turn."""
    last = max((index for index, token in enumerate(response) if token in ends), default=None)
    if last is not None and not str(tokenizer.decode(response[last + 1 :])).strip():
        content, end = response[:last], response[last]
    else:
        content, end = response, tokenizer.eos_token_id
    if not content:
        raise DataError(
            f"{where}: {_template_label(tokenizer)} leaves no response token; correct the template or the row"
        )
    if end is None:
        raise DataError(f"{where}: the tokenizer has no EOS token to end a response; set its eos_token")
    return [*content, end]
