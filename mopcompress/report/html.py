"""report.html: one self-contained file, autoescaped, without JavaScript."""

from pathlib import Path

import jinja2
from markupsafe import Markup

from mopcompress.report import answers, gate_tables
from mopcompress.report.content import Content


def to_html(content: Content) -> str:
    """Fill the template; only the figures drawn by `plots` go in unescaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [(figure, Markup(figure.svg)) for figure in content.figures]
    return environment.get_template("report.html.jinja").render(
        content=content, figures=figures, confusions_note=gate_tables.CONFUSION_NOTE, answers_note=answers.NOTE
    )
