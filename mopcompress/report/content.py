"""The report before it is rendered: sentences, tables, figures. A pure function of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from mopcompress.grid import is_seeded
from mopcompress.report import cost_tables, gate_tables, metadata, plots, result_tables, task_tables
from mopcompress.report.bootstrap import MIN_DOCUMENTS, scarce_tasks
from mopcompress.report.number_format import number
from mopcompress.report.pivot import (
    DENSE,
    Comparison,
    ResultGrid,
    best_arms,
    compare_arms,
    make_result_grid,
    perplexity_spread,
    recovery,
    spread,
)
from mopcompress.report.run_folder import Run
from mopcompress.report.table import Table


@dataclass(frozen=True)
class Sentence:
    """A sentence about one setting."""

    setting: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything in report.md and report.html; figures are in the HTML alone."""

    title: str
    data: metadata.Facts
    summary: str
    headline: tuple[Sentence, ...]
    warnings: tuple[str, ...]
    results: Table
    figures: tuple[plots.Figure, ...]
    comparisons: Table
    costs: Table
    sweeps: Table
    tasks: tuple[Table, ...]
    gates: Table
    confusions: tuple[Table, ...]
    answers: tuple[Table, ...]
    definitions: metadata.Facts
    protocol: metadata.Facts
    command: str | None
    recipe: str


def build_content(run: Run) -> tuple[Content, dict[str, Any]]:
    """Return the report for people, and the same numbers as plain values for report.json."""
    grid = make_result_grid(run.rows, run.spec)
    comparisons = compare_arms(run, grid)
    content = Content(
        title=metadata.title(run),
        data=metadata.data_facts(run),
        summary=summary(comparisons),
        headline=headline(grid, comparisons),
        warnings=caution_lines(run, grid, comparisons),
        results=result_tables.results_table(grid, comparisons),
        figures=plots.draw_figures(grid, comparisons),
        comparisons=result_tables.comparisons_table(comparisons),
        costs=cost_tables.costs_table(grid),
        sweeps=cost_tables.sweeps_table(grid, run.sweeps),
        tasks=task_tables.task_tables(grid),
        gates=gate_tables.gates_table(grid),
        confusions=gate_tables.confusion_tables(grid),
        answers=task_tables.answer_tables(grid),
        definitions=metadata.definitions(run),
        protocol=metadata.protocol_facts(run),
        command=metadata.command(run.manifest),
        recipe=metadata.recipe_text(run.manifest),
    )
    return content, _numbers(run, grid, comparisons, content)


def summary(comparisons: Sequence[Comparison]) -> str:
    """Compare the mixture with the single prompt over all settings, in one sentence."""
    mixture = [pair for pair in comparisons if (pair.first, pair.second) == ("mop", "single")]
    verdicts = [result_tables.verdict(pair.micro) for pair in mixture]
    if not verdicts:
        return "No setting has rows of both the mixture of prompts (mop) and the single prompt (single)."
    better, worse, unclear, infinite = (verdicts.count(verdict) for verdict in result_tables.VERDICTS)
    text = (
        f"Compared with the single prompt, the mixture of prompts (mop) is better in {better} of {len(verdicts)} "
        f"settings and worse in {worse}; no difference is shown in {unclear}"
    )
    return text + (f"; a score is infinite in {infinite}." if infinite else ".")


