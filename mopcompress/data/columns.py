"""A row of somebody's data set -> an `Example`.

Known forms: `task, instruction, input, output`; Dolly's `category, instruction, context, response`; the hub's
Super-NaturalInstructions with `task_name, definition, inputs, targets`; `prompt, completion`; and `messages`, a list of
`{"role", "content"}`.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from mopcompress.data.sources import Row
from mopcompress.data.splits import Example
from mopcompress.errors import DataError

# Each field of an Example: the columns it may come from, the first that is there.
COLUMNS = {
    "task": ("task", "category", "task_name"),
    "instruction": ("instruction", "prompt", "definition"),
    "input": ("input", "context", "inputs"),
    "output": ("output", "response", "completion", "targets"),
}
TARGETS = (*COLUMNS, "messages")
NO_TASK = "all"


def check_rename(rename: Mapping[str, str]) -> None:
    """Raise `DataError` unless every target is one of ours, and named once."""
    for column, target in rename.items():
        if target not in TARGETS:
            near = get_close_matches(target, TARGETS, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(TARGETS)}"
            raise DataError(f"--map {column}={target}: there is no field '{target}'; {hint}")
        if list(rename.values()).count(target) > 1:
            raise DataError(f"--map {column}={target}: '{target}' is named twice; map one column to it")


def to_example(row: Row, rename: Mapping[str, str]) -> Example:
    """The example of one row. Raises `DataError` naming the row and the column that is missing or unfit."""
    for column in rename:
        if column not in row.fields:
            raise _missing(row, column, wanted=f"'{column}' (from --map)", candidates=(column,))
    renamed = {column: value for column, value in row.fields.items() if column not in rename.values()}
    fields = {rename.get(column, column): value for column, value in renamed.items()}
    here = Row(row.where, fields)
    if "messages" in fields and not any(name in fields for name in COLUMNS["instruction"]):
        instruction, output = _from_messages(here)
        text = {"instruction": instruction, "input": "", "output": output}
    else:
        text = {name: _text_of(here, name) for name in ("instruction", "input", "output")}
    if not (text["instruction"] + text["input"]).strip():
        raise DataError(f"{row.where}: the instruction is empty; fill it in or remove the row")
    if not text["output"].strip():
        raise DataError(f"{row.where}: the response is empty; fill it in or remove the row")
    return Example(task=_text_of(here, "task").strip() or NO_TASK, where=row.where, **text)


def _text_of(row: Row, name: str) -> str:
    column = next((column for column in COLUMNS[name] if column in row.fields), None)
    if column is not None:
        return _text(row, f"'{column}'", row.fields[column])
    if name in ("task", "input"):
        return ""
    raise _missing(row, name, wanted=f"for the {name}", candidates=COLUMNS[name])


def _missing(row: Row, name: str, *, wanted: str, candidates: Sequence[str]) -> DataError:
    there = list(row.fields)
    free = [column for column in there if not any(column in known for known in COLUMNS.values())]
    near = next((near[0] for word in candidates if (near := get_close_matches(word, free, n=1, cutoff=0.4))), None)
    if name not in COLUMNS:
        hint = f"did you mean '{near}'?" if near else "name a column that is there"
    else:
        hint = f"map one with --map {near or 'COLUMN'}={name}" + (", if that is it" if near else "")
    columns = ", ".join(f"'{column}'" for column in there) or "none"
    return DataError(f"{row.where}: no column {wanted}; the columns are {columns}; {hint}")


def _text(row: Row, what: str, value: object) -> str:
    if not isinstance(value, str):
        found = (
            "null"
            if value is None
            else "nested"
            if isinstance(value, list | dict)
            else f"of type {type(value).__name__}"
        )
        raise DataError(f"{row.where}: {what} is {found}, not text; write it as a string or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {what} has a lone surrogate at character {error.start + 1}, which is no text; remove it"
        ) from error
    return value


def _from_messages(row: Row) -> tuple[str, str]:
    """The last assistant message, and what was said before it; what follows it is no part of the row."""
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise DataError(f"{row.where}: 'messages' must be a list of objects with 'role' and 'content'")
    turns = [
        (
            _text(row, f"the role of message {number}", message["role"]),
            _text(row, f"message {number}", message["content"]),
        )
        for number, message in enumerate(messages, start=1)
    ]
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(f"{row.where}: 'messages' needs an assistant message with another before it; remove the row")
    before = turns[: answers[-1]]
    # In a longer conversation it must stay visible who said what.
    named = len(answers) > 1
    instruction = "\n\n".join(f"{role}: {content}" if named else content for role, content in before)
    return instruction, turns[answers[-1]][1]
