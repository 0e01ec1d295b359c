"""Whole data sets by their name."""

import datasets
import pytest
from data_files import count_examples, example_rows, fake_hub, load_file, make_examples, write_json_lines, write_table

from mopcompress.data.examples import load_examples
from mopcompress.data.splits import assemble
from mopcompress.errors import DataError


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_a_folder_with_three_splits_is_not_divided(tmp_path, validation):
    write_table(tmp_path / "train.jsonl", example_rows(9)[:5])
    write_table(tmp_path / f"{validation}.csv", example_rows(9)[5:7])
    write_table(tmp_path / "test.parquet", example_rows(9)[7:])
    (tmp_path / "README.md").write_text("not data")
    splits = load_file(tmp_path)
    assert (splits.train, splits.validation, splits.test) == (
        make_examples(9)[:5],
        make_examples(9)[5:7],
        make_examples(9)[7:],
    )
    assert splits.name == tmp_path.name


def test_a_folder_with_one_split_is_divided_like_a_file(tmp_path):
    write_table(tmp_path / "train.jsonl", example_rows(40))
    assert load_file(tmp_path).sha256 == load_file(tmp_path / "train.jsonl").sha256


def test_skills_are_built_in_and_have_no_columns(monkeypatch):
    parts = {"train": make_examples(3)[:1], "validation": make_examples(3)[1:2], "test": make_examples(3)[2:]}
    monkeypatch.setattr("mopcompress.data.skills.generate", lambda seed: assemble(f"skills of {seed}", **parts))
    assert load_examples("skills", rename={}, seed=7) == assemble("skills of 7", **parts)
    with pytest.raises(DataError, match="no columns to rename"):
        load_file("skills", question="instruction")


def test_dolly_is_read_as_it_is_on_the_hub(monkeypatch):
    dolly = [
        {"instruction": f"What is {n}?", "context": "", "response": "No.", "category": "open_qa"} for n in range(20)
    ]
    calls = fake_hub(monkeypatch, train=dolly)
    splits = load_file("databricks/databricks-dolly-15k")
    assert calls == [("databricks/databricks-dolly-15k", None)]
    assert len(splits.train) == 16
    assert {row.task for row in splits.test} == {"open_qa"}


def test_super_natural_instructions_are_read_from_the_hub(tmp_path, monkeypatch):
    """File patterns choose tasks out of hundreds; the chosen files are one split, which is divided here."""
    for folder, task in (("train", "task023_ask"), ("test", "task033_fill"), ("train", "task999_other")):
        lines = [
            {
                "task_name": task,
                "id": f"{task}-{n}",
                "definition": "Do it.",
                "inputs": f"{task} {n}",
                "targets": "Done.",
            }
            for n in range(20)
        ]
        (tmp_path / "somebody" / folder).mkdir(parents=True, exist_ok=True)
        write_json_lines(tmp_path / "somebody" / folder / f"{task}_{folder}.jsonl", lines)
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, **more: load_dataset(str(tmp_path / "somebody"), **more))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = load_file("somebody/natural-instructions:*/task023_*, */task033_*")
    assert splits.name == "somebody/natural-instructions"
    assert len(count_examples(splits)) == 40
    assert {row.task for row in count_examples(splits)} == {"task023_ask", "task033_fill"}
    assert splits.train[0].instruction == "Do it."
    assert splits.train[0].where.startswith("somebody/natural-instructions: train row ")


def test_rows_know_their_origin_and_generated_rows_have_none(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", example_rows(20))
    places = {row.output: row.where for row in count_examples(load_file(path))}
    assert places == {f"{n}": f"{path}: line {n + 1}" for n in range(20)}
    assert {row.where for row in load_file("skills").test} == {""}
