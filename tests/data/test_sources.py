"""Rows from files, folders and the hub, and the files that are refused."""

import json
from collections import Counter

import datasets
import pytest
from data_files import (
    CANONICAL,
    count_examples,
    example_rows,
    fake_hub,
    load_file,
    make_examples,
    row_error,
    write_json_lines,
    write_table,
)

from mopcompress.data.splits import Example
from mopcompress.errors import DataError, InputNotFoundError, UnavailableError


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_splits(tmp_path, suffix):
    values = [{**row, "output": 'a, "b"\nc é \u2028'} for row in example_rows(30)]
    splits = load_file(write_table(tmp_path / f"rows{suffix}", values))
    expected = load_file(write_json_lines(tmp_path / "expected.jsonl", values))
    assert splits.sha256 == expected.sha256
    assert count_examples(splits) == Counter(Example(**row) for row in values)


def test_a_json_file_may_hold_lines(tmp_path):
    assert count_examples(load_file(write_json_lines(tmp_path / "rows.json", example_rows(10)))) == Counter(
        make_examples(10)
    )


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = [{**row, "output": "a\u2028b\x85c"} for row in example_rows(5)]
    path.write_bytes("\r\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode())
    assert count_examples(load_file(path)) == Counter(Example(**value) for value in values)


def test_an_ambiguous_or_useless_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="needs files called train, validation and test"):
        load_file(tmp_path)
    write_table(tmp_path / "validation.jsonl", example_rows(2))
    write_table(tmp_path / "test.jsonl", example_rows(2))
    with pytest.raises(DataError, match=r"found test\.jsonl, validation\.jsonl"):
        load_file(tmp_path)
    write_table(tmp_path / "dev.csv", example_rows(2))
    with pytest.raises(DataError, match=r"dev\.csv and validation\.jsonl are both the validation split"):
        load_file(tmp_path)


def test_a_hub_data_set_is_read_by_id_and_configuration(monkeypatch):
    calls = fake_hub(
        monkeypatch,
        train=example_rows(9)[:5],
        dev=example_rows(9)[5:7],
        test=example_rows(9)[7:],
        extra=example_rows(1),
    )
    splits = load_file("somebody/something:small")
    assert calls == [("somebody/something", "small")]
    assert (splits.train, splits.validation, splits.test) == (
        make_examples(9)[:5],
        make_examples(9)[5:7],
        make_examples(9)[7:],
    )
    assert splits.name == "somebody/something:small"


def test_unfit_hub_splits_are_refused(monkeypatch):
    fake_hub(monkeypatch, small=example_rows(5), large=example_rows(5))
    with pytest.raises(DataError, match="no split is called train; the splits are small, large"):
        load_file("somebody/something")
    fake_hub(monkeypatch, train=[{**CANONICAL, "output": ""}])
    with pytest.raises(DataError, match="somebody/something: train row 1: the response is empty"):
        load_file("somebody/something")
    fake_hub(monkeypatch, train=[])
    with pytest.raises(DataError, match="split train holds no rows"):
        load_file("somebody/something")


@pytest.mark.parametrize(
    "error", [ConnectionError("off\nline"), FileNotFoundError(), ValueError("Config name missing")]
)
def test_an_unreachable_hub_says_what_to_do(monkeypatch, error):
    def load_dataset(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UnavailableError, match=r"^somebody/nothing: .*give its path$") as caught:
        load_file("somebody/nothing")
    assert "\n" not in str(caught.value)


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    fake_hub(monkeypatch, train=example_rows(50))
    (tmp_path / "somebody" / "something").mkdir(parents=True)
    write_table(tmp_path / "somebody" / "something" / "train.jsonl", example_rows(10))
    monkeypatch.chdir(tmp_path)
    assert len(count_examples(load_file("somebody/something"))) == 10


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows", "a/b/c", "folder/rows.parquet"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    calls = fake_hub(monkeypatch, train=example_rows(50))
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        load_file(name)
    assert calls == []


def test_a_mistyped_path_gets_the_nearest_name_suggested(tmp_path):
    write_json_lines(tmp_path / "questions.jsonl", example_rows(5))
    with pytest.raises(InputNotFoundError, match=r"did you mean '.*questions\.jsonl'\?"):
        load_file(tmp_path / "question.jsonl")


@pytest.mark.parametrize("line", ['{"task": "cut', "not json", "[" * 100_000])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(CANONICAL)}\n\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: line 3 is not JSON"):
        load_file(path)


def test_a_row_must_be_an_object(tmp_path):
    assert "line 2 is a list, not an object" in row_error(tmp_path, ["Add.", "3"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="the file holds no rows"):
        load_file(tmp_path / name)


def test_a_csv_with_only_a_header_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    with pytest.raises(DataError, match="the file holds no rows"):
        load_file(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("content", "claim"),
    [
        ("instruction,output\nAdd.,3\nAdd.,3,4\n", "line 3 has 3 cells, the header has 2"),
        ('instruction,output\n"two\nlines",3\nAdd.\n', "line 4 has 1 cells, the header has 2"),
        ('instruction,output\n"two\nlines",3,4\n', "line 2 has 3 cells, the header has 2"),
        ('"two\nlines",output\nAdd.\n', "line 3 has 1 cells, the header has 2"),
        ('instruction,output\nAdd.,"3\n', "is not CSV"),
        ("instruction,output,output\nAdd.,3,4\n", "line 1 names the column 'output' twice"),
        ("instruction;output\nAdd.;3\n", "line 2: no column for the instruction; the columns are 'instruction;output'"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(tmp_path, content, claim):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=claim):
        load_file(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, name):
    (tmp_path / name).write_bytes('instruction,output\nEins,"Grüße"\n'.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        load_file(tmp_path / name)


def test_a_byte_order_mark_is_not_part_of_a_column_name(tmp_path):
    path = write_table(tmp_path / "rows.csv", example_rows(5))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert count_examples(load_file(path)) == Counter(make_examples(5))


def test_a_truncated_json_or_parquet_is_refused(tmp_path):
    for suffix, claim in ((".json", "not JSON"), (".parquet", "not a whole Parquet file")):
        path = write_table(tmp_path / f"rows{suffix}", example_rows(20))
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match=claim) as caught:
            load_file(path)
        assert "\n" not in str(caught.value)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read '\.gz' files as rows"):
        load_file(tmp_path / "rows.jsonl.gz")
