"""A row of a data set -> an `Example`.

Known layouts of columns, with the optional ones in brackets:

    instruction, output, [input], [task]
    instruction, response, [context], [category]            Dolly
    definition, inputs, targets, [task_name]                Super-NaturalInstructions on the hub
    prompt, completion
    messages, [task]                                        a list of {"role", "content"}
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from mopcompress.data.sources import Row
from mopcompress.data.splits import Example
from mopcompress.errors import DataError

# field of an Example -> the columns that it may come from; the first one in the row counts
COLUMNS = {
    "task": ("task", "category", "task_name"),
    "instruction": ("instruction", "prompt", "definition"),
    "input": ("input", "context", "inputs"),
    "output": ("output", "response", "completion", "targets"),
}
TARGETS = (*COLUMNS, "messages")
NO_TASK = "all"


def check_rename(rename: Mapping[str, str]) -> None:
    """Raise `DataError` unless every target is a field of `Example` or `messages`, and is named once."""
    for column, target in rename.items():
        if target not in TARGETS:
            nearest = get_close_matches(target, TARGETS, n=1, cutoff=0.4)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"use one of {', '.join(TARGETS)}"
            raise DataError(f"--columns {column}={target}: there is no field '{target}'; {hint}")
        if list(rename.values()).count(target) > 1:
            raise DataError(f"--columns {column}={target}: '{target}' is named twice; map one column to it")


def to_example(row: Row, rename: Mapping[str, str]) -> Example:
    """Convert a row to an example. Raises `DataError` naming the row and the column that is missing or not text."""
    for column in rename:
        if column not in row.fields:
            raise _missing_column(row, column, purpose=f"'{column}' (from --columns)", candidates=(column,))
    unshadowed = {column: value for column, value in row.fields.items() if column not in rename.values()}
    fields = {rename.get(column, column): value for column, value in unshadowed.items()}
    renamed_row = Row(row.where, fields)
    if "messages" in fields and not any(name in fields for name in COLUMNS["instruction"]):
        instruction, output = _from_messages(renamed_row)
        texts = {"instruction": instruction, "input": "", "output": output}
    else:
        texts = {name: _field_text(renamed_row, name) for name in ("instruction", "input", "output")}
    if not (texts["instruction"] + texts["input"]).strip():
        raise DataError(f"{row.where}: the instruction is empty; fill it in or remove the row")
    if not texts["output"].strip():
        raise DataError(f"{row.where}: the response is empty; fill it in or remove the row")
    return Example(task=_field_text(renamed_row, "task").strip() or NO_TASK, where=row.where, **texts)


def _field_text(row: Row, name: str) -> str:
    """Return the text of a field of `Example`; task and input may be missing and are empty then."""
    column = next((column for column in COLUMNS[name] if column in row.fields), None)
    if column is not None:
        return _checked_text(row, f"'{column}'", row.fields[column])
    if name in ("task", "input"):
        return ""
    raise _missing_column(row, name, purpose=f"for the {name}", candidates=COLUMNS[name])


def _missing_column(row: Row, name: str, *, purpose: str, candidates: Sequence[str]) -> DataError:
    unknown = [column for column in row.fields if not any(column in layout for layout in COLUMNS.values())]
    matches = (get_close_matches(word, unknown, n=1, cutoff=0.4) for word in candidates)
    nearest = next((match[0] for match in matches if match), None)
    if name not in COLUMNS:
        hint = f"did you mean '{nearest}'?" if nearest else "name a column of the data"
    else:
        hint = f"map one with --columns {nearest or 'COLUMN'}={name}" + (", if that is it" if nearest else "")
    columns = ", ".join(f"'{column}'" for column in row.fields) or "none"
    return DataError(f"{row.where}: no column {purpose}; the columns are {columns}; {hint}")


def _checked_text(row: Row, what: str, value: object) -> str:
    if not isinstance(value, str):
        kind = (
            "null"
            if value is None
            else "nested"
            if isinstance(value, list | dict)
            else f"of type {type(value).__name__}"
        )
        raise DataError(f"{row.where}: {what} is {kind}, not text; write it as a string or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: {what} has a lone surrogate at character {error.start + 1}, which is not text; remove it"
        ) from error
    return value


def _from_messages(row: Row) -> tuple[str, str]:
    """Return the messages before the last assistant message, as one text, and that message. Later ones are ignored."""
    messages = row.fields["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise DataError(f"{row.where}: 'messages' must be a list of objects with 'role' and 'content'")
    turns = [
        (
            _checked_text(row, f"the role of message {number}", message["role"]),
            _checked_text(row, f"message {number}", message["content"]),
        )
        for number, message in enumerate(messages, start=1)
    ]
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(f"{row.where}: 'messages' needs an assistant message with another before it; remove the row")
    with_roles = len(answers) > 1  # a longer conversation must show whose turn each is
    instruction = "\n\n".join(f"{role}: {content}" if with_roles else content for role, content in turns[: answers[-1]])
    return instruction, turns[answers[-1]][1]
