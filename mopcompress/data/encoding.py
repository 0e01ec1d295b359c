"""Examples -> tokens, with the prompt and the response kept apart.

With a chat template the prompt is the user's turn (instruction, blank line, input) and the opening of the assistant's;
the response is the rest, up to and with the token that ends the turn. A tokenizer without one gets the plain template

    {instruction}
    {input}
    Answer: {output}

without the second line when there is no input, after BOS if the tokenizer puts one. There the space after the colon
belongs to the response, as byte-pair tokenizers want it. White space around an output is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mopcompress.data.splits import Example
from mopcompress.errors import DataError


@dataclass(frozen=True)
class Document:
    """One document. `tokens[context_tokens:]` is the response; that of an instruction ends with EOS or its turn."""

    task: str
    tokens: tuple[int, ...]
    context_tokens: int


@dataclass(frozen=True)
class EncodedSplit:
    """The documents that fit, in their order, and how many did not."""

    documents: tuple[Document, ...]
    dropped: int


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How prompts are written, for the report."""
    return "chat template" if tokenizer.chat_template else "plain template"


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> EncodedSplit:
    """Documents of at most `max_length` tokens; longer ones are dropped and counted.

    Raises `DataError` when a response alone is longer, when the template fails or does not keep the prompt as the
    beginning of the conversation (each named by the example's `where`, or by its number here if that is empty), and
    when nothing is left of a split that had rows.
    """
    if not examples:
        return EncodedSplit((), 0)
    places = [
        example.where or f"row {number} ({(example.instruction or example.input)[:40]!r})"
        for number, example in enumerate(examples, start=1)
    ]
    texts = [_texts(example, tokenizer, where) for example, where in zip(examples, places, strict=True)]
    prompts = _tokens([prompt for prompt, _ in texts], tokenizer)
    conversations = _tokens([conversation for _, conversation in texts], tokenizer)
    ends = _end_tokens(tokenizer)
    documents = []
    for example, where, context, tokens in zip(examples, places, prompts, conversations, strict=True):
        _check_prefix(context, tokens, tokenizer, where)
        response = _ended(tokens[len(context) :], ends, tokenizer, where)
        if len(response) > max_length:
            raise DataError(
                f"{where}: the response alone has {len(response)} tokens and the limit is {max_length}; "
                "raise --max-length or shorten the response"
            )
        documents.append(Document(example.task, (*context, *response), len(context)))
    kept = tuple(document for document in documents if len(document.tokens) <= max_length)
    if not kept:
        shortest = min(len(document.tokens) for document in documents)
        raise DataError(
            f"all {len(documents)} rows are longer than {max_length} tokens (the shortest has {shortest}); "
            "raise --max-length"
        )
    return EncodedSplit(kept, len(documents) - len(kept))


def _texts(example: Example, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """The prompt, and the whole conversation."""
    asked = [part for part in (example.instruction, example.input) if part]
    answer = example.output.strip()
    if not tokenizer.chat_template:
        prompt = "\n".join([*asked, "Answer:"])
        return prompt, f"{prompt} {answer}"
    user = {"role": "user", "content": "\n\n".join(asked)}
    assistant = {"role": "assistant", "content": answer}
    try:
        opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        conversation = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {_template_of(tokenizer)} fails ({error}); mend it, or use a tokenizer with another"
        ) from error
    return str(opened), str(conversation)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the {template_name(tokenizer)} of '{tokenizer.name_or_path or type(tokenizer).__name__}'"


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # A chat template writes its own BOS; for plain text it is the tokenizer's habit that counts.
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or tokenizer("a")["input_ids"][0] != bos:
        return tokens
    return [row if row[:1] == [bos] else [bos, *row] for row in tokens]


def _check_prefix(context: list[int], tokens: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if tokens[: len(context)] != context:
        same = next((i for i, pair in enumerate(zip(context, tokens, strict=False)) if pair[0] != pair[1]), len(tokens))
        raise DataError(
            f"{where}: {_template_of(tokenizer)} does not begin the conversation with the prompt (they part at token "
            f"{same} of {len(context)}); use one whose generation prompt opens the assistant's turn"
        )


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that may end a turn: EOS and every special token that has no other office."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return (special - others) | ({tokenizer.eos_token_id} - {None})


def _ended(response: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """The response up to its last end token, or with EOS put there if the template does not end the turn."""
    last = max((index for index, token in enumerate(response) if token in ends), default=None)
    if last is not None and not str(tokenizer.decode(response[last + 1 :])).strip():
        content, end = response[:last], response[last]
    else:
        content, end = response, tokenizer.eos_token_id
    if not content:
        raise DataError(f"{where}: {_template_of(tokenizer)} leaves no response token; mend the template or the row")
    if end is None:
        raise DataError(f"{where}: the tokenizer has no EOS token to end a response; set its eos_token")
    return [*content, end]
