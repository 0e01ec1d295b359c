import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mopcompress.data.examples import Example, Splits, load_examples, subset
from mopcompress.data.splits import assemble, divide
from mopcompress.errors import DataError, InputNotFoundError, UnavailableError

CANONICAL = {"task": "adding", "instruction": "Add.", "input": "1 2", "output": "3"}


def rows(count: int) -> list[dict[str, str]]:
    return [{"task": f"task {n % 3}", "instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(count)]


def examples(count: int) -> tuple[Example, ...]:
    return tuple(Example(**row) for row in rows(count))


def write_lines(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def write(path: Path, values: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        return write_lines(path, values)
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


def load(path: Path | str, **rename: str) -> Splits:
    return load_examples(str(path), rename=rename, seed=0)


def all_of(splits: Splits) -> Counter[Example]:
    return Counter((*splits.train, *splits.validation, *splits.test))


def one_row_error(folder: Path, row: object, **rename: str) -> str:
    """The message when line 2 of an otherwise good file is `row`."""
    good, *others = [{**CANONICAL, "instruction": f"Add {n}."} for n in range(4)]
    with pytest.raises(DataError) as caught:
        load(write_lines(folder / "rows.jsonl", [good, row, *others]), **rename)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- one file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_splits(tmp_path, suffix):
    values = [{**row, "output": 'a, "b"\nc é \u2028'} for row in rows(30)]
    splits = load(write(tmp_path / f"rows{suffix}", values))
    expected = load(write_lines(tmp_path / "expected.jsonl", values))
    assert splits.sha256 == expected.sha256
    assert all_of(splits) == Counter(Example(**row) for row in values)


def test_a_json_file_may_hold_lines(tmp_path):
    assert all_of(load(write_lines(tmp_path / "rows.json", rows(10)))) == Counter(examples(10))


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = [{**row, "output": "a\u2028b\x85c"} for row in rows(5)]
    path.write_bytes("\r\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode())
    assert all_of(load(path)) == Counter(Example(**value) for value in values)


def test_a_single_file_is_divided_80_10_10(tmp_path):
    splits = load(write_lines(tmp_path / "rows.jsonl", rows(100)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (80, 10, 10)
    assert splits.name == "rows.jsonl"
    assert splits.composed == ()


def test_no_prompt_and_no_long_input_stands_in_two_parts():
    passage = "A long passage about something. " * 10
    twice = [Example("t", f"Say {n // 3}.", "", f"{n}") for n in range(60)]
    asked = [Example("t", f"Ask {n}.", f"{n // 4}: {passage}", "yes") for n in range(60)]
    parts = divide([*twice, *asked], (8, 1, 1), seed=1, name="")
    assert sum(map(len, parts)) == 120
    for prompt in (lambda row: (row.instruction, row.input), lambda row: row.input or row.instruction):
        seen = [{prompt(row) for row in part} for part in parts]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_the_division_depends_on_seed_and_content_not_on_position():
    forwards = divide(examples(50), (8, 1, 1), seed=3, name="")
    backwards = divide(examples(50)[::-1], (8, 1, 1), seed=3, name="")
    assert [part[::-1] for part in backwards] == forwards
    assert divide(examples(50), (8, 1, 1), seed=4, name="") != forwards
    assert list(forwards[0]) == [row for row in examples(50) if row in forwards[0]]  # the order of rows is kept


def test_three_prompts_are_just_enough(tmp_path):
    splits = load(write_lines(tmp_path / "rows.jsonl", rows(3)))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1, 1, 1)
    with pytest.raises(DataError, match=r"2 distinct prompt\(s\) cannot be divided into 3"):
        load(write_lines(tmp_path / "rows.jsonl", rows(2) * 20))


# --- a folder


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_a_folder_is_taken_as_it_is(tmp_path, validation):
    write(tmp_path / "train.jsonl", rows(9)[:5])
    write(tmp_path / f"{validation}.csv", rows(9)[5:7])
    write(tmp_path / "test.parquet", rows(9)[7:])
    (tmp_path / "README.md").write_text("not data")
    splits = load(tmp_path)
    assert (splits.train, splits.validation, splits.test) == (examples(9)[:5], examples(9)[5:7], examples(9)[7:])
    assert splits.name == tmp_path.name


def test_a_missing_validation_split_is_a_tenth_of_train_and_test_is_untouched(tmp_path):
    write(tmp_path / "train.jsonl", rows(54)[:50])
    write(tmp_path / "test.jsonl", rows(54)[50:])
    splits = load(tmp_path)
    assert splits.test == examples(54)[50:]
    assert (len(splits.train), len(splits.validation)) == (45, 5)
    assert Counter((*splits.train, *splits.validation)) == Counter(examples(50))


def test_a_folder_with_one_split_is_divided_like_a_file(tmp_path):
    write(tmp_path / "train.jsonl", rows(40))
    assert load(tmp_path).sha256 == load(tmp_path / "train.jsonl").sha256


def test_overlap_of_given_splits_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "validation.jsonl", rows(7)[5:])
    write(tmp_path / "test.jsonl", [rows(9)[8], {**rows(5)[2], "output": "something else"}])
    with pytest.raises(DataError, match=r"1 of 2 prompts of test also stand in train \(the first is row 2 of test\)"):
        load(tmp_path)


def test_an_ambiguous_or_useless_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="needs files called train, validation and test"):
        load(tmp_path)
    write(tmp_path / "validation.jsonl", rows(2))
    write(tmp_path / "test.jsonl", rows(2))
    with pytest.raises(DataError, match=r"found test\.jsonl, validation\.jsonl"):
        load(tmp_path)
    write(tmp_path / "dev.csv", rows(2))
    with pytest.raises(DataError, match=r"dev\.csv and validation\.jsonl are both the validation split"):
        load(tmp_path)


# --- the built-in data and the hub


def test_skills_are_built_in_and_have_no_columns(monkeypatch):
    parts = {"train": examples(3)[:1], "validation": examples(3)[1:2], "test": examples(3)[2:]}
    monkeypatch.setattr("mopcompress.data.skills.generate", lambda seed: assemble(f"skills of {seed}", **parts))
    assert load_examples("skills", rename={}, seed=7) == assemble("skills of 7", **parts)
    with pytest.raises(DataError, match="no columns to rename"):
        load("skills", question="instruction")


def hub_of(monkeypatch, **splits: list[dict]):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_is_read_by_id_and_configuration(monkeypatch):
    asked = hub_of(monkeypatch, train=rows(9)[:5], dev=rows(9)[5:7], test=rows(9)[7:], extra=rows(1))
    splits = load("somebody/something:small")
    assert asked == [("somebody/something", "small")]
    assert (splits.train, splits.validation, splits.test) == (examples(9)[:5], examples(9)[5:7], examples(9)[7:])
    assert splits.name == "somebody/something:small"


def test_dolly_as_it_is_on_the_hub(monkeypatch):
    dolly = [
        {"instruction": f"What is {n}?", "context": "", "response": "No.", "category": "open_qa"} for n in range(20)
    ]
    asked = hub_of(monkeypatch, train=dolly)
    splits = load("databricks/databricks-dolly-15k")
    assert asked == [("databricks/databricks-dolly-15k", None)]
    assert len(splits.train) == 16
    assert {row.task for row in splits.test} == {"open_qa"}


def test_super_natural_instructions_as_they_are_on_the_hub(tmp_path, monkeypatch):
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
        write_lines(tmp_path / "somebody" / folder / f"{task}_{folder}.jsonl", lines)
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, **more: load_dataset(str(tmp_path / "somebody"), **more))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = load("somebody/natural-instructions:*/task023_*, */task033_*")
    assert splits.name == "somebody/natural-instructions"
    assert len(all_of(splits)) == 40
    assert {row.task for row in all_of(splits)} == {"task023_ask", "task033_fill"}
    assert splits.train[0].instruction == "Do it."
    assert splits.train[0].where.startswith("somebody/natural-instructions: train row ")


def test_unfit_hub_splits_are_refused(monkeypatch):
    hub_of(monkeypatch, small=rows(5), large=rows(5))
    with pytest.raises(DataError, match="no split is called train; the splits are small, large"):
        load("somebody/something")
    hub_of(monkeypatch, train=[{**CANONICAL, "output": ""}])
    with pytest.raises(DataError, match="somebody/something: train row 1: the response is empty"):
        load("somebody/something")
    hub_of(monkeypatch, train=[])
    with pytest.raises(DataError, match="split train holds no rows"):
        load("somebody/something")


@pytest.mark.parametrize(
    "error", [ConnectionError("off\nline"), FileNotFoundError(), ValueError("Config name missing")]
)
def test_an_unreachable_hub_says_what_to_do(monkeypatch, error):
    def load_dataset(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UnavailableError, match=r"^somebody/nothing: .*give its path$") as caught:
        load("somebody/nothing")
    assert "\n" not in str(caught.value)


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    hub_of(monkeypatch, train=rows(50))
    (tmp_path / "somebody" / "something").mkdir(parents=True)
    write(tmp_path / "somebody" / "something" / "train.jsonl", rows(10))
    monkeypatch.chdir(tmp_path)
    assert len(all_of(load("somebody/something"))) == 10


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows", "a/b/c", "folder/rows.parquet"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    asked = hub_of(monkeypatch, train=rows(50))
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        load(name)
    assert asked == []


def test_a_mistyped_path_gets_its_neighbour_suggested(tmp_path):
    write_lines(tmp_path / "questions.jsonl", rows(5))
    with pytest.raises(InputNotFoundError, match=r"did you mean '.*questions\.jsonl'\?"):
        load(tmp_path / "question.jsonl")


# --- columns


@pytest.mark.parametrize(
    "form",
    [
        CANONICAL,
        {"category": "adding", "instruction": "Add.", "context": "1 2", "response": "3"},
        {"task": "adding", "prompt": "Add.", "input": "1 2", "completion": "3"},
        {**CANONICAL, "prompt": "not this", "context": "not this", "response": "not this", "category": "not this"},
        {"category": "adding", "question": "Add.", "input": "1 2", "answer": "3", "instruction": "not this"},
    ],
)
def test_every_form_is_mapped(tmp_path, form):
    rename = {"question": "instruction", "answer": "output"} if "question" in form else {}
    asked = next(column for column in ("question", "instruction", "prompt") if column in form)
    path = write_lines(tmp_path / "rows.jsonl", [form, *({**form, asked: f"{n}"} for n in range(5))])
    assert all_of(load(path, **rename))[Example(**CANONICAL)] == 1


def test_prompt_and_completion_need_neither_task_nor_input(tmp_path):
    values = [{"prompt": f"{n}?", "completion": "yes"} for n in range(5)]
    assert all_of(load(write_lines(tmp_path / "rows.jsonl", values))) == Counter(
        Example("all", f"{n}?", "", "yes") for n in range(5)
    )


@pytest.mark.parametrize(
    ("roles", "instruction", "output"),
    [
        ("user assistant", "m0", "m1"),
        ("system user assistant", "m0\n\nm1", "m2"),
        ("user assistant user assistant", "user: m0\n\nassistant: m1\n\nuser: m2", "m3"),
        ("user assistant user", "m0", "m1"),
    ],
)
def test_the_last_assistant_message_is_the_output(tmp_path, roles, instruction, output):
    messages = [{"role": role, "content": f"m{n}"} for n, role in enumerate(roles.split())]
    splits = load(write_lines(tmp_path / "rows.jsonl", [{"messages": messages}, *rows(5)]))
    assert all_of(splits)[Example("all", instruction, "", output)] == 1


def test_messages_are_read_from_parquet_with_their_category(tmp_path):
    values = [
        {
            "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}],
            "category": "closed",
        }
        for n in range(5)
    ]
    assert Example("closed", "0?", "", "yes") in all_of(load(write(tmp_path / "rows.parquet", values)))


def test_wrong_messages_are_refused(tmp_path):
    def message(*messages: object) -> str:
        return one_row_error(tmp_path, {"messages": list(messages)})

    asked = {"role": "user", "content": "Why?"}
    assert "needs an assistant message with another before it" in message(asked)
    assert "needs an assistant message with another before it" in message({"role": "assistant", "content": "So."})
    assert "must be a list of objects" in message("Why?")
    assert "must be a list of objects" in message({"role": "user"})
    assert "message 2 is null" in message(asked, {"role": "assistant", "content": None})


def test_a_missing_column_is_named_with_what_is_there_and_how_to_map_it(tmp_path):
    message = one_row_error(tmp_path, {"instructions": "Add.", "answer": "3"})
    assert "rows.jsonl: line 2: no column for the instruction; the columns are 'instructions', 'answer'" in message
    assert "--map instructions=instruction" in message
    assert "--map COLUMN=output" in one_row_error(tmp_path, {"instruction": "Add.", "zzz": "3"})
    assert "the columns are none" in one_row_error(tmp_path, {})


def test_a_renamed_column_must_be_there(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "Why?", "output": "So."}])
    with pytest.raises(DataError, match=r"line 1: no column 'qestion' \(from --map\).*did you mean 'question'\?"):
        load(path, qestion="instruction")


def test_an_unknown_rename_target_is_refused_before_any_data_are_read():
    with pytest.raises(DataError, match="there is no field 'instuction'; did you mean 'instruction'"):
        load("absent.jsonl", question="instuction")
    with pytest.raises(DataError, match="'output' is named twice"):
        load("absent.jsonl", answer="output", reply="output")


# --- what is refused


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"output": " \n"}, "line 2: the response is empty"),
        ({"instruction": "", "input": " "}, "line 2: the instruction is empty"),
        ({"output": None}, "line 2: 'output' is null, not text"),
        ({"input": None}, "line 2: 'input' is null, not text"),
        ({"task": 3}, "line 2: 'task' is of type int, not text"),
        ({"output": ["3"]}, "line 2: 'output' is nested, not text"),
        ({"instruction": {"text": "Add."}}, "line 2: 'instruction' is nested, not text"),
        ({"output": "\ud800"}, "line 2: 'output' has a lone surrogate at character 1"),
    ],
)
def test_a_bad_field_is_refused_with_its_line(tmp_path, change, claim):
    assert claim in one_row_error(tmp_path, {**CANONICAL, **change})


