"""The figures: perplexity against compression, mixture against single prompt, and the weights of the gate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from mopcompress.report.bootstrap import Interval
from mopcompress.report.number_format import percent, ratio, shortened
from mopcompress.report.pivot import DENSE, Comparison, ResultGrid, perplexity_spread, spread
from mopcompress.report.plot_style import (
    COLOURS,
    INK,
    SOFT,
    arm_styles,
    gate_colours,
    report_style,
    set_change_ticks,
    set_log_ticks,
    set_value_ticks,
    to_svg,
)
from mopcompress.report.result_tables import TOO_FEW, interval_text
from mopcompress.results import BenchRow, GateStatistics


@dataclass(frozen=True)
class Figure:
    """A figure as SVG text, with its title and caption."""

    title: str
    caption: str
    svg: str


def draw_figures(grid: ResultGrid, comparisons: Sequence[Comparison]) -> tuple[Figure, ...]:
    """Draw every figure that has rows. The same rows give the same bytes."""
    with report_style():
        drawn = (perplexity_figure(grid), change_figure(comparisons), gate_figure(grid))
    return tuple(figure for figure in drawn if figure is not None)


def perplexity_figure(grid: ResultGrid) -> Figure | None:
    """Draw perplexity (log) against sparsity or bits: a panel per method, a line per arm, a band over seeds."""
    panels: dict[str, list[str]] = {}
    for setting in grid.settings:
        rows = [row for arm in grid.arms for row in grid.rows(setting, arm)]
        if rows and setting != DENSE:
            panels.setdefault(_panel_title(rows[0]), []).append(setting)
    if not panels:
        return None
    columns = min(3, len(panels))
    canvas, axes = _make_panels(len(panels), columns=columns, width=1.0 + 4.6 * columns, height=3.3, sharey=True)
    for index, (ax, (method, settings)) in enumerate(zip(axes, panels.items(), strict=True)):
        _draw_arms(ax, grid, settings)
        ax.set_title(shortened(method, 40))
        ax.set_ylabel("" if index % columns else "perplexity, log scale")
    _set_log_axis(axes, grid)
    labelled = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {text: handle for handle, text in labelled}
    canvas.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles))
    caption = (
        "Lower is better. Lines: mean over seeds; bands: from the lowest to the highest seed. Pruning is drawn against "
        "the sparsity that was counted, quantization against bits. Infinite perplexities are marked at the upper edge."
    )
    return Figure("Perplexity against compression", caption, to_svg(canvas, label="Perplexity against compression"))


def _panel_title(row: BenchRow) -> str:
    """Return the method, and the bits if pruned weights were quantized too, so that a line varies the ratio alone."""
    return f"{row.method} {row.bits}-bit" if row.bits and row.ratio is not None else row.method


def _draw_arms(ax: Any, grid: ResultGrid, settings: Sequence[str]) -> None:
    quantized = any(row.ratio is None for arm in grid.arms for row in grid.rows(settings[0], arm))
    levels: set[float] = set()
    for arm, style in arm_styles(grid.arms).items():
        measured = [rows for setting in settings if (rows := grid.rows(setting, arm))]
        if not measured:
            continue
        x = [_compression_level(rows, quantized=quantized) for rows in measured]
        spreads = [perplexity_spread(rows, lambda row: row.perplexity) for rows in measured]
        levels |= set(x)
        mean, low, high = ([_nan_if_infinite(getattr(y, end)) for y in spreads] for end in ("mean", "low", "high"))
        # NaN breaks the line at an infinite perplexity; a marker at the edge replaces it
        ax.plot(x, mean, label=shortened(arm, 40), linewidth=1.8, markersize=5, **style)
        if any(y.low != y.high for y in spreads):
            ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        for level in (level for level, y in zip(x, spreads, strict=True) if not math.isfinite(y.mean)):
            edge = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "color": style["color"]}
            text = f"{shortened(arm, 40)}: inf \N{UPWARDS ARROW}"
            ax.annotate(text, (level, 1.0), xytext=(0, -10), ha="right", fontsize=8, **edge)
    if dense := grid.rows(DENSE, "none"):
        dense_perplexity = perplexity_spread(dense, lambda row: row.perplexity).mean
        ax.axhline(dense_perplexity, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense, none")
    set_value_ticks(ax.xaxis, sorted(levels), lambda value: f"{value:.0f}" if quantized else f"{value:.3g} %")
    ax.set_xlabel("bits per weight, as requested" if quantized else "sparsity, as counted")
    ax.margins(x=0.08)
    if quantized:
        ax.invert_xaxis()


def _set_log_axis(axes: Sequence[Any], grid: ResultGrid) -> None:
    values = [row.perplexity for rows in grid.cells.values() for row in rows if math.isfinite(row.perplexity)]
    low, high = min(values, default=1.0), max(values, default=10.0)
    margin = max(high / low, 1.05) ** 0.08
    axes[0].set_yscale("log")
    axes[0].set_ylim(low / margin, high * margin)
    for ax in axes:
        set_log_ticks(ax.yaxis, low / margin, high * margin)


def change_figure(comparisons: Sequence[Comparison]) -> Figure | None:
    """Draw the change of perplexity from single prompt to mixture: a bar per setting, micro and macro."""
    mixture = [pair for pair in comparisons if (pair.first, pair.second) == ("mop", "single")]
    pairs = [pair for pair in mixture if pair.micro.is_known]
    if not pairs:
        return None
    canvas = Canvas(figsize=(12.0, 1.0 + 0.34 * len(pairs)), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    _draw_bars(left, [pair.micro for pair in pairs], [pair.seeds for pair in pairs])
    _draw_bars(right, [pair.macro for pair in pairs], [() for _ in pairs])
    left.set_title("micro: every token counts the same")
    right.set_title("macro: every task counts the same")
    left.set_yticks(range(len(pairs)), [shortened(pair.setting, 40) for pair in pairs])
    left.set_ylim(len(pairs) - 0.4, -0.6)
    caption = (
        "Left of 0 the mixture is better. Line: 95 % interval over test documents. Pale bar: the interval contains 0, "
        "so no difference is shown. Circles: single seeds (those that both arms have, if there are any)."
    )
    if any(pair.macro.lacks_documents for pair in pairs):
        caption += f" Macro without lines: {TOO_FEW}."
    svg = to_svg(canvas, label="Change of perplexity, mixture against single prompt")
    return Figure("Mixture against single prompt", caption, svg)


def _draw_bars(ax: Any, intervals: Sequence[Interval], seeds: Sequence[tuple[float, ...]]) -> None:
    for y, (interval, dots) in enumerate(zip(intervals, seeds, strict=True)):
        shown = interval.shows_difference
        ax.barh(y, interval.estimate, height=0.62, color=COLOURS["mop"], alpha=0.85 if shown else 0.3, linewidth=0)
        ax.plot([interval.low, interval.high], [y, y], color=INK, linewidth=1.3)
        if len(dots) > 1:
            circle = {"color": "white", "markeredgecolor": INK, "markersize": 3.5, "markeredgewidth": 0.8}
            ax.plot(dots, [y] * len(dots), "o", **circle)
        position = {"xycoords": ax.get_yaxis_transform(), "va": "center", "annotation_clip": False}
        colour = INK if shown else SOFT
        ax.annotate(interval_text(interval), (1.02, y), color=colour, fontsize=8.5, **position)
    ax.axvline(0, color=INK, linewidth=1)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    set_change_ticks(ax.xaxis)
    ax.set_xlabel("change of perplexity, log scale")


def gate_figure(grid: ResultGrid) -> Figure | None:
    """Draw the gate weights, expert by task, for the first seed of every setting and arm with a gate."""
    first = [rows[0] for setting in grid.settings for arm in grid.arms if (rows := grid.rows(setting, arm))]
    panels = [(row, row.gate) for row in first if row.gate is not None and len(row.gate.tasks)]
    if not panels:
        return None
    tasks = max(len(gate.tasks) for _, gate in panels)
    experts = max(len(gate.weights[0]) for _, gate in panels)
    columns = min(4 if len(panels) > 6 else 3, len(panels))
    width = 2.2 + columns * max(2.4, 0.36 * experts)
    canvas, axes = _make_panels(len(panels), columns=columns, width=width, height=0.75 + 0.25 * tasks, sharey=False)
    for index, (ax, (row, gate)) in enumerate(zip(axes, panels, strict=True)):
        image = _draw_heatmap(ax, gate, experts=experts, named=index % columns == 0)
        ax.set_title(_gate_title(row, gate), fontsize=8, linespacing=1.4)
        ax.set_xlabel("expert" if index >= len(panels) - columns else "", fontsize=8)
    bar = canvas.colorbar(image, ax=axes, fraction=0.02, aspect=30, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.grid(visible=False)
    caption = (
        "Mean gate weight of each expert (columns) on each task (rows), first seed. 1: the expert counts as in a plain "
        "prompt; 0: it is absent; the highest possible weight is the number of experts. Accuracy: fraction of "
        "documents whose strongest expert is that of their task. Entropy: log(number of experts) when all weights are "
        "equal."
    )
    return Figure("Weights of the gate", caption, to_svg(canvas, label="Gate weights, expert by task"))


def _draw_heatmap(ax: Any, gate: GateStatistics, *, experts: int, named: bool) -> Any:
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
    accuracy = "n/a" if gate.accuracy is None else percent(gate.accuracy, decimals=0)
    return f"{shortened(name, 40)}\naccuracy {accuracy}, entropy {ratio(gate.entropy_nats)} nats"


def _make_panels(count: int, *, columns: int, width: float, height: float, sharey: bool) -> tuple[Canvas, list[Any]]:
    """Make a canvas with `count` axes in rows of `columns`; sizes in inches, the page is 12 inches wide."""
    lines = math.ceil(count / columns)
    canvas = Canvas(figsize=(min(12.0, width), 0.5 + height * lines), layout="constrained")
    axes = list(canvas.subplots(lines, columns, sharey=sharey, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.remove()
    return canvas, axes[:count]


def _compression_level(rows: Sequence[BenchRow], *, quantized: bool) -> float:
    """Return the bits, or the mean sparsity in per cent."""
    return spread(rows, lambda row: float(row.bits or 0) if quantized else 100 * row.sparsity).mean


def _nan_if_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
