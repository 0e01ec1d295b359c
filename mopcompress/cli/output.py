"""What commands print on stdout: one JSON object, or a few lines and a table."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from mopcompress.results import BenchRow


def print_json(content: dict[str, Any]) -> None:
    """One object. Infinite numbers are written as Python's json does: a perplexity may be one."""
    typer.echo(json.dumps(content, indent=1))


def print_facts(facts: dict[str, Any]) -> None:
    """One `name: value` a line; None is left out."""
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name.replace('_', ' ')}: {_shown(value)}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def print_bench(rows: Sequence[BenchRow]) -> None:
    """One line a cell."""
    written = any(row.rouge_l is not None for row in rows)
    print_table(
        ["setting", "arm", "seed", "perplexity", "macro", "exact match", *(["ROUGE-L"] if written else [])],
        [
            [
                row.setting,
                row.arm,
                str(row.seed),
                f"{row.perplexity:.4g}",
                f"{row.perplexity_macro:.4g}",
                f"{100 * row.exact_match:.1f} %",
                *([_hundredths(row.rouge_l)] if written else []),
            ]
            for row in rows
        ],
    )


def print_scores(summary: dict[str, Any]) -> None:
    """An evaluation: the totals, then a line a task."""
    print_facts(
        {
            "model": summary["model"],
            "adapter": summary["adapter"],
            "data": summary["data"]["name"],
            "perplexity": f"{summary['perplexity']:.4g} (macro {summary['perplexity_macro']:.4g})",
            "exact_match": f"{100 * summary['exact_match']:.1f} % of {summary['documents']} documents",
            "scored_tokens": summary["scored_tokens"],
            "text_perplexity": summary["text_perplexity"],
            **(_written(summary) if summary["rouge_l"] is not None else {}),
        }
    )
    written = ["ROUGE-L"] if summary["rouge_l"] is not None else []
    print_table(
        ["task", "documents", "perplexity", "exact match", *written],
        [
            [
                task,
                str(score["documents"]),
                f"{score['perplexity']:.4g}",
                f"{100 * score['exact_match']:.1f} %",
                *(_hundredths(score["rouge_l"]) for _ in written),
            ]
            for task, score in summary["per_task"].items()
        ],
    )
    for sample in summary["samples"]:
        typer.echo("\n" + "\n".join(f"{name}: {' '.join(text.split())}" for name, text in sample.items()))


def _written(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "ROUGE-L": f"{_hundredths(summary['rouge_l'])} (macro {_hundredths(summary['rouge_l_macro'])})",
        "written_exact_match": f"{100 * summary['written_exact_match']:.1f} %, but for case and punctuation",
    }


def _hundredths(share: float | None) -> str:
    """ROUGE-L as it is usually told: 100 for the same words."""
    return "" if share is None else f"{100 * share:.1f}"


def print_harness(summary: dict[str, Any]) -> None:
    """Results of the lm-evaluation-harness, a line a metric; those of others than `none` with the filter's name."""
    print_facts({name: summary[name] for name in ("model", "adapter", "harness")})
    rows = []
    for task, found in summary["results"].items():
        for name, value in found.items():
            metric, _, chosen = name.partition(",")
            if chosen and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{chosen}")
                spread = f"{error:.4g}" if isinstance(error, float) else ""
                rows.append([task, metric if chosen == "none" else name, _shown(value), spread])
    print_table(["task", "metric", "value", "standard error"], rows)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
