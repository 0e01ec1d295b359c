"""Parts of pages that come from the package itself, so that they cannot fall behind it.

A page asks for a part by a comment on a line of its own: `% generated: commands`.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from enum import EnumType
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from sphinx.application import Sphinx
from typer.models import ArgumentInfo, OptionInfo

import mopcompress
from mopcompress.cli import app as command_line
from mopcompress.recipe import PromptRecoveryModifier, RunSpec

API_ORDER = (
    ("Inputs", ("load_recipe", "load_examples", "load_model")),
    ("Steps", ("compress_model", "fit", "evaluate")),
    ("A whole comparison", ("bench", "write_report")),
    ("In transformers", ("MopConfig", "MopForCausalLM")),
    ("Errors", ("MopError",)),
)
FIRST_PANEL = "Options"
MEANINGS = {  # of fields that have no comment in the code, since their names say it there
    "arm": "the recovery method",
    "steps": "optimizer steps",
    "gate_pretraining_steps": "steps that teach the gate the experts' domains",
    "max_grad_norm": "largest norm of a gradient",
    "grad_clip_percentile": "clip to this percentile of the norms so far, where it is less (AutoClip); 100 for none",
    "model": "Hugging Face folder, hub id, or smollm2",
    "data": "file, folder, hub id, or skills",
    "train_rows": "rows to train on; all if not given",
    "validation_rows": "rows that a sweep is scored on",
    "test_rows": "rows that are scored",
    "num_calibration_samples": "windows of calibration text",
    "ratios": "shares of weights to remove, in a bench",
    "methods": "pruning methods, in a bench",
    "bits": "bit widths to quantize to, in a bench",
    "group_size": "weights that share a scale, with bits; -1 is the whole row",
    "arms": "arms of a bench",
    "seeds": "seeds of the trainings of a bench",
    "seed": "seed of rows, calibration text and `recover`",
    "device": "auto, cpu, cuda, cuda:N or mps",
    "output_dir": "folder of the result",
}
VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
_MARK = re.compile(r"^% generated: (\w+)$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill in the parts when a page is read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fill(_app: Sphinx, _page: str, source: list[str]) -> None:
    parts: dict[str, Callable[[], str]] = {
        "commands": commands_markdown,
        "api": api_markdown,
        "recovery_fields": lambda: fields_markdown(PromptRecoveryModifier),
        "run_fields": lambda: fields_markdown(RunSpec),
        "tree": tree_markdown,
    }
    source[0] = _MARK.sub(lambda mark: parts[mark[1]](), source[0])


def commands_markdown() -> str:
    """Describe every command of the typer app: its usage, its arguments, and a table of options per panel."""
    return "\n\n".join(_command_markdown(command.callback) for command in command_line.registered_commands)


def api_markdown() -> str:
    """Describe every public name through autodoc, in the order of `API_ORDER`, unlisted names last."""
    listed = {name for _, names in API_ORDER for name in names}
    others = tuple(name for name in mopcompress.__all__ if name not in listed)
    sections = [*API_ORDER, *([("More", others)] if others else [])]
    return "\n\n".join(
        f"## {title}\n\n" + "\n\n".join(_autodoc(name) for name in names if name in mopcompress.__all__)
        for title, names in sections
    )


def fields_markdown(model: type[BaseModel]) -> str:
    """List the fields of a part of the recipe: name, default, and the comment that stands beside it in the code."""
    comments = _comments(model)
    rows = []
    for name, field in model.model_fields.items():
        meaning = field.description or comments.get(name) or MEANINGS.get(name)
        rows.append(f"| {_code(name)} | {_shown_default(field.default)} | {_text(meaning)} |")
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def tree_markdown() -> str:
    """List the modules by sub-package, each with the first sentence of its docstring."""
    root = Path(mopcompress.__file__).parent
    packages: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        package = path.parent.relative_to(root).as_posix()
        purpose = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if purpose and package != "data/skills":
            packages.setdefault(package, []).append(f"| {_code(path.name)} | {_text(_first_sentence(purpose))} |")
    return "\n\n".join(
        "\n".join([f"### {package.replace('.', 'mopcompress')}/", "", "| file | purpose |", "|---|---|", *files])
        for package, files in packages.items()
    )


def _first_sentence(text: str) -> str:
    """Return the first line, or all up to the end of its sentence where the sentence is longer."""
    first, *others = text.split("\n\n")[0].splitlines()
    while others and not first.endswith((".", ":")):
        first += " " + others.pop(0)
    return first.replace("`", "")


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the comments on the lines of each field's definition."""
    source = textwrap.dedent(inspect.getsource(model))
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id: " ".join(
            by_line[line] for line in range(statement.lineno, (statement.end_lineno or 0) + 1) if line in by_line
        )
        for statement in definition.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def _shown_default(default: object) -> str:
    if default is None or not isinstance(default, bool | int | float | str | tuple) or default == ():
        return ""
    if isinstance(default, bool):
        return _code(str(default).lower())
    return _code(str(list(default)).replace("'", "") if isinstance(default, tuple) else str(default))