def test_an_input_alone_is_an_instruction_enough(tmp_path):
    splits = load(write_lines(tmp_path / "rows.jsonl", [{**CANONICAL, "instruction": ""}, *rows(5)]))
    assert all_of(splits)[Example("adding", "", "1 2", "3")] == 1


@pytest.mark.parametrize("line", ['{"task": "cut', "not json", "[" * 100_000])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(CANONICAL)}\n\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: line 3 is not JSON"):
        load(path)


def test_a_row_must_be_an_object(tmp_path):
    assert "line 2 is a list, not an object" in one_row_error(tmp_path, ["Add.", "3"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="the file holds no rows"):
        load(tmp_path / name)


def test_a_csv_of_a_header_alone_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    with pytest.raises(DataError, match="the file holds no rows"):
        load(tmp_path / "rows.csv")


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
        load(tmp_path / "rows.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_what_is_not_utf8_is_refused_with_its_line(tmp_path, name):
    (tmp_path / name).write_bytes('instruction,output\nEins,"Grüße"\n'.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        load(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_column_name(tmp_path):
    path = write(tmp_path / "rows.csv", rows(5))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert all_of(load(path)) == Counter(examples(5))


def test_a_truncated_json_or_parquet_is_refused(tmp_path):
    for suffix, claim in ((".json", "not JSON"), (".parquet", "not a whole Parquet file")):
        path = write(tmp_path / f"rows{suffix}", rows(20))
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match=claim) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read '\.gz' files as rows"):
        load(tmp_path / "rows.jsonl.gz")


# --- hash and subset


def test_the_hash_is_of_the_content_of_all_splits_and_not_of_the_name():
    parts = {"train": examples(4)[:2], "validation": examples(4)[2:3], "test": examples(4)[3:]}
    digest = assemble("one", **parts).sha256
    assert digest == assemble("other", **parts).sha256
    assert len(digest) == 64
    for name in parts:
        assert digest != assemble("one", **{**parts, name: (*parts[name], *examples(1))}).sha256
    assert digest != assemble("one", **{**parts, "train": parts["train"][::-1]}).sha256
    assert digest != assemble("one", **parts, composed=examples(1)).sha256


def test_the_place_of_a_row_is_no_part_of_its_content():
    plain = examples(30)
    placed = tuple(replace(row, where=f"rows.jsonl: line {n}") for n, row in enumerate(plain, start=1))
    assert placed == plain
    assert list(map(hash, placed)) == list(map(hash, plain))
    digests = [assemble("", train=rows, validation=(), test=()).sha256 for rows in (placed, plain)]
    assert digests[0] == digests[1]
    assert subset(placed, 9, seed=1) == subset(plain, 9, seed=1)
    assert divide(placed, (8, 1, 1), seed=1, name="") == divide(plain, (8, 1, 1), seed=1, name="")


def test_the_hash_of_written_rows_is_that_of_their_four_texts():
    parts = [[["t", "Ask.", "", "é"]], [], [], []]
    canonical = json.dumps(parts, separators=(",", ":"))
    splits = assemble("", train=[Example("t", "Ask.", "", "é", where="a: line 1")], validation=(), test=())
    assert splits.sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_rows_know_their_place_and_generated_ones_have_none(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", rows(20))
    places = {row.output: row.where for row in all_of(load(path))}
    assert places == {f"{n}": f"{path}: line {n + 1}" for n in range(20)}
    assert {row.where for row in load("skills").test} == {""}


def test_a_larger_subset_extends_a_smaller_one():
    everything = subset(examples(20), 20, seed=5)
    assert Counter(everything) == Counter(examples(20))
    for count in range(20):
        assert subset(examples(20), count, seed=5) == everything[:count]


def test_a_subset_is_balanced_over_unequal_tasks():
    uneven = tuple(Example("rare" if n < 3 else "common", f"{n}", "", "x") for n in range(30))
    assert Counter(row.task for row in subset(uneven, 6, seed=0)) == {"rare": 3, "common": 3}
    assert Counter(row.task for row in subset(uneven, 10, seed=0)) == {"rare": 3, "common": 7}


def test_a_subset_depends_on_seed_and_content_not_on_position():
    chosen = subset(examples(30), 9, seed=1)
    assert subset(examples(30)[::-1], 9, seed=1) == chosen
    assert set(subset(examples(30), 9, seed=2)) != set(chosen)


def test_no_count_keeps_everything_in_order():
    assert subset(examples(7), None, seed=1) == examples(7)
