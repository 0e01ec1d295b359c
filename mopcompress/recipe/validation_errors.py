"""Faults of a recipe, a flag or a setting in the user's words: where, what, which value, and the nearest right name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MOST_FAULTS = 40  # lines
LONGEST_VALUE = 60  # characters of a wrong value that are shown
PLAIN = {  # pydantic's kinds of error, without Python's names for types
    "float_type": "not a number",
    "int_type": "not a whole number",
    "bool_type": "not true or false",
    "string_type": "not text",
    "tuple_type": "not a list",
    "dict_type": "not a map",
    "model_type": "not a map of settings",
    "too_short": "not long enough: at least one entry is needed",
}


ONE, EACH = "|one", "|each"  # pydantic's tags for a value that may be single or a list: parts of its paths


class Absent:
    """Stands for the value of a fault that is not about a value."""


ABSENT = Absent()


@dataclass(frozen=True)
class Fault:
    """A wrong field, with its place."""

    path: tuple[str | int, ...]
    message: str
    value: object = ABSENT
    hint: str | None = None  # ready to print: quoted when it is a name

    def in_recipe(self, file: str) -> str:
        """Return `file: stage.group.Modifier.key: message, found VALUE; did you mean 'x'?`."""
        place = f"{printable(file)}: {dotted_path(self.path)}" if self.path else printable(file)
        return f"{place}: {self._description()}"

    def in_setting(self, part: str) -> str:
        """Return `--set part.key: message, found VALUE; did you mean 'x'?`."""
        return f"--set {dotted_path((part, *self.path))}: {self._description()}"

    def in_flags(self) -> str:
        """Return `--flag: VALUE is not ...; did you mean x?`."""
        if not self.path:
            return self._description()
        flag = "--" + str(self.path[0]).replace("_", "-")
        if self.message.startswith("not ") and self.value is not ABSENT:
            return f"{flag}: {short_repr(self.value)} is {self.message}{self._suggestion()}"
        return f"{flag}: {self._description()}"

    def _description(self) -> str:
        value = "" if self.value is ABSENT else f", found {short_repr(self.value)}"
        return f"{self.message}{value}{self._suggestion()}"

    def _suggestion(self) -> str:
        return f"; did you mean {self.hint}?" if self.hint else ""


def printable(text: str) -> str:
    """Return the text itself, or its escaped form when it would break the line."""
    return text if text.isprintable() else ascii(text)


def dotted_path(path: Sequence[str | int]) -> str:
    """Return a path as `stage.group.Modifier.targets[0]`."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{printable(part[:LONGEST_VALUE])}"
    return words.removeprefix(".")


def short_repr(value: object) -> str:
    """Return a wrong value in one short line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def nearest_name(word: object, names: Iterable[str]) -> str | None:
    """Return the name most like `word`, quoted; None when nothing is near."""
    near = get_close_matches(str(word)[:LONGEST_VALUE], list(names), n=1, cutoff=0.6)
    return repr(near[0]) if near else None


def join_lines(rendered: Iterable[str]) -> str:
    """Join one line per fault, the first ones only when there are very many."""
    shown = list(rendered)
    more = [f"... and {len(shown) - MOST_FAULTS} faults more"] if len(shown) > MOST_FAULTS else []
    return "\n".join(shown[:MOST_FAULTS] + more)


def list_faults(error: ValidationError, model: type[BaseModel], path: tuple[str | int, ...] = ()) -> list[Fault]:
    """Return every fault that pydantic saw, each at the path that the user typed."""
    return [_fault(details, model, path) for details in error.errors(include_url=False)]


def _fault(details: ErrorDetails, model: type[BaseModel], path: tuple[str | int, ...]) -> Fault:
    place = path + tuple(part for part in details["loc"] if part not in (ONE, EACH))
    if details["type"] == "extra_forbidden":
        twin = _present_name(model, place[-1])
        if twin is not None:
            return Fault(place, f"the same field as {twin}, and both are given; keep {twin}")
        return Fault(place, "no such field", hint=nearest_name(place[-1], suggested_fields(model)))
    if details["type"] == "missing":
        return Fault(place, "required, but missing")
    if isinstance(details["input"], str) and details["input"].startswith("eval("):
        return Fault(place, "SparseML's expressions are not computed here; write the value", details["input"])
    context = details.get("ctx", {})
    hint = context.get("hint")
    if details["type"] == "literal_error":
        hint = nearest_name(
            details["input"], [name.strip("'") for name in context["expected"].replace(" or ", ", ").split(", ")]
        )
    message = PLAIN.get(details["type"], details["msg"].replace("Input should be", "not"))
    value = ABSENT if place == path and isinstance(details["input"], dict) else details["input"]
    return Fault(place, message, value, hint)


def field_name(model: type[BaseModel], name: str) -> str:
    """Return the present name of a field of `model` that older recipes call otherwise; `name` itself for all else."""
    if name in model.model_fields:
        return name
    aliased = (present for present, field in model.model_fields.items() if name in _aliases(field))
    return next(aliased, name)


def suggested_fields(model: type[BaseModel]) -> list[str]:
    """Return the names that a hint may offer: present ones, of fields that have an effect."""
    names = own_fields(model)
    for part in getattr(model, "parts", ()):
        names += suggested_fields(part)
    return names


def own_fields(model: type[BaseModel]) -> list[str]:
    """Return the names that a hint may offer, without those of the parts of `model`."""
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _present_name(model: type[BaseModel], name: object) -> str | None:
    """Return the present name of an alias in `model` or its parts; None when `name` is no alias."""
    for part in (model, *getattr(model, "parts", ())):
        for present, field in part.model_fields.items():
            if name in _aliases(field):
                return present
    return None


def _aliases(field: FieldInfo) -> list[Any]:
    return field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
