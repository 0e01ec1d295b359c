"""The text of report.md and report.html. Both have the same words and tables; figures are in the HTML alone."""

import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
from markupsafe import Markup

from mopcompress.report import gate_tables, task_tables
from mopcompress.report.content import Content
from mopcompress.report.metadata import Facts
from mopcompress.report.table import Line, Table, Text


def to_markdown(content: Content) -> str:
    """Render GitHub-flavoured Markdown; every name from outside is escaped."""
    parts = [
        f"# {escape_markdown(content.title)}",
        _facts(content.data),
        f"## In short\n\n{escape_markdown(content.summary)}",
        "\n".join(f"- **{escape_markdown(item.setting)}**: {escape_markdown(item.text)}" for item in content.headline),
        "\n".join(f"> {escape_markdown(warning)}  " for warning in content.warnings),
        _table(content.results),
        _table(content.comparisons),
        _table(content.costs),
        _table(content.sweeps) if content.sweeps.lines else "",
        "## Tasks\n\nPerplexity, and in brackets the fraction of exact matches; mean over seeds.",
        *(_table(table, level=3) for table in content.tasks),
        _table(content.gates) if content.gates.lines else "",
        escape_markdown(gate_tables.CONFUSION_NOTE) if content.confusions else "",
        *(_table(table, level=3) for table in content.confusions),
        f"## Sample answers\n\n{escape_markdown(task_tables.NOTE)}" if content.answers else "",
        *(_table(table, level=3) for table in content.answers),
        f"## Definitions\n\n{_facts(content.definitions)}",
        f"## Protocol\n\n{_facts(content.protocol)}",
        f"Command:\n\n{_fenced(content.command)}" if content.command else "",
        f"Recipe, resolved:\n\n{_fenced(content.recipe)}",
        "Figures are in report.html, plain numbers in report.json.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape_markdown(text: str) -> str:
    """Return one line in which no character has a meaning in Markdown or HTML."""
    text = re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _facts(facts: Facts) -> str:
    return "\n".join(f"- **{escape_markdown(name)}**: {escape_markdown(text)}" for name, text in facts)


def _table(table: Table, *, level: int = 2) -> str:
    rules = ["---"] * table.names + ["---:"] * (len(table.columns) - table.names)
    lines = [
        _row(map(escape_markdown, table.columns)),
        _row(rules),
        *(_row(_cells(line, table.names)) for line in table.lines),
    ]
    return "\n\n".join(
        filter(None, ["#" * level + " " + escape_markdown(table.title), escape_markdown(table.note), "\n".join(lines)])
    )


def _cells(line: Line, names: int) -> Iterable[str]:
    for index, cell in enumerate(line.cells):
        text = escape_markdown(cell.main) + (f" ({escape_markdown(cell.minor)})" if cell.minor else "")
        yield f"**{text}**" if line.strong and index in (names - 1, names + 1) and cell != Text("") else text


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _fenced(text: str) -> str:
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def to_html(content: Content) -> str:
    """Render the HTML template; only the figures drawn by `plots` are inserted unescaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [(figure, Markup(figure.svg)) for figure in content.figures]
    return environment.get_template("report.html.jinja").render(
        content=content, figures=figures, confusions_note=gate_tables.CONFUSION_NOTE, answers_note=task_tables.NOTE
    )
