"""How right, how sharp and how even a gate is, and which expert the documents of each task choose, as tables."""

import math

from mopcompress.report.number_format import number, ratio, share
from mopcompress.report.pivot import ResultGrid
from mopcompress.report.table import Line, Table, Text, over_seeds
from mopcompress.results import GateStatistics

NOTE = (
    "On the test documents; mean over seeds, with the least and the greatest in small type. Accuracy: share of "
    'documents whose strongest expert is their task\'s; "-" where experts have no tasks of their own. Entropy: of the '
    "experts' shares, mean over documents; ln(experts) when the gate has no preference. Greatest load: the "
    "greatest mean weight of an expert over all documents, in units of an equal share; 1 when the load is even, the "
    "number of experts when one takes all."
)
CONFUSION_NOTE = (
    "Test documents of each task (rows) by the expert that weighs most (columns), first seed. Load: the mean weight of "
    "an expert over all documents; those of a gate add up to the number of experts, so 1 is its equal share, and those "
    "of idp to 1."
)


def gates_table(grid: ResultGrid) -> Table:
    """Setting x arm that chooses: accuracy, entropy beside its greatest value, greatest load."""
    lines: list[Line] = []
    for setting in grid.settings:
        read = {arm: [row.gate for row in grid.rows(setting, arm) if row.gate] for arm in grid.arms_of(setting)}
        choosing = {arm: gates for arm, gates in read.items() if gates}
        for place, (arm, gates) in enumerate(choosing.items()):
            values = (
                over_seeds([gate.accuracy for gate in gates if gate.accuracy is not None], float, share),
                over_seeds(gates, lambda gate: gate.entropy_nats, number),
                over_seeds(gates, lambda gate: math.log(len(gate.weights[0])), number),
                over_seeds([gate for gate in gates if gate.load], _greatest_load, ratio),
            )
            lines.append(Line((Text("" if place else setting), Text(arm), *values), starts_group=not place))
    columns = ("setting", "arm", "accuracy", "entropy, nats", "ln(experts)", "greatest load")
    return Table("What the gate chooses", NOTE, columns, 2, tuple(lines))


def _greatest_load(gate: GateStatistics) -> float:
    # the weights of `idp` add up to 1 a document, those of other arms to the number of experts
    return len(gate.load) * max(gate.load) / math.fsum(gate.load)


def confusion_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """One table a setting and arm that chooses, if its rows say what."""
    first = [rows[0] for setting in grid.settings for arm in grid.arms_of(setting) if (rows := grid.rows(setting, arm))]
    return tuple(
        _table(f"{row.setting}, {row.arm}", row.gate) for row in first if row.gate is not None and row.gate.confusion
    )


def _table(title: str, gate: GateStatistics) -> Table:
    experts = [str(place + 1) for place in range(len(gate.load))]
    counts = [
        Line((Text(task), *(Text(str(count)) for count in line)))
        for task, line in zip(gate.tasks, gate.confusion, strict=True)
    ]
    load = Line((Text("load"), *(Text(ratio(weight)) for weight in gate.load)), starts_group=True)
    named = ", ".join(f"{expert} {task}" for expert, task in zip(experts, gate.domains, strict=False))
    note = f"The experts' own tasks: {named}." if named else "The experts have no tasks of their own."
    return Table(title, note, ("task", *experts), 1, (*counts, load))
