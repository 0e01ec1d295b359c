"""Examples as tokens: templates, ends of responses, lengths."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mopcompress.data.encoding import EncodedSplit, encode, template_name
from mopcompress.data.examples import Example, load_examples, subset
from mopcompress.errors import DataError

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<user>", "<assistant>", "<end>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(
    chat_template: str | None = CHAT, *, adds_bos: bool = True, **special: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that expectations are readable; plain text begins with BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<user>", "<assistant>", "<end>"], **special
    )
    wrapped.chat_template = chat_template
    return wrapped


def parts(split: EncodedSplit, tokenizer) -> tuple[str, str]:
    """Return the text of the context and of the response of the only document."""
    (document,) = split.documents
    tokens, context = list(document.tokens), document.context_tokens
    return tokenizer.decode(tokens[:context]), tokenizer.decode(tokens[context:])


ADD = Example("adding", "Add.", "1 2", "3")


# --- chat template


def test_the_prompt_ends_where_the_response_begins():
    tokenizer = byte_tokenizer()
    split = encode([ADD], tokenizer, max_length=100)
    assert parts(split, tokenizer) == ("<s><user>Add.\n\n1 2</s>\n<assistant>", "3</s>")
    assert split.documents[0].task == "adding"


def test_tokens_are_those_of_apply_chat_template():
    tokenizer = byte_tokenizer()
    user, assistant = {"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}
    (document,) = encode([ADD], tokenizer, max_length=100).documents
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=False)
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert list(document.tokens) == whole[:-1]  # without the line break after the turn
    assert list(document.tokens[: document.context_tokens]) == prompt


@pytest.mark.parametrize(("instruction", "given", "prompt"), [("Add.", "", "Add."), ("", "1 2", "1 2")])
def test_there_is_no_blank_line_without_two_parts(instruction, given, prompt):
    tokenizer = byte_tokenizer()
    split = encode([Example("t", instruction, given, "3")], tokenizer, max_length=100)
    assert parts(split, tokenizer)[0] == f"<s><user>{prompt}</s>\n<assistant>"


def test_the_response_does_not_change_the_context():
    tokenizer = byte_tokenizer()
    first, second = (
        encode([Example("t", "Add.", "1 2", output)], tokenizer, max_length=100).documents[0]
        for output in ("3", "three, I think")
    )
    assert first.tokens[: first.context_tokens] == second.tokens[: second.context_tokens]


def test_bos_is_not_doubled_by_a_tokenizer_that_adds_one_itself():
    tokenizer = byte_tokenizer()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # it does add one
    (document,) = encode([ADD], tokenizer, max_length=100).documents
    assert document.tokens.count(tokenizer.bos_token_id) == 1


def test_eos_is_put_where_the_template_has_no_end():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert parts(encode([ADD], tokenizer, max_length=100), tokenizer) == ("user:Add.\n\n1 2|assistant:", "3|</s>")


def test_an_end_of_turn_that_is_not_eos_ends_the_response():
    tokenizer = byte_tokenizer(CHAT.replace("</s>", "<end>"))
    assert parts(encode([ADD], tokenizer, max_length=100), tokenizer)[1] == "3<end>"


def test_an_end_inside_the_response_does_not_cut_it():
    tokenizer = byte_tokenizer()
    split = encode([Example("t", "Show.", "", "a</s>b <end> c")], tokenizer, max_length=100)
    assert parts(split, tokenizer)[1] == "a</s>b <end> c</s>"
    tokenizer = byte_tokenizer(CHAT.replace("</s>", "|"))
    split = encode([Example("t", "Show.", "", "a <end> b")], tokenizer, max_length=100)
    assert parts(split, tokenizer)[1] == "a <end> b|\n</s>"


def test_an_unknown_token_does_not_end_a_response():
    tokenizer = byte_tokenizer(None)
    split = encode([Example("t", "Show.", "", "a<unk>")], tokenizer, max_length=100)
    assert parts(split, tokenizer)[1] == " a<unk></s>"


def test_white_space_around_an_output_is_removed():
    tokenizer = byte_tokenizer()
    assert encode([Example("adding", "Add.", "1 2", "\n 3 \n")], tokenizer, max_length=100) == encode(
        [ADD], tokenizer, max_length=100
    )


def test_a_template_that_rewrites_the_prompt_is_refused_by_name():
    tokenizer = byte_tokenizer("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.name_or_path = "tiny"
    with pytest.raises(
        DataError,
        match=r"row 1 \('Add\.'\): the chat template of 'tiny' does not .*they differ from token 0 of 10",
    ):
        encode([ADD], tokenizer, max_length=100)


def test_a_conversation_that_ends_within_the_prompt_is_refused():
    tokenizer = byte_tokenizer("{{ messages[0].content }}{% if add_generation_prompt %}<assistant>{% endif %}")
    with pytest.raises(DataError, match="they differ from token 9 of 10"):
        encode([ADD], tokenizer, max_length=100)


@pytest.mark.parametrize("end", ["", "{% if messages | length > 1 %}</s>{% endif %}"])
def test_a_template_that_leaves_no_response_is_refused(end):
    tokenizer = byte_tokenizer("{{ messages[0].content }}" + end)
    with pytest.raises(DataError, match="leaves no response token"):
        encode([ADD], tokenizer, max_length=100)


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "{% for %}", "{{ 1 + 'a' }}"])
def test_a_template_that_fails_is_refused(template):
    with pytest.raises(DataError, match=r"row 1 \('Add\.'\): the chat template of .* fails"):
        encode([ADD], byte_tokenizer(template), max_length=100)


def test_a_tokenizer_without_eos_is_refused_when_it_is_needed():
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        encode([ADD], tokenizer, max_length=100)


# --- plain template


def test_the_plain_template_is_as_documented():
    tokenizer = byte_tokenizer(None)
    split = encode([ADD], tokenizer, max_length=100)
    assert parts(split, tokenizer) == ("<s>Add.\n1 2\nAnswer:", " 3</s>")
    assert parts(encode([Example("t", "Go.", "", "I go")], tokenizer, max_length=100), tokenizer) == (
        "<s>Go.\nAnswer:",
        " I go</s>",
    )


def test_bos_is_first_only_if_the_tokenizer_adds_it():
    without = byte_tokenizer(None, adds_bos=False)
    assert parts(encode([ADD], without, max_length=100), without)[0] == "Add.\n1 2\nAnswer:"
    tokenizer = byte_tokenizer(None)
    split = encode([Example("t", "<s>Go.", "", "I go")], tokenizer, max_length=100)
    assert parts(split, tokenizer)[0] == "<s>Go.\nAnswer:"


def test_stories_tokens_are_those_of_the_whole_text(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    (document,) = encode([Example("t", "Tell.", "Tom", "Once upon a time")], tokenizer, max_length=100).documents
    assert list(document.tokens) == [*tokenizer("Tell.\nTom\nAnswer: Once upon a time")["input_ids"], 2]
    assert tokenizer.decode(list(document.tokens[document.context_tokens :])) == "Once upon a time</s>"
    assert document.tokens[0] == tokenizer.bos_token_id


def test_the_template_is_named():
    assert template_name(byte_tokenizer()) == "chat template"
    assert template_name(byte_tokenizer(None)) == "plain template"


# --- lengths


def test_longer_rows_are_dropped_and_counted():
    tokenizer = byte_tokenizer()
    rows = [Example("t", "x" * n, "", "ok") for n in (5, 9, 1, 20)]
    exact = len(encode(rows[:1], tokenizer, max_length=100).documents[0].tokens)
    split = encode(rows, tokenizer, max_length=exact)
    assert split.dropped == 2
    assert split.documents == (
        *encode(rows[:1], tokenizer, max_length=exact).documents,
        *encode(rows[2:3], tokenizer, max_length=exact).documents,
    )


def test_a_response_over_the_limit_is_refused_with_its_row():
    tokenizer = byte_tokenizer()
    rows = [ADD, Example("t", "Count.", "", "x" * 30)]
    with pytest.raises(
        DataError, match=r"row 2 \('Count\.'\): the response alone has 31 tokens .* 30; raise --max-length"
    ):
        encode(rows, tokenizer, max_length=30)
    assert encode(rows, tokenizer, max_length=31).dropped == 1


def test_a_response_over_the_limit_is_refused_with_its_line(tmp_path):
    rows = [{"instruction": f"Count to {n}.", "output": "x" * (30 if n == 2 else 3)} for n in range(1, 10)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = load_examples(str(path), rename={}, seed=0)
    shuffled = subset((*splits.train, *splits.validation, *splits.test), 9, seed=3)
    assert shuffled[1].instruction != "Count to 2."
    with pytest.raises(DataError) as caught:
        encode(shuffled, byte_tokenizer(), max_length=30)
    assert str(caught.value).startswith(f"{path}: line 2: the response alone has 31 tokens")


def test_a_failing_template_is_refused_with_the_file_and_line():
    placed = Example("t", "Add.", "1 2", "3", where="data.jsonl: line 2")
    with pytest.raises(DataError, match=r"^data\.jsonl: line 2: the chat template of .* fails"):
        encode([placed], byte_tokenizer("{{ raise_exception('no users') }}"), max_length=100)


def test_a_split_of_which_nothing_fits_is_refused():
    tokenizer = byte_tokenizer()
    length = len(encode([ADD], tokenizer, max_length=100).documents[0].tokens)
    with pytest.raises(DataError, match=rf"all 2 rows are longer than 10 tokens \(the shortest has {length}\)"):
        encode([ADD, Example("t", "Add these numbers.", "1 2", "3")], tokenizer, max_length=10)


def test_no_rows_give_no_documents():
    assert encode([], byte_tokenizer(), max_length=10) == EncodedSplit((), 0)
