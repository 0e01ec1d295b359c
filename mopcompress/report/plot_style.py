"""Colours, ticks, and SVG text of the figures. The same figure gives the same bytes."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from mopcompress.report.number_format import change, number

INK = "#1b1f24"
SOFT = "#5d6670"
RULE = "#d9dde2"
# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = {"none": "#8a8f96", "single": "#0072b2", "mop": "#e66100"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#56b4e9", "#5d3a9b", "#8c6d00")
MARKERS = {"none": "s", "single": "o", "mop": "D"}
OTHER_MARKERS = ("v", "P", "X", "<", ">")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "mopcompress",
    "text.parse_math": False,  # a task may be called $\frac{
}


@contextmanager
def report_style() -> Iterator[None]:
    """Apply matplotlib's own defaults plus `STYLE`, ignoring the user's matplotlibrc."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def to_svg(canvas: Canvas, *, label: str) -> str:
    """Return the figure as an `<svg>` element: no date, no prologue, no ids that would clash with another figure."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The font is only measured here; the reader's browser draws the text, with the fonts it has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # it holds the date
    quoted = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{quoted}"', 1).strip()


def arm_styles(arms: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the colour and marker of every arm: always the same for those of `COLOURS`, from a list for others."""
    others = [arm for arm in arms if arm not in COLOURS]
    colours = COLOURS | {arm: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, arm in enumerate(others)}
    markers = MARKERS | {arm: OTHER_MARKERS[index % len(OTHER_MARKERS)] for index, arm in enumerate(others)}
    return {arm: {"color": colours[arm], "marker": markers[arm]} for arm in arms}


def gate_colours(experts: int) -> tuple[LinearSegmentedColormap, TwoSlopeNorm]:
    """Return a scale that is white at 1, blue towards 0 and orange towards the number of experts."""
    stops = [(0.0, "#8fa9c9"), (0.5, "#fbfbf9"), (0.75, "#f5a860"), (1.0, "#b34700")]
    colours = LinearSegmentedColormap.from_list("gate", stops, N=47)  # from 49 steps on, the SVG holds a bitmap
    return colours, TwoSlopeNorm(1.0, vmin=0.0, vmax=float(max(experts, 2)))


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    """Put three to eight round ticks between `low` and `high`, labelled with numbers rather than powers."""
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(FixedLocator([]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """Return the coarsest round sequence with three ticks in range; evenly spaced ticks in a narrow range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(decades) // 6)
    for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [mantissa * 10.0**decade for decade in decades[::step] for mantissa in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def set_change_ticks(axis: Any) -> None:
    """Put ticks at round percentages on an axis of differences of log perplexity."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(FixedLocator(change_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: change(value) if value else "0"))


def change_ticks(low: float, high: float) -> list[float]:
    """Return differences with round percentages, or with factors that are powers of ten when the range is wide."""
    if max(-low, high) < 1.5:
        fractions = MaxNLocator(5).tick_values(math.expm1(low), math.expm1(high))
        logs = [math.log1p(float(fraction)) for fraction in fractions if fraction > -0.99]
    else:
        step = math.log(10) * max(1, round((high - low) / 12))
        logs = [power * step for power in range(math.floor(low / step), math.ceil(high / step) + 1)]
        logs += [-math.log(2), math.log(2)] if high - low < 6 else []
    return sorted(log for log in logs if low <= log <= high)


def short_number(value: float) -> str:
    """Show the number of a tick: no trailing zeros, an exponent from a million on."""
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if float(value).is_integer() else number(value).rstrip("0").rstrip(".")


def set_value_ticks(axis: Any, values: Sequence[float], show: Callable[[float], str]) -> None:
    """Put ticks exactly at the measured values, unless there are too many to read."""
    if len(values) <= 7:
        axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
