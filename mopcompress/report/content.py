"""The report itself, before it is drawn: sentences, tables, figures. A pure function of the run."""

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
    compare,
    make_result_grid,
    perplexity_spread,
    recovery,
    spread,
)
from mopcompress.report.run_folder import Run
from mopcompress.report.table import Table


@dataclass(frozen=True)
class Sentence:
    """What the mixture does in one setting."""

    setting: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything report.md and report.html say; figures are in the HTML only."""

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
    """The report for people, and the same numbers for machines (plain values; non-finite ones as in the rows)."""
    grid = make_result_grid(run.rows, run.spec)
    comparisons = compare(run, grid)
    content = Content(
        title=metadata.title(run),
        data=metadata.data_facts(run),
        summary=summary(comparisons),
        headline=headline(grid, comparisons),
        warnings=caution_lines(run, grid, comparisons),
        results=result_tables.results_table(grid, comparisons),
        figures=plots.figures(grid, comparisons),
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
    """One sentence over all settings: mixture against single prompt."""
    said = [result_tables.verdict(one.micro) for one in comparisons if (one.first, one.second) == ("mop", "single")]
    if not said:
        return "The mixture and the single prompt have not both been measured in any setting."
    better, worse, unclear, infinite = (said.count(verdict) for verdict in result_tables.VERDICTS)
    text = f"Against the single prompt, the mixture of prompts is better in {better} of {len(said)} settings"
    text += f", worse in {worse}; no difference is shown in {unclear}"
    return text + (f"; a score is infinite in {infinite}." if infinite else ".")


def headline(grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[Sentence, ...]:
    """What the mixture does against single and none, a sentence a setting; without a mixture, what each arm does."""
    sentences = []
    for setting in grid.settings:
        pairs = [one for one in comparisons if one.setting == setting]
        mixture = [one for one in pairs if one.first == "mop" and one.second in ("single", "none")]
        parts = ["mop not measured"] if "mop" in grid.arms and not mixture and setting != DENSE else []
        previous = ""
        for one in mixture or [one for one in pairs if one.second == "none"]:
            first, second = map(number, one.perplexities)  # over what was compared: an arm can have other seeds, too
            this = f"{one.first} {first} "
            parts.append(f"{this if this != previous else ''}against {one.second} {second}: {_outcome(one)}")
            previous = this
        if parts and any(grid.rows(setting, arm) for arm in grid.arms):
            sentences.append(Sentence(setting, "; ".join(parts)))
    return tuple(sentences)


def caution_lines(run: Run, grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """What a reader must know before believing the tables."""
    found = []
    if grid.missing:
        named = "; ".join(f"{setting}, {arm}, seed {seed}" for setting, arm, seed in grid.missing[:6])
        rest = f"; and {len(grid.missing) - 6} more" if len(grid.missing) > 6 else ""
        verb = "cell of the recipe's grid is" if len(grid.missing) == 1 else "cells of the recipe's grid are"
        found.append(f'{len(grid.missing)} {verb} missing ({named}{rest}), shown as "-".')
    for setting in grid.settings:
        worst = max((row.fallbacks for arm in grid.arms for row in grid.rows(setting, arm)), default=0)
        if worst:
            found.append(f"{setting}: {worst} matrices needed more damping than asked for.")
    if scarce := scarce_tasks(next(iter(run.documents.values())).tasks):
        counts = ", ".join(f"{task}: {count}" for task, count in scarce.items())
        found.append(f"Tasks with fewer than {MIN_DOCUMENTS} test documents, so no macro interval ({counts}).")
    for one in comparisons:
        if is_seeded(one.first) and is_seeded(one.second) and not one.shared:
            found.append(
                f"{one.setting}: {one.first} and {one.second} have no seed in common, so their difference holds that "
                "of the seeds as well."
            )
    if once := _run_once(grid):
        found.append(
            f"One seed of {'; '.join(once)}: the intervals cover the choice of test documents, not the luck of "
            "training."
        )
    return tuple(found)


def _run_once(grid: ResultGrid) -> list[str]:
    """Of which arms, and where not in all, in which settings, there is one seed, though others would be others."""
    trained = [(setting, arm) for (setting, arm), rows in grid.cells.items() if rows and is_seeded(arm)]
    once = [(setting, arm) for setting, arm in trained if len(grid.rows(setting, arm)) == 1]
    if once == trained:
        return ["each arm"] if once else []
    settings = {arm: [setting for setting, other in once if other == arm] for _, arm in once}
    everywhere = {arm for arm in settings if all(cell in once for cell in trained if cell[1] == arm)}
    return [arm if arm in everywhere else f"{arm} at {', '.join(settings[arm])}" for arm in sorted(settings)]


def _outcome(one: Comparison) -> str:
    if not one.micro.is_known:
        return "no interval, a score is infinite"
    doubt = "" if one.micro.shows_difference else ", no difference shown"
    return result_tables.interval_text(one.micro) + doubt


def _numbers(run: Run, grid: ResultGrid, comparisons: Sequence[Comparison], content: Content) -> dict[str, Any]:
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
                        for _, field, _ in result_tables.WRITTEN
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
        "comparisons_log_perplexity": [asdict(one) for one in comparisons],
        "rows": [asdict(row) for row in run.rows],
        "manifest": dict(run.manifest),
    }
