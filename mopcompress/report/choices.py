"""Which expert the documents of each task choose, as tables."""

from mopcompress.report.formats import ratio
from mopcompress.report.tables import Grid
from mopcompress.report.views import Line, Table, Text
from mopcompress.results import GateReading

NOTE = (
    "Test documents of each task (rows) by the expert that weighs most (columns), first seed. Load: the mean weight of "
    "an expert over all documents; those of a gate add up to the number of experts, so 1 is its equal share."
)


def gate_tables(grid: Grid) -> tuple[Table, ...]:
    """One table a setting and arm that chooses, if its rows say what."""
    first = [rows[0] for setting in grid.settings for arm in grid.arms_of(setting) if (rows := grid.rows(setting, arm))]
    return tuple(
        _table(f"{row.setting}, {row.arm}", row.gate) for row in first if row.gate is not None and row.gate.confusion
    )


def _table(title: str, gate: GateReading) -> Table:
    experts = [str(place + 1) for place in range(len(gate.load))]
    counts = [
        Line((Text(task), *(Text(str(count)) for count in line)))
        for task, line in zip(gate.tasks, gate.confusion, strict=True)
    ]
    load = Line((Text("load"), *(Text(ratio(weight)) for weight in gate.load)), starts_group=True)
    named = ", ".join(f"{expert} {task}" for expert, task in zip(experts, gate.domains, strict=False))
    note = f"The experts' own tasks: {named}." if named else "The experts have no tasks of their own."
    return Table(title, note, ("task", *experts), 1, (*counts, load))