def _autodoc(name: str) -> str:
    public = getattr(mopcompress, name)
    if not isinstance(public, type):
        directive = f".. autofunction:: mopcompress.{name}"
    elif issubclass(public, Exception):
        directive = f".. autoexception:: mopcompress.{name}"
    else:
        directive = f".. autoclass:: mopcompress.{name}\n   :members:"
    return f"### `{name}`\n\n```{{eval-rst}}\n{directive}\n```"


def _command_markdown(callback: Any) -> str:
    name = callback.__name__.replace("_", "-")
    arguments: list[tuple[str, str]] = []
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter, kind, default, info in _parameters(callback):
        if isinstance(info, ArgumentInfo):
            arguments.append((info.metavar or parameter.upper(), info.help or ""))
        elif not info.hidden:
            row = (_option_names(parameter, kind, info), _option_help(kind, default, info))
            panels.setdefault(info.rich_help_panel or FIRST_PANEL, []).append(row)
    usage = " ".join(["mopcompress", name, *(argument for argument, _ in arguments), "[OPTIONS]"])
    lines = [f"## {name}", _text(callback.__doc__), f"```text\n{usage}\n```"]
    if arguments:
        lines.append(_table("Argument", {_code(argument): text for argument, text in arguments}))
    return "\n\n".join([*lines, *(_table(panel, dict(rows)) for panel, rows in panels.items())])


def _parameters(callback: Any) -> Iterator[tuple[str, Any, object, ArgumentInfo | OptionInfo]]:
    """Yield each parameter's name, type without None, default, and what typer was told of it."""
    for name, parameter in inspect.signature(callback).parameters.items():
        assert get_origin(parameter.annotation) is Annotated, f"{name}: no typer.Option or typer.Argument"
        kind, info = get_args(parameter.annotation)[:2]
        if isinstance(kind, UnionType):
            kind = next(member for member in get_args(kind) if member is not type(None))
        yield name, kind, parameter.default, info


def _option_names(parameter: str, kind: Any, info: OptionInfo) -> str:
    flag = parameter.replace("_", "-")
    # inside Annotated, typer.Option holds the first name where a default would be
    declarations = (info.default if isinstance(info.default, str) else "", *(info.param_decls or ()))
    names = [name for declared in declarations for name in declared.split("/") if name.startswith("-")]
    if kind is bool:
        return ", ".join(_code(name) for name in names or (f"--{flag}", f"--no-{flag}"))
    return ", ".join(_code(name) for name in names or (f"--{flag}",)) + " " + _code(_value_name(kind, info))


def _value_name(kind: Any, info: OptionInfo) -> str:
    if isinstance(kind, EnumType):
        return "[" + "|".join(str(member.value) for member in kind) + "]"
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    return info.metavar or VALUES.get(kind, "PATH")


def _option_help(kind: Any, default: object, info: OptionInfo) -> str:
    text = info.help or ""
    shown = info.show_default and kind is not bool and default not in (None, inspect.Parameter.empty)
    return f"{text} (default {getattr(default, 'value', default)})" if shown and "default" not in text else text


def _table(head: str, rows: Mapping[str, str]) -> str:
    body = "\n".join(f"| {left} | {_text(right)} |" for left, right in rows.items())
    return f"| {head} | |\n|---|---|\n{body}"


def _text(text: str | None) -> str:
    """Escape what Markdown would read as markup or as the end of a table's cell."""
    return re.sub(r"([|<>*\[\]$])", r"\\\1", " ".join((text or "").split()))


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"
