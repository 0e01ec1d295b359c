"""The figures: perplexity against compression, what the mixture changes, what the gate does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from mopcompress.report.bootstrap import Interval
from mopcompress.report.number_format import ratio, share, shortened
from mopcompress.report.pivot import DENSE, Comparison, ResultGrid, perplexity_spread, spread
from mopcompress.report.plot_style import (
    COLOURS,
    INK,
    SOFT,
    arm_styles,
    gate_colours,
    set_change_ticks,
    set_log_ticks,
    styled,
    to_svg,
    use_ticks,
)
from mopcompress.report.result_tables import TOO_FEW, interval_text
from mopcompress.results import BenchRow, GateStatistics


@dataclass(frozen=True)
class Figure:
    """One drawn figure."""

    title: str
    caption: str
    svg: str


def figures(grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[Figure, ...]:
    """All figures there are rows for. The same rows give the same bytes."""
    with styled():
        drawn = (curve(grid), delta_bars(comparisons), gates(grid))
    return tuple(figure for figure in drawn if figure is not None)


def curve(grid: ResultGrid) -> Figure | None:
    """Perplexity (log) against counted sparsity or bits: a panel a method, a line an arm, a band over seeds."""
    panels: dict[str, list[str]] = {}
    for setting in grid.settings:
        rows = [row for arm in grid.arms for row in grid.rows(setting, arm)]
        if rows and setting != DENSE:
            panels.setdefault(_panel(rows[0]), []).append(setting)
    if not panels:
        return None
    columns = min(3, len(panels))
    canvas, axes = _panels(len(panels), columns=columns, width=1.0 + 4.6 * columns, height=3.3, sharey=True)
    for place, (ax, (method, settings)) in enumerate(zip(axes, panels.items(), strict=True)):
        _curve_panel(ax, grid, settings)
        ax.set_title(shortened(method, 40))
        ax.set_ylabel("" if place % columns else "perplexity, log scale")
    _log_axis(axes, grid)
    labelled = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {text: handle for handle, text in labelled}
    canvas.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
    caption = (
        "Lower is better. Lines: mean over seeds; bands: least to greatest seed. Pruning is drawn against the sparsity "
        "counted, quantisation against bits. Infinite perplexities are marked at the upper edge."
    )
    return Figure("Perplexity against compression", caption, to_svg(canvas, label="Perplexity against compression"))


def _panel(row: BenchRow) -> str:
    """The method; where pruned weights were rounded too, with the bits, so that a line goes over ratios alone."""
    return f"{row.method} {row.bits}-bit" if row.bits and row.ratio is not None else row.method


def _curve_panel(ax: Any, grid: ResultGrid, settings: Sequence[str]) -> None:
    quantised = any(row.ratio is None for arm in grid.arms for row in grid.rows(settings[0], arm))
    places: set[float] = set()
    for arm, style in arm_styles(grid.arms).items():
        found = [rows for setting in settings if (rows := grid.rows(setting, arm))]
        x = [_place(rows, quantised=quantised) for rows in found]
        y = [perplexity_spread(rows, lambda row: row.perplexity) for rows in found]
        places |= set(x)
        if not found:
            continue
        # NaN breaks the line where a perplexity is infinite; the marker at the edge stands there instead.
        ax.plot(x, [_finite(one.mean) for one in y], label=shortened(arm, 40), linewidth=1.8, markersize=5, **style)
        if any(one.low != one.high for one in y):
            low, high = [_finite(one.low) for one in y], [_finite(one.high) for one in y]
            ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        for lost in (place for place, one in zip(x, y, strict=True) if not math.isfinite(one.mean)):
            edge = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "color": style["color"]}
            text = f"{shortened(arm, 40)}: inf \N{UPWARDS ARROW}"
            ax.annotate(text, (lost, 1.0), xytext=(0, -10), ha="right", fontsize=8, **edge)
    if dense := grid.rows(DENSE, "none"):
        level = perplexity_spread(dense, lambda row: row.perplexity).mean
        ax.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense, none")
    use_ticks(ax.xaxis, sorted(places), lambda value: f"{value:.0f}" if quantised else f"{value:.3g} %")
    ax.set_xlabel("bits a weight asked for" if quantised else "sparsity counted")
    ax.margins(x=0.08)
    if quantised:
        ax.invert_xaxis()


def _log_axis(axes: Sequence[Any], grid: ResultGrid) -> None:
    values = [row.perplexity for rows in grid.cells.values() for row in rows if math.isfinite(row.perplexity)]
    low, high = min(values, default=1.0), max(values, default=10.0)
    margin = max(high / low, 1.05) ** 0.08
    axes[0].set_yscale("log")
    axes[0].set_ylim(low / margin, high * margin)
    for ax in axes:
        set_log_ticks(ax.yaxis, low / margin, high * margin)


def delta_bars(comparisons: Sequence[Comparison]) -> Figure | None:
    """Change of perplexity, mixture against single prompt: a bar a setting with its interval, micro and macro."""
    pairs = [one for one in comparisons if (one.first, one.second) == ("mop", "single") and one.micro.is_known]
    if not pairs:
        return None
    canvas = Canvas(figsize=(12.0, 1.0 + 0.34 * len(pairs)), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    _bars(left, [one.micro for one in pairs], [one.seeds for one in pairs])
    _bars(right, [one.macro for one in pairs], [() for _ in pairs])
    left.set_title("every token alike (micro)")
    right.set_title("every task alike (macro)")
    left.set_yticks(range(len(pairs)), [shortened(one.setting, 40) for one in pairs])
    left.set_ylim(len(pairs) - 0.4, -0.6)
    caption = (
        "Left of 0 the mixture is better. Line: 95 % interval over test documents; pale bar: no difference shown; "
        "circles: single seeds, those that both have if there are any."
    )
    if any(one.macro.lacks_documents for one in pairs):
        caption += f" Macro without lines: {TOO_FEW}."
    svg = to_svg(canvas, label="Change of perplexity, mixture against single prompt")
    return Figure("Mixture against single prompt", caption, svg)


def _bars(ax: Any, intervals: Sequence[Interval], seeds: Sequence[tuple[float, ...]]) -> None:
    for place, (interval, dots) in enumerate(zip(intervals, seeds, strict=True)):
        shown = interval.shows_difference
        ax.barh(place, interval.estimate, height=0.62, color=COLOURS["mop"], alpha=0.85 if shown else 0.3, linewidth=0)
        ax.plot([interval.low, interval.high], [place, place], color=INK, linewidth=1.3)
        if len(dots) > 1:
            look = {"color": "white", "markeredgecolor": INK, "markersize": 3.5, "markeredgewidth": 0.8}
            ax.plot(dots, [place] * len(dots), "o", **look)
        where = {"xycoords": ax.get_yaxis_transform(), "va": "center", "annotation_clip": False}
        colour = INK if shown else SOFT
        ax.annotate(interval_text(interval), (1.02, place), color=colour, fontsize=8.5, **where)
    ax.axvline(0, color=INK, linewidth=1)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    set_change_ticks(ax.xaxis)
    ax.set_xlabel("change of perplexity, spaced by logarithm")


def gates(grid: ResultGrid) -> Figure | None:
    """Gate weight, expert x task, first seed of every setting with a gate; the colours are centred at 1."""
    first = [rows[0] for setting in grid.settings for arm in grid.arms if (rows := grid.rows(setting, arm))]
    panels = [(row, row.gate) for row in first if row.gate is not None and len(row.gate.tasks)]
    if not panels:
        return None
    tasks = max(len(gate.tasks) for _, gate in panels)
    experts = max(len(gate.weights[0]) for _, gate in panels)
    columns = min(4 if len(panels) > 6 else 3, len(panels))
    width = 2.2 + columns * max(2.4, 0.36 * experts)
    canvas, axes = _panels(len(panels), columns=columns, width=width, height=0.75 + 0.25 * tasks, sharey=False)
    for place, (ax, (row, gate)) in enumerate(zip(axes, panels, strict=True)):
        image = _heatmap(ax, gate, experts=experts, named=place % columns == 0)
        ax.set_title(_gate_title(row, gate), fontsize=8, linespacing=1.4)
        ax.set_xlabel("expert" if place >= len(panels) - columns else "", fontsize=8)
    bar = canvas.colorbar(image, ax=axes, fraction=0.02, aspect=30, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.grid(visible=False)
    caption = (
        "Mean gate weight of each expert (columns) on each task (rows), first seed. 1: the expert counts as in a plain "
        "prompt; 0: it is absent; at most the number of experts. Accuracy: share of documents whose strongest expert "
        "is their task's. Entropy: the logarithm of the number of experts when the gate has no preference."
    )
    return Figure("What the gate does", caption, to_svg(canvas, label="Gate weights, expert by task"))


def _heatmap(ax: Any, gate: GateStatistics, *, experts: int, named: bool) -> Any:
    colours, norm = gate_colours(experts)
    weights = np.asarray(gate.weights, dtype=np.float64)
    image = ax.pcolormesh(weights, cmap=colours, norm=norm, edgecolors="white", linewidth=0.8)
    for (y, x), weight in np.ndenumerate(weights):
        colour = "white" if norm(weight) > 0.85 else INK
        ax.text(
            x + 0.5, y + 0.5, f"{weight:.1f}", ha="center", va="center", fontsize=6.5, color=colour, in_layout=False
        )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=7.5)
    ax.set_xticks(np.arange(weights.shape[1]) + 0.5, [str(expert + 1) for expert in range(weights.shape[1])])
    ax.set_yticks(np.arange(len(weights)) + 0.5, [shortened(task, 24) if named else "" for task in gate.tasks])
    return image


def _gate_title(row: BenchRow, gate: GateStatistics) -> str:
    name = row.setting if row.arm == "mop" else f"{row.setting}, {row.arm}"
    accuracy = "n/a" if gate.accuracy is None else share(gate.accuracy, decimals=0)
    return f"{shortened(name, 40)}\naccuracy {accuracy}, entropy {ratio(gate.entropy_nats)} nats"


def _panels(count: int, *, columns: int, width: float, height: float, sharey: bool) -> tuple[Canvas, list[Any]]:
    """A canvas with `count` axes in rows of `columns`, sizes in inches; 12 inches are the width of the page."""
    lines = math.ceil(count / columns)
    canvas = Canvas(figsize=(min(12.0, width), 0.5 + height * lines), layout="constrained")
    axes = list(canvas.subplots(lines, columns, sharey=sharey, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.remove()
    return canvas, axes[:count]


def _place(rows: Sequence[BenchRow], *, quantised: bool) -> float:
    return spread(rows, lambda row: float(row.bits or 0) if quantised else 100 * row.sparsity).mean


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
