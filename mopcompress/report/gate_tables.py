"""Tables of what a gate chooses: its accuracy, entropy and load, and the experts of each task's documents."""

import math

from mopcompress.report.number_format import number, percent, ratio
from mopcompress.report.pivot import ResultGrid
from mopcompress.report.table import Line, Table, Text, seeds_text
from mopcompress.results import GateStatistics

NOTE = (
    "On the test documents; mean over seeds, with the lowest and the highest in small type. An expert is one group of "
    "prompts, or one set of scales of mop+; the gate gives every expert its weight. Accuracy: fraction of documents "
    'whose strongest expert is that of their task; "-" if experts have no tasks of their own. Entropy: of the weights '
    "of a document as fractions of their sum, mean over documents; ln(experts) when all weights are equal. Highest "
    "load: the highest mean weight of an expert over all documents, as a multiple of an equal part; 1 when the load is "
    "even, the number of experts when one expert takes everything."
)
CONFUSION_NOTE = (
    "Number of test documents of each task (rows) by the expert with the highest weight (columns), first seed. Load: "
    "the mean weight of an expert over all documents. The loads of a gate add up to the number of experts, so 1 is an "
    "equal part; those of idp add up to 1."
)


def gates_table(grid: ResultGrid) -> Table:
    """Tabulate every setting and arm that weighs experts: accuracy, entropy and its maximum, highest load."""
    lines: list[Line] = []
    for setting in grid.settings:
        measured = {arm: [row.gate for row in grid.rows(setting, arm) if row.gate] for arm in grid.arms_of(setting)}
        arms = {arm: gates for arm, gates in measured.items() if gates}
        for index, (arm, gates) in enumerate(arms.items()):
            values = (
                seeds_text([gate.accuracy for gate in gates if gate.accuracy is not None], float, percent),
                seeds_text(gates, lambda gate: gate.entropy_nats, number),
                seeds_text(gates, lambda gate: math.log(len(gate.weights[0])), number),
                seeds_text([gate for gate in gates if gate.load], _highest_load, ratio),
            )
            lines.append(Line((Text("" if index else setting), Text(arm), *values), starts_group=not index))
    columns = ("setting", "arm", "accuracy", "entropy, nats", "ln(experts)", "highest load")
    return Table("Choices of the gate", NOTE, columns, 2, tuple(lines))


def _highest_load(gate: GateStatistics) -> float:
    # the weights of `idp` add up to 1 per document, those of other arms to the number of experts
    return len(gate.load) * max(gate.load) / math.fsum(gate.load)


def confusion_tables(grid: ResultGrid) -> tuple[Table, ...]:
    """Tabulate tasks by chosen experts, a table per setting and arm whose rows have these counts."""
    first = [rows[0] for setting in grid.settings for arm in grid.arms_of(setting) if (rows := grid.rows(setting, arm))]
    return tuple(
        _confusion_table(f"{row.setting}, {row.arm}", row.gate)
        for row in first
        if row.gate is not None and row.gate.confusion
    )


def _confusion_table(title: str, gate: GateStatistics) -> Table:
    experts = [str(index + 1) for index in range(len(gate.load))]
    counts = [
        Line((Text(task), *(Text(str(count)) for count in line)))
        for task, line in zip(gate.tasks, gate.confusion, strict=True)
    ]
    load = Line((Text("load"), *(Text(ratio(weight)) for weight in gate.load)), starts_group=True)
    domains = ", ".join(f"{expert} {task}" for expert, task in zip(experts, gate.domains, strict=False))
    note = f"The tasks of the experts: {domains}." if domains else "The experts have no tasks of their own."
    return Table(title, note, ("task", *experts), 1, (*counts, load))
