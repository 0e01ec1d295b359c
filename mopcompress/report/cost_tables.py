"""Tables of what arms cost: parameters, bytes and time, and the choice of their learning rates."""

from collections.abc import Mapping

from mopcompress.report.number_format import duration, number, size_in_bytes
from mopcompress.report.pivot import ResultGrid
from mopcompress.report.table import Line, Table, Text, seeds_text, table_order
from mopcompress.results import Sweep, Trial, sweep_name


def costs_table(grid: ResultGrid) -> Table:
    """Tabulate parameters, bytes and time by setting and arm."""
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
        "fallbacks",
    )
    lines = []
    for setting, arm, first in table_order(grid):
        rows = grid.rows(setting, arm)
        values = (
            seeds_text(rows, lambda row: row.trained_parameters, lambda value: f"{value:,.0f}"),
            seeds_text(rows, lambda row: row.train_steps, lambda value: f"{value:,.0f}"),
            seeds_text(rows, lambda row: row.adapter_bytes, size_in_bytes),
            seeds_text(rows, lambda row: row.model_bytes, size_in_bytes),
            seeds_text(rows, lambda row: row.train_seconds, duration),
            seeds_text(rows, lambda row: row.compress_seconds, duration),
            seeds_text(rows, lambda row: row.evaluate_seconds, duration),
            seeds_text(rows, lambda row: row.peak_bytes, size_in_bytes),
            seeds_text(rows, lambda row: row.fallbacks, lambda value: f"{value:,.3g}"),
        )
        lines.append(Line((Text(setting if first else ""), Text(arm), *values), first))
    note = (
        "Bytes are those of the files on disk, where a zero weight takes as much space as any other. Peak memory is "
        "that of the process so far, so it never falls from one cell to the next. Fallbacks: matrices that needed more "
        "damping than requested."
    )
    return Table("Cost", note, columns, 2, tuple(lines))


def sweeps_table(grid: ResultGrid, sweeps: Mapping[str, Sweep]) -> Table:
    """Tabulate every swept setting and arm: each rate with its validation loss, and the time of the trials."""
    lines: list[Line] = []
    for setting in grid.settings:
        swept = {arm: sweeps.get(sweep_name(setting, arm)) for arm in grid.arms_of(setting)}
        for index, (arm, sweep) in enumerate((arm, sweep) for arm, sweep in swept.items() if sweep):
            values = (
                Text(", ".join(_trial_text(trial) for trial in sweep.trials)),
                Text(f"{sweep.learning_rate:.3g}", "at the edge of what was tried" if sweep.at_edge else ""),
                Text(f"{sweep.steps:,}"),
                Text(f"{sweep.validation_rows:,}"),
                Text(duration(sweep.seconds)),
            )
            lines.append(Line((Text("" if index else setting), Text(arm), *values), starts_group=not index))
    columns = (
        "setting",
        "arm",
        "rates tried: validation nats",
        "best rate",
        "steps per rate",
        "validation rows",
        "time",
    )
    note = (
        "Every learning rate that was tried, with the mean nats per token of the validation rows after training with "
        "it. All seeds use the best rate. Time: that of all these trainings. If the trials have as many steps as the "
        "training, the best trial is the training of the first seed, and its seconds count in the table above too."
    )
    return Table("Cost of choosing learning rates", note, columns, 3, tuple(lines))


def _trial_text(trial: Trial) -> str:
    loss = "diverged" if trial.validation_nats is None else number(trial.validation_nats)
    return f"{trial.learning_rate:.3g}: {loss}"
