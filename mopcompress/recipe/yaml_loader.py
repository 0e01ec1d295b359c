"""Reading of recipe files: plain data of text, numbers, lists and maps, nothing that could run or explode.

Scalars follow YAML 1.2: `1e-3` is a number and `2:4` is text (YAML 1.1 reads text and the sexagesimal 124).
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mopcompress.errors import InputNotFoundError, RecipeError
from mopcompress.recipe.validation_errors import printable, short_repr

LARGEST_FILE = 1_000_000  # bytes
DEEPEST = 20  # nested maps and lists; a recipe needs 6
MOST_ALIASES = 10  # at most 3^(10/3) = 39 times the size of the file once expanded
SUFFIXES = (".yaml", ".yml", ".json", ".md")

TAG = "tag:yaml.org,2002:"
NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` with YAML 1.2 scalars that refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (the name PyYAML reads)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the map of `node`; raises `ConstructorError` for a key that is not text or stands twice."""
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {short_repr(name)} is not text", key.start_mark
                )
            if name in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {short_repr(name)} stands twice", key.start_mark
                )
            names.add(name)
        return super().construct_mapping(node, deep=deep)


PlainLoader.add_implicit_resolver(TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
PlainLoader.add_implicit_resolver(TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
PlainLoader.add_implicit_resolver(TAG + "int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
PlainLoader.add_implicit_resolver(TAG + "float", NUMBER, list("-+.0123456789"))


class PlainDumper(yaml.SafeDumper):
    """Writes text in quotes when YAML 1.1 or 1.2 would read it as something else; repeats instead of aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: a recipe that is written back has no aliases."""
        return True


PlainDumper.add_implicit_resolver(TAG + "float", NUMBER, list("-+.0123456789"))


def read_document(path: Path) -> dict[str, Any]:
    """Read the top-level map of a recipe.

    Raises `InputNotFoundError` when there is no such file, `RecipeError` when it is not a map of plain data.
    """
    shown = printable(str(path))
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(
            f"{shown}: a recipe ends in {', '.join(SUFFIXES)}, found {short_repr(path.suffix)}; rename the file"
        )
    text = _text(path, shown)
    try:
        document = _json(text) if path.suffix.lower() == ".json" else _yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{shown}: {place}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{shown}: cannot be read as a recipe ({' '.join(str(error).split())[:200]})") from error
    if document is None:
        raise RecipeError(
            f"{shown}: the recipe is empty; write stages, a run: map, or leave --recipe out for the defaults"
        )
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise RecipeError(f"{shown}: the top of a recipe is a map of stages, found a {kind}; write <name>_stage: ...")
    return document


def read_value(text: str) -> Any:
    """Read one value of plain data, as a recipe would hold it.

    Raises `ValueError` that says in one line why the text is no such value.
    """
    try:
        return _yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(" ".join(problem.split())[:200]) from error


def _text(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputNotFoundError(f"{shown}: cannot read the recipe ({error.strerror}); check the path") from error
    if len(content) > LARGEST_FILE:
        raise RecipeError(
            f"{shown}: larger than {LARGEST_FILE} bytes; a recipe is a few lines, is this the right file?"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    return _front_matter(text, shown) if path.suffix.lower() == ".md" else text


def _front_matter(text: str, shown: str) -> str:
    parts = re.split(r"^---[ \t]*\r?$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        raise RecipeError(f"{shown}: no YAML front matter; begin the file with --- and close the recipe with ---")
    return parts[1]


def _json(text: str) -> Any:
    document = json.loads(text, object_pairs_hook=_unique)
    if _depth(document) > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in pairs:
        if name in fields:
            raise ValueError(f"the key {short_repr(name)} stands twice")
        fields[name] = field
    return fields


def _depth(document: Any) -> int:
    inner = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    return 1 + max((_depth(part) for part in inner), default=0)


def _yaml(text: str) -> Any:
    _refuse_tricks(text)
    return yaml.load(text, Loader=PlainLoader)  # a SafeLoader


def _refuse_tricks(text: str) -> None:
    """Raise an error for tags, aliases or depth; the events alone are read, before anything is built."""
    open_anchors: list[str | None] = []
    aliases = 0
    for event in yaml.parse(text, Loader=PlainLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            open_anchors.pop()
            continue
        tag = getattr(event, "tag", None)
        if tag:
            _refuse(f"YAML tags are not accepted, found {short_repr(tag.replace(TAG, '!!'))}; {_advice(tag)}", event)
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in open_anchors:
                _refuse(f"the alias *{event.anchor} contains itself; write the value out", event)
            if aliases > MOST_ALIASES:
                _refuse(f"more than {MOST_ALIASES} aliases; write the values out", event)
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            if len(open_anchors) > DEEPEST:
                _refuse(f"nested deeper than {DEEPEST} levels; a recipe needs 6", event)


def _refuse(problem: str, event: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _advice(tag: str) -> str:
    if tag.endswith("Modifier"):
        return (
            "this is the form of SparseML before 1.6: write a <name>_stage: map with SparseGPTModifier: {sparsity: ...}"
        )
    return "a recipe is data and never names code: remove it"
