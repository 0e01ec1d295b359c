"""Parts of pages that come from the package itself, so that they cannot fall behind it.

A page asks for a part by a comment on a line of its own: `% generated: commands`.
"""

import re
from collections.abc import Callable, Iterator

import click
import typer.main
from sphinx.application import Sphinx

import mopcompress
from mopcompress.cli import app as command_line

API_ORDER = (
    ("Inputs", ("load_recipe", "load_examples", "load_model")),
    ("Steps", ("compress_model", "fit", "evaluate")),
    ("A whole comparison", ("bench", "write_report")),
    ("In transformers", ("MopConfig", "MopForCausalLM")),
    ("Errors", ("MopError",)),
)
FIRST_PANEL = "Options"
_MARK = re.compile(r"^% generated: (\w+)$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill in the parts when a page is read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fill(_app: Sphinx, _page: str, source: list[str]) -> None:
    parts: dict[str, Callable[[], str]] = {"commands": commands_markdown, "api": api_markdown}
    source[0] = _MARK.sub(lambda mark: parts[mark[1]](), source[0])


def commands_markdown() -> str:
    """Describe every command of the typer app: its usage, its arguments, and a table of options per panel."""
    group = typer.main.get_command(command_line)
    assert isinstance(group, click.Group)
    context = click.Context(group, info_name="mopcompress")
    return "\n\n".join(
        _command_markdown(command, click.Context(command, info_name=name, parent=context))
        for name, command in group.commands.items()
    )


def api_markdown() -> str:
    """Describe every public name through autodoc, in the order of `API_ORDER`, unlisted names last."""
    listed = {name for _, names in API_ORDER for name in names}
    others = tuple(name for name in mopcompress.__all__ if name not in listed)
    sections = [*API_ORDER, *([("More", others)] if others else [])]
    return "\n\n".join(
        f"## {title}\n\n" + "\n\n".join(_autodoc(name) for name in names if name in mopcompress.__all__)
        for title, names in sections
    )


def _autodoc(name: str) -> str:
    public = getattr(mopcompress, name)
    if not isinstance(public, type):
        directive = f".. autofunction:: mopcompress.{name}"
    elif issubclass(public, Exception):
        directive = f".. autoexception:: mopcompress.{name}"
    else:
        directive = f".. autoclass:: mopcompress.{name}\n   :members:"
    return f"### `{name}`\n\n```{{eval-rst}}\n{directive}\n```"


def _command_markdown(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## {context.info_name}", _text(command.help), f"```text\n{usage}\n```"]
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    if arguments:
        lines.append(_table("Argument", [(_code(_argument_name(one)), getattr(one, "help", "")) for one in arguments]))
    lines += [_table(panel, rows) for panel, rows in _panels(command, context)]
    return "\n\n".join(lines)


def _panels(command: click.Command, context: click.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            panel = getattr(parameter, "rich_help_panel", None) or FIRST_PANEL
            panels.setdefault(panel, []).append((_option_names(parameter, context), _option_help(parameter)))
    yield from panels.items()


def _option_names(option: click.Option, context: click.Context) -> str:
    names = ", ".join(_code(name) for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} {_code(option.make_metavar(context))}"


def _option_help(option: click.Option) -> str:
    text = option.help or ""
    shown = option.show_default and option.default is not None and not option.is_flag and "default" not in text
    default = getattr(option.default, "value", option.default)
    return f"{text} (default {default})" if shown else text


def _argument_name(argument: click.Argument) -> str:
    return argument.metavar or (argument.name or "").upper()


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    body = "\n".join(f"| {left} | {_text(right)} |" for left, right in rows)
    return f"| {head} | |\n|---|---|\n{body}"


def _text(text: str | None) -> str:
    """Escape what Markdown would read as markup or as the end of a table's cell."""
    return re.sub(r"([|<>*\[\]$])", r"\\\1", " ".join((text or "").split()))


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"
