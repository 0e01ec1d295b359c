"""Layouts of columns as examples, and the rows that are refused."""

from collections import Counter

import pytest
from data_files import CANONICAL, count_examples, example_rows, load_file, row_error, write_json_lines, write_table

from mopcompress.data.splits import Example
from mopcompress.errors import DataError


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
def test_every_known_layout_becomes_the_same_example(tmp_path, form):
    rename = {"question": "instruction", "answer": "output"} if "question" in form else {}
    question = next(column for column in ("question", "instruction", "prompt") if column in form)
    path = write_json_lines(tmp_path / "rows.jsonl", [form, *({**form, question: f"{n}"} for n in range(5))])
    assert count_examples(load_file(path, **rename))[Example(**CANONICAL)] == 1


def test_prompt_and_completion_need_neither_task_nor_input(tmp_path):
    values = [{"prompt": f"{n}?", "completion": "yes"} for n in range(5)]
    assert count_examples(load_file(write_json_lines(tmp_path / "rows.jsonl", values))) == Counter(
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
    splits = load_file(write_json_lines(tmp_path / "rows.jsonl", [{"messages": messages}, *example_rows(5)]))
    assert count_examples(splits)[Example("all", instruction, "", output)] == 1


def test_messages_are_read_from_parquet_with_their_category(tmp_path):
    values = [
        {
            "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}],
            "category": "closed",
        }
        for n in range(5)
    ]
    assert Example("closed", "0?", "", "yes") in count_examples(
        load_file(write_table(tmp_path / "rows.parquet", values))
    )


def test_wrong_messages_are_refused(tmp_path):
    def message(*messages: object) -> str:
        return row_error(tmp_path, {"messages": list(messages)})

    question = {"role": "user", "content": "Why?"}
    assert "needs an assistant message with another before it" in message(question)
    assert "needs an assistant message with another before it" in message({"role": "assistant", "content": "So."})
    assert "must be a list of objects" in message("Why?")
    assert "must be a list of objects" in message({"role": "user"})
    assert "message 2 is null" in message(question, {"role": "assistant", "content": None})


def test_a_missing_column_is_named_with_how_to_map_it(tmp_path):
    message = row_error(tmp_path, {"instructions": "Add.", "answer": "3"})
    assert "rows.jsonl: line 2: no column for the instruction; the columns are 'instructions', 'answer'" in message
    assert "--columns instructions=instruction" in message
    assert "--columns COLUMN=output" in row_error(tmp_path, {"instruction": "Add.", "zzz": "3"})
    assert "the columns are none" in row_error(tmp_path, {})


def test_a_renamed_column_must_exist(tmp_path):
    path = write_json_lines(tmp_path / "rows.jsonl", [{"question": "Why?", "output": "So."}])
    with pytest.raises(DataError, match=r"line 1: no column 'qestion' \(from --columns\).*did you mean 'question'\?"):
        load_file(path, qestion="instruction")


def test_an_unknown_field_is_refused_before_data_are_read():
    with pytest.raises(DataError, match="there is no field 'instuction'; did you mean 'instruction'"):
        load_file("absent.jsonl", question="instuction")
    with pytest.raises(DataError, match="'output' is named twice"):
        load_file("absent.jsonl", answer="output", reply="output")


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
    assert claim in row_error(tmp_path, {**CANONICAL, **change})


def test_an_input_alone_is_enough(tmp_path):
    splits = load_file(write_json_lines(tmp_path / "rows.jsonl", [{**CANONICAL, "instruction": ""}, *example_rows(5)]))
    assert count_examples(splits)[Example("adding", "", "1 2", "3")] == 1