def headline(grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[Sentence, ...]:
    """Compare the mixture with single and none, a sentence per setting; without a mixture, every arm with none."""
    sentences = []
    for setting in grid.settings:
        pairs = [pair for pair in comparisons if pair.setting == setting]
        mixture = [pair for pair in pairs if pair.first == "mop" and pair.second in ("single", "none")]
        parts = ["mop not measured"] if "mop" in grid.arms and not mixture and setting != DENSE else []
        previous = ""
        for pair in mixture or [pair for pair in pairs if pair.second == "none"]:
            first, second = map(number, pair.perplexities)  # over the seeds that were compared, not over all
            subject = f"{pair.first} {first} "
            parts.append(
                f"{subject if subject != previous else ''}against {pair.second} {second}: {_change_text(pair)}"
            )
            previous = subject
        if parts and any(grid.rows(setting, arm) for arm in grid.arms):
            sentences.append(Sentence(setting, "; ".join(parts)))
    return tuple(sentences)


def _change_text(pair: Comparison) -> str:
    if not pair.micro.is_known:
        return "no interval, a score is infinite"
    doubt = "" if pair.micro.shows_difference else ", no difference shown"
    return result_tables.interval_text(pair.micro) + doubt


def caution_lines(run: Run, grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """List the limits of the numbers: missing cells, fallbacks, small tasks, and seeds that do not match."""
    cautions = []
    if grid.missing:
        named = "; ".join(map(str, grid.missing[:6]))
        rest = f"; and {len(grid.missing) - 6} more" if len(grid.missing) > 6 else ""
        verb = "cell of the recipe's grid is" if len(grid.missing) == 1 else "cells of the recipe's grid are"
        cautions.append(f'{len(grid.missing)} {verb} missing ({named}{rest}), shown as "-".')
    for setting in grid.settings:
        most = max((row.fallbacks for arm in grid.arms for row in grid.rows(setting, arm)), default=0)
        if most:
            cautions.append(f"{setting}: {most} matrices needed more damping than requested.")
    if scarce := scarce_tasks(next(iter(run.documents.values())).tasks):
        counts = ", ".join(f"{task}: {count}" for task, count in scarce.items())
        cautions.append(f"No macro interval, because tasks have fewer than {MIN_DOCUMENTS} test documents ({counts}).")
    for pair in comparisons:
        if is_seeded(pair.first) and is_seeded(pair.second) and not pair.shared:
            cautions.append(
                f"{pair.setting}: {pair.first} and {pair.second} have no seed in common, so their difference includes "
                "that between the seeds."
            )
    if arms := _arms_with_single_seed(grid):
        cautions.append(
            f"One seed for {'; '.join(arms)}: the intervals cover the choice of test documents, not the randomness of "
            "training."
        )
    return tuple(cautions)


def _arms_with_single_seed(grid: ResultGrid) -> list[str]:
    """List the arms that were trained with a single seed, each with its settings unless it is all of them."""
    trained = [(setting, arm) for (setting, arm), rows in grid.cells.items() if rows and is_seeded(arm)]
    single = [(setting, arm) for setting, arm in trained if len(grid.rows(setting, arm)) == 1]
    if single == trained:
        return ["each arm"] if single else []
    settings = {arm: [setting for setting, other in single if other == arm] for _, arm in single}
    everywhere = {arm for arm in settings if all(cell in single for cell in trained if cell[1] == arm)}
    return [arm if arm in everywhere else f"{arm} at {', '.join(settings[arm])}" for arm in sorted(settings)]


def _numbers(run: Run, grid: ResultGrid, comparisons: Sequence[Comparison], content: Content) -> dict[str, Any]:
    """Return the numbers of the report by their keys in report.json; non-finite ones as in the rows."""
    cells: list[Mapping[str, Any]] = []
    for (setting, arm), rows in grid.cells.items():
        if rows:
            perplexity = perplexity_spread(rows, lambda row: row.perplexity)
            macro = perplexity_spread(rows, lambda row: row.perplexity_macro)
            cells.append(
                {
                    "setting": setting,
                    "arm": arm,
                    "seeds": [row.seed for row in rows],
                    "perplexity": asdict(perplexity),
                    "perplexity_macro": asdict(macro),
                    **{
                        field: asdict(spread(rows, attrgetter(field)))
                        for _, field, _ in result_tables.ANSWER_COLUMNS
                        if all(getattr(row, field) is not None for row in rows)
                    },
                    "recovery": recovery(grid, setting, arm),
                    "best": arm in best_arms(grid, setting),
                }
            )
    return {
        "title": content.title,
        "summary": content.summary,
        "headline": [asdict(sentence) for sentence in content.headline],
        "warnings": list(content.warnings),
        "missing": [list(cell) for cell in grid.missing],
        "cells": cells,
        "comparisons_log_perplexity": [asdict(pair) for pair in comparisons],
        "rows": [asdict(row) for row in run.rows],
        "manifest": dict(run.manifest),
    }
