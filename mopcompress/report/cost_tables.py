"""Tables of what arms cost: parameters, bytes and time, and the choice of their learning rates."""

from collections.abc import Mapping

from mopcompress.report.number_format import duration, number, size_in_bytes
from mopcompress.report.pivot import ResultGrid
from mopcompress.report.table import Line, Table, Text, in_order, over_seeds
from mopcompress.results import Sweep, Trial, sweep_name


def costs_table(grid: ResultGrid) -> Table:
    """Setting x arm: parameters, bytes and time."""
    columns = (
        "setting",
        "arm",
        "trained parameters",
        "steps",
        "adapter",
        "model",
        "train",
        "compress",
        "evaluate",
        "peak memory",
    )
    lines = []
    for setting, arm, first in in_order(grid):
        rows = grid.rows(setting, arm)
        values = (
            over_seeds(rows, lambda row: row.trained_parameters, lambda value: f"{value:,.0f}"),
            over_seeds(rows, lambda row: row.train_steps, lambda value: f"{value:,.0f}"),
            over_seeds(rows, lambda row: row.adapter_bytes, size_in_bytes),
            over_seeds(rows, lambda row: row.model_bytes, size_in_bytes),
            over_seeds(rows, lambda row: row.train_seconds, duration),
            over_seeds(rows, lambda row: row.compress_seconds, duration),
            over_seeds(rows, lambda row: row.evaluate_seconds, duration),
            over_seeds(rows, lambda row: row.peak_bytes, size_in_bytes),
            over_seeds(rows, lambda row: row.fallbacks, lambda value: f"{value:,.3g}"),
        )
        lines.append(Line((Text(setting if first else ""), Text(arm), *values), first))
    note = (
        "Bytes are those of the files on disk: a zero weight still takes its place there. Fallbacks: matrices that "
        "needed more damping than asked for. Peak memory is of the process so far, so it never falls from one cell to "
        "the next."
    )
    return Table("Cost", note, (*columns, "fallbacks"), 2, tuple(lines))


def sweeps_table(grid: ResultGrid, sweeps: Mapping[str, Sweep]) -> Table:
    """Setting x arm that was swept: every rate tried with its validation nats, and what that took."""
    lines: list[Line] = []
    for setting in grid.settings:
        named = {arm: sweeps.get(sweep_name(setting, arm)) for arm in grid.arms_of(setting)}
        for place, (arm, one) in enumerate((arm, one) for arm, one in named.items() if one):
            values = (
                Text(", ".join(_trial(trial) for trial in one.trials)),
                Text(f"{one.learning_rate:.3g}", "at the edge of what was tried" if one.at_edge else ""),
                Text(f"{one.steps:,}"),
                Text(f"{one.validation_rows:,}"),
                Text(duration(one.seconds)),
            )
            lines.append(Line((Text("" if place else setting), Text(arm), *values), starts_group=not place))
    columns = ("setting", "arm", "rates tried: validation nats", "rate", "steps each", "rows", "in all")
    note = (
        "Every rate tried with the mean nats a token of the validation rows after training at it; the best is that of "
        "all seeds. In all: the time of these trainings. The best of them is the first seed's training if it has as "
        "many steps: its seconds then count above too."
    )
    return Table("Cost of choosing learning rates", note, columns, 3, tuple(lines))


def _trial(trial: Trial) -> str:
    found = "broke down" if trial.validation_nats is None else number(trial.validation_nats)
    return f"{trial.learning_rate:.3g}: {found}"
