"""Files of rows, and a stand-in for the hub, for the tests of data."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mopcompress.data.examples import load_examples
from mopcompress.data.splits import Example, Splits
from mopcompress.errors import DataError

CANONICAL = {"task": "adding", "instruction": "Add.", "input": "1 2", "output": "3"}


def example_rows(count: int) -> list[dict[str, str]]:
    """Return rows of three tasks by turns."""
    return [{"task": f"task {n % 3}", "instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(count)]


def make_examples(count: int) -> tuple[Example, ...]:
    return tuple(Example(**row) for row in example_rows(count))


def write_json_lines(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def write_table(path: Path, values: list[dict]) -> Path:
    """Write rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        return write_json_lines(path, values)
    if path.suffix == ".json":
        path.write_text(json.dumps(values), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, values[0])
            writer.writeheader()
            writer.writerows(values)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    return path


def load_file(path: Path | str, **rename: str) -> Splits:
    return load_examples(str(path), rename=rename, seed=0)


def count_examples(splits: Splits) -> Counter[Example]:
    return Counter((*splits.train, *splits.validation, *splits.test))


def row_error(folder: Path, row: object, **rename: str) -> str:
    """Return the message of a file whose line 2 is `row` and whose other lines are good."""
    good, *others = [{**CANONICAL, "instruction": f"Add {n}."} for n in range(4)]
    with pytest.raises(DataError) as caught:
        load_file(write_json_lines(folder / "rows.jsonl", [good, row, *others]), **rename)
    message = str(caught.value)
    assert "\n" not in message
    return message


def fake_hub(monkeypatch, **splits: list[dict]):
    """Let the hub have these splits under every name, and return the list of its calls."""
    calls = []

    def load_dataset(*arguments):
        calls.append(arguments)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls
