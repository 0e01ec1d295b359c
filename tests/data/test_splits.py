"""Division, thinning and hashing of examples."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from data_files import example_rows, load_file, make_examples, write_json_lines, write_table

from mopcompress.data.splits import Example, assemble, divide, subset
from mopcompress.errors import DataError


def test_a_single_file_is_divided_80_10_10(tmp_path):
    splits = load_file(write_json_lines(tmp_path / "rows.jsonl", example_rows(100)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (80, 10, 10)
    assert splits.name == "rows.jsonl"
    assert splits.composed == ()


def test_no_prompt_and_no_long_input_is_in_two_parts():
    passage = "A long passage about something. " * 10
    twice = [Example("t", f"Say {n // 3}.", "", f"{n}") for n in range(60)]
    questions = [Example("t", f"Ask {n}.", f"{n // 4}: {passage}", "yes") for n in range(60)]
    parts = divide([*twice, *questions], (8, 1, 1), seed=1, name="")
    assert sum(map(len, parts)) == 120
    for prompt in (lambda row: (row.instruction, row.input), lambda row: row.input or row.instruction):
        seen = [{prompt(row) for row in part} for part in parts]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_the_division_depends_on_seed_and_content_alone():
    forwards = divide(make_examples(50), (8, 1, 1), seed=3, name="")
    backwards = divide(make_examples(50)[::-1], (8, 1, 1), seed=3, name="")
    assert [part[::-1] for part in backwards] == forwards
    assert divide(make_examples(50), (8, 1, 1), seed=4, name="") != forwards
    assert list(forwards[0]) == [row for row in make_examples(50) if row in forwards[0]]  # the order of rows is kept


def test_three_prompts_are_just_enough(tmp_path):
    splits = load_file(write_json_lines(tmp_path / "rows.jsonl", example_rows(3)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1, 1, 1)
    with pytest.raises(DataError, match=r"2 distinct prompt\(s\) cannot be divided into 3"):
        load_file(write_json_lines(tmp_path / "rows.jsonl", example_rows(2) * 20))


def test_a_missing_validation_split_is_a_tenth_of_train(tmp_path):
    write_table(tmp_path / "train.jsonl", example_rows(54)[:50])
    write_table(tmp_path / "test.jsonl", example_rows(54)[50:])
    splits = load_file(tmp_path)
    assert splits.test == make_examples(54)[50:]
    assert (len(splits.train), len(splits.validation)) == (45, 5)
    assert Counter((*splits.train, *splits.validation)) == Counter(make_examples(50))


def test_splits_that_share_prompts_are_refused(tmp_path):
    write_table(tmp_path / "train.jsonl", example_rows(5))
    write_table(tmp_path / "validation.jsonl", example_rows(7)[5:])
    write_table(tmp_path / "test.jsonl", [example_rows(9)[8], {**example_rows(5)[2], "output": "something else"}])
    with pytest.raises(DataError, match=r"1 of 2 prompts of test are in train too \(the first is row 2 of test\)"):
        load_file(tmp_path)


def test_the_hash_is_of_all_content_and_not_of_the_name():
    parts = {"train": make_examples(4)[:2], "validation": make_examples(4)[2:3], "test": make_examples(4)[3:]}
    digest = assemble("one", **parts).sha256
    assert digest == assemble("other", **parts).sha256
    assert len(digest) == 64
    for name in parts:
        assert digest != assemble("one", **{**parts, name: (*parts[name], *make_examples(1))}).sha256
    assert digest != assemble("one", **{**parts, "train": parts["train"][::-1]}).sha256
    assert digest != assemble("one", **parts, composed=make_examples(1)).sha256


def test_the_origin_of_a_row_is_not_part_of_its_content():
    plain = make_examples(30)
    placed = tuple(replace(row, where=f"rows.jsonl: line {n}") for n, row in enumerate(plain, start=1))
    assert placed == plain
    assert list(map(hash, placed)) == list(map(hash, plain))
    digests = [assemble("", train=rows, validation=(), test=()).sha256 for rows in (placed, plain)]
    assert digests[0] == digests[1]
    assert subset(placed, 9, seed=1) == subset(plain, 9, seed=1)
    assert divide(placed, (8, 1, 1), seed=1, name="") == divide(plain, (8, 1, 1), seed=1, name="")


def test_the_hash_is_that_of_the_four_texts_of_each_row():
    parts = [[["t", "Ask.", "", "é"]], [], [], []]
    canonical = json.dumps(parts, separators=(",", ":"))
    splits = assemble("", train=[Example("t", "Ask.", "", "é", where="a: line 1")], validation=(), test=())
    assert splits.sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_larger_subset_extends_a_smaller_one():
    everything = subset(make_examples(20), 20, seed=5)
    assert Counter(everything) == Counter(make_examples(20))
    for count in range(20):
        assert subset(make_examples(20), count, seed=5) == everything[:count]


def test_a_subset_is_balanced_over_unequal_tasks():
    uneven = tuple(Example("rare" if n < 3 else "common", f"{n}", "", "x") for n in range(30))
    assert Counter(row.task for row in subset(uneven, 6, seed=0)) == {"rare": 3, "common": 3}
    assert Counter(row.task for row in subset(uneven, 10, seed=0)) == {"rare": 3, "common": 7}


def test_a_subset_depends_on_seed_and_content_alone():
    chosen = subset(make_examples(30), 9, seed=1)
    assert subset(make_examples(30)[::-1], 9, seed=1) == chosen
    assert set(subset(make_examples(30), 9, seed=2)) != set(chosen)


def test_no_count_keeps_everything_in_order():
    assert subset(make_examples(7), None, seed=1) == make_examples(7)
