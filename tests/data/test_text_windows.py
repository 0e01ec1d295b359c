"""Windows of tokens, and the texts that they are cut from."""

import json

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from mopcompress.data.encoding import Document
from mopcompress.data.text_windows import document_windows, read_text, text_windows
from mopcompress.errors import DataError, InputNotFoundError, UnavailableError

STORY = "Once upon a time there was a little girl named Lily. She loved to play with her ball in the park.\n\n"


@pytest.fixture(scope="module")
def stories(stories):
    return AutoTokenizer.from_pretrained(stories)


def test_windows_are_the_text_in_order_without_special_tokens(stories):
    tokens = stories(STORY * 4, add_special_tokens=False)["input_ids"]
    windows = text_windows(STORY * 4, stories, samples=5, length=7)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [tokens[7 * n : 7 * n + 7] for n in range(5)]
    assert stories.bos_token_id not in windows


def test_windows_do_not_depend_on_how_much_text_follows(stories):
    varied = " ".join(f"{word}{n}" for n in range(500) for word in STORY.split())
    whole = stories(varied, add_special_tokens=False)["input_ids"]
    for samples in (1, 3, 20):
        windows = text_windows(varied, stories, samples=samples, length=10)
        assert windows.flatten().tolist() == whole[: 10 * samples]


def test_a_text_of_many_tokens_is_read_to_its_end(stories, monkeypatch):
    monkeypatch.setattr("mopcompress.data.text_windows.CHARACTERS_PER_TOKEN", 1)
    whole = stories(STORY * 4, add_special_tokens=False)["input_ids"]
    windows = text_windows(STORY * 4, stories, samples=10, length=8)
    assert windows.flatten().tolist() == whole[:80]


def test_exactly_enough_text_is_enough(stories):
    count = len(stories(STORY, add_special_tokens=False)["input_ids"])
    assert text_windows(STORY, stories, samples=1, length=count).shape == (1, count)
    with pytest.raises(DataError, match=rf"has 0 window\(s\) of {count + 1} tokens \({count} tokens\), 1 are needed"):
        text_windows(STORY, stories, samples=1, length=count + 1)


def test_document_windows_join_prompts_and_responses():
    documents = [Document("t", tuple(range(10 * n, 10 * n + 5)), 3) for n in range(4)]
    tokens = [token for document in documents for token in document.tokens]
    assert document_windows(documents, samples=3, length=6).tolist() == [tokens[:6], tokens[6:12], tokens[12:18]]
    assert document_windows(documents, samples=1, length=20).tolist() == [tokens]
    with pytest.raises(DataError, match=r"has 3 window\(s\) of 6 tokens \(20 tokens\), 4 are needed"):
        document_windows(documents, samples=4, length=6)


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("é\r\n\n\u2028x \n".encode())
    assert read_text(str(path)) == "é\r\n\n\u2028x \n"


def test_texts_of_a_table_are_joined_by_blank_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "", "two\n")))
    assert read_text(str(path)) == "one\n\n\n\ntwo\n"


def test_a_hub_data_set_gives_its_train_split(monkeypatch):
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        parts = {"test": ["no"], "train": ["one", "two"]}
        return datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("somebody/wikitext:raw") == "one\n\ntwo"
    assert calls == [("somebody/wikitext", "raw")]


@pytest.mark.parametrize(
    ("parts", "claim"),
    [
        ({"a": ["x"], "b": ["y"]}, "no split is called train; the splits are a, b"),
        ({"a": [" "]}, "there is no text in it"),
        ({}, "no split is called train"),
    ],
)
def test_unfit_hub_data_are_refused(monkeypatch, parts, claim):
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    with pytest.raises(DataError, match=claim):
        read_text("somebody/something")


def test_missing_texts_are_refused_with_advice(tmp_path, monkeypatch):
    def load_dataset(*_):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UnavailableError, match=r"somebody/wikitext: .*\(offline\).*give its path"):
        read_text("somebody/wikitext")
    with pytest.raises(InputNotFoundError, match="no such file"):
        read_text(str(tmp_path / "absent.txt"))


def test_unfit_files_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"content": "y"}\n')
    with pytest.raises(DataError, match=r"line 2: no string in a column 'text'; the columns are content"):
        read_text(str(tmp_path / "rows.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="there is no text in it"):
        read_text(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("x\nGrüße".encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_text(str(tmp_path / "latin.txt"))
    with pytest.raises(DataError, match="cannot read '' files"):
        read_text(str(tmp_path))
