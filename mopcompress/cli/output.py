"""Output of commands on stdout: one JSON object, or a few lines and a table."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from mopcompress.cli.command import Common
from mopcompress.recipe import Recipe, recipe_to_dict
from mopcompress.results import BenchRow


def print_json(content: dict[str, Any]) -> None:
    """Print one object. Infinite numbers are written as Python's json does: a perplexity may be infinite."""
    typer.echo(json.dumps(content, indent=1))


def print_facts(facts: dict[str, Any]) -> None:
    """Print one `name: value` per line, without those that are None."""
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{name.replace('_', ' ')}: {_shown(value)}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
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
    """Print one line per cell of the grid."""
    has_answers = any(row.rouge_l is not None for row in rows)
    print_table(
        ["setting", "arm", "seed", "perplexity", "macro", "exact match", *(["ROUGE-L"] if has_answers else [])],
        [
            [
                row.setting,
                row.arm,
                str(row.seed),
                f"{row.perplexity:.4g}",
                f"{row.perplexity_macro:.4g}",
                f"{100 * row.exact_match:.1f} %",
                *([_hundredths(row.rouge_l)] if has_answers else []),
            ]
            for row in rows
        ],
    )


def print_scores(summary: dict[str, Any]) -> None:
    """Print an evaluation: the totals, then a line per task."""
    print_facts(
        {
            "model": summary["model"],
            "adapter": summary["adapter"],
            "data": summary["data"]["name"],
            "perplexity": f"{summary['perplexity']:.4g} (macro {summary['perplexity_macro']:.4g})",
            "exact_match": f"{100 * summary['exact_match']:.1f} % of {summary['documents']} documents",
            "scored_tokens": summary["scored_tokens"],
            "text_perplexity": summary["text_perplexity"],
            **(_answer_facts(summary) if summary["rouge_l"] is not None else {}),
        }
    )
    answer_columns = ["ROUGE-L"] if summary["rouge_l"] is not None else []
    print_table(
        ["task", "documents", "perplexity", "exact match", *answer_columns],
        [
            [
                task,
                str(score["documents"]),
                f"{score['perplexity']:.4g}",
                f"{100 * score['exact_match']:.1f} %",
                *(_hundredths(score["rouge_l"]) for _ in answer_columns),
            ]
            for task, score in summary["per_task"].items()
        ],
    )
    for sample in summary["samples"]:
        typer.echo("\n" + "\n".join(f"{name}: {' '.join(text.split())}" for name, text in sample.items()))


def _answer_facts(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "ROUGE-L": f"{_hundredths(summary['rouge_l'])} (macro {_hundredths(summary['rouge_l_macro'])})",
        "written_exact_match": f"{100 * summary['written_exact_match']:.1f} %, but for case and punctuation",
    }


def _hundredths(fraction: float | None) -> str:
    """Return ROUGE-L as papers report it: 100 for the same words."""
    return "" if fraction is None else f"{100 * fraction:.1f}"


def print_harness(summary: dict[str, Any]) -> None:
    """Print results of the lm-evaluation-harness, a line per metric, with the filter's name where there is one."""
    print_facts({name: summary[name] for name in ("model", "adapter", "harness")})
    rows = []
    for task, metrics in summary["results"].items():
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{filter_name}")
                spread = f"{error:.4g}" if isinstance(error, float) else ""
                rows.append([task, metric if filter_name == "none" else name, _shown(value), spread])
    print_table(["task", "metric", "value", "standard error"], rows)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_plan(common: Common, recipe: Recipe, target: Path | None, done: bool, facts: dict[str, Any]) -> None:
    """Print the plan; the resolved recipe only in JSON."""
    state = None if target is None else f"{target}, done already" if done else str(target)
    if common.json:
        output = {"output": str(target) if target else None, "done": done, "recipe": recipe_to_dict(recipe)}
        print_json({**facts, **output})
    else:
        print_facts({**facts, "output": state})


def print_result(common: Common, target: Path, facts: dict[str, Any], shown: tuple[str, ...]) -> None:
    if common.json:
        print_json({"output": str(target), **facts})
    else:
        print_facts({**{name: facts.get(name) for name in shown}, "output": str(target)})


def output_folder(recipe: Recipe, default: Path) -> Path:
    """Return the folder of the result: the recipe's, or the default one."""
    return Path(recipe.run.output_dir).expanduser() if recipe.run.output_dir else default
