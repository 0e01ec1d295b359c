"""Markdown and HTML, with hostile names too."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

from report_runs import add_row, document_scores, small_run

from mopcompress.report import write_report
from mopcompress.report.render import escape_markdown


def test_html_is_self_contained_with_well_formed_figures(folder: Path) -> None:
    html = write_report(folder)[2].read_text()
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'href="#', "", html))
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        ElementTree.fromstring(figure)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert ids
    assert not [name for name in ids if "_" in name]
    assert len(re.findall(r"<tr", html)) == len(re.findall(r"</tr>", html))


def test_the_dense_model_is_on_top(folder: Path) -> None:
    markdown = write_report(folder)[1].read_text()
    table = markdown[markdown.index("## Results") :].split("| --- |", 1)[1].splitlines()
    assert table[1].startswith("| dense | none ")


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "*bold* `code` [link](x)",
    "$\\frac{$",
    '" onload="x',
    "two\nlines",
    "\ud800lone",
    "日本語 & co",
)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 3.0, "single": 2.0, "mop": 1.8}, dense=1.0, tasks=HOSTILE)
    add_row(tmp_path, document_scores(1.9, seed=1, tasks=HOSTILE), arm="<b>$x$")
    (tmp_path / "run.json").write_text(json.dumps({"model": {"name": "</title><script>x"}, "command": "a ``` b"}))
    _, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert "<script" not in html
    assert "<b>$" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    for figure in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(figure)
    assert "<script" not in markdown
    assert r"a\|b" in markdown
    assert "````\na ``` b\n````" in markdown
    for line in markdown.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |")


def test_escaped_text_is_one_line_without_markup() -> None:
    assert escape_markdown("a|b\n<c> `d` *e*") == r"a\|b &lt;c&gt; \`d\` \*e\*"


def test_an_infinite_perplexity_is_printed(tmp_path: Path) -> None:
    small_run(tmp_path, {"none": 3.0, "single": 2.0}, dense=1.0)
    scores = document_scores(2.0, seed=1)
    scores = replace(scores, nats=[math.inf, *scores.nats[1:]])
    infinite = {"perplexity": math.inf, "perplexity_macro": math.inf}
    add_row(tmp_path, scores, arm="mop", seed=0, **infinite)
    numbers, markdown, html = (path.read_text() for path in write_report(tmp_path))
    assert json.loads(numbers)["rows"][-1]["perplexity"] == "inf"
    assert "mop inf against single" in markdown
    assert "no interval, a score is infinite" in markdown
    assert "mop: inf" in html


def test_missing_cells_are_dashes_and_are_counted(folder: Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text(
        "".join(line for line in lines if '"arm": "mop"' not in line or "gptq" not in line)
    )
    markdown = write_report(folder)[1].read_text()
    assert "> 6 cells of the recipe's grid are missing (gptq 4-bit, mop, seed 0;" in markdown
    assert "|  | mop | - | - | - | - | - | - |" in markdown
