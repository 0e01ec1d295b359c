"""A Markdown table of the costs of each arm of a recovery study: parameters, bytes, seconds, tokens/s of generation.

    python benchmarks/recovery_costs.py STUDY COST [--timed sni]

STUDY is the output folder of `recovery.py`, COST the JSON of `generation_cost.py` for the adapters of its folder
`--timed`: adapters of other folders have the same names, but are others. Measures nothing; numbers are means over the
seeds that have rows. Seconds of a sweep are those of all its trials.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mopcompress.report.number_format import ABSENT, size_in_bytes
from mopcompress.results import BenchRow, Sweep, folder_name, read_rows, read_sweeps, sweep_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("cost", type=Path)
    parser.add_argument("--timed", default="sni")
    arguments = parser.parse_args()
    print("\n".join(table(arguments.study, json.loads(arguments.cost.read_text(encoding="utf-8")), arguments.timed)))


def table(study: Path, cost: Mapping[str, Any], timed: str) -> Iterator[str]:
    """Yield a line for each arm and setting of each folder that has rows."""
    batches = list(cost["found"])
    speeds = [f"tokens/s, {batch}" for batch in batches]
    seconds = ["train, s", "sweep, s", "evaluate, s"]
    columns = ["folder", "setting", "arm", "seeds", "parameters", "adapter", *seconds, *speeds]
    yield f"| {' | '.join(columns)} |"
    yield f"|---|---|---|{'--:|' * (len(columns) - 3)}"
    for path in sorted(study.glob("*/rows.jsonl")):
        folder, sweeps = path.parent.name, read_sweeps(path.parent / "sweeps")
        cells: dict[tuple[str, str], list[BenchRow]] = defaultdict(list)
        for row in read_rows(path):
            cells[row.setting, row.arm].append(row)
        for (setting, arm), rows in cells.items():
            speed_texts = [speed(cost, batch, setting, arm) if folder == timed else ABSENT for batch in batches]
            costs = [
                *training_costs(rows),
                sweep_seconds(sweeps, setting, arm),
                f"{fmean(row.evaluate_seconds for row in rows):.0f}",
            ]
            yield f"| {' | '.join([folder, setting, arm, str(len(rows)), *costs, *speed_texts])} |"


def training_costs(rows: Sequence[BenchRow]) -> list[str]:
    """Return parameters, bytes and seconds of an arm's training."""
    return [
        f"{fmean(row.trained_parameters for row in rows):,.0f}",
        size_in_bytes(fmean(row.adapter_bytes for row in rows)),
        f"{fmean(row.train_seconds for row in rows):.0f}",
    ]


def sweep_seconds(sweeps: Mapping[str, Sweep], setting: str, arm: str) -> str:
    """Return the seconds of an arm's sweep, if there was one in this folder."""
    sweep = sweeps.get(sweep_name(setting, arm))
    return f"{sweep.seconds:.0f}" if sweep else ABSENT


def speed(cost: Mapping[str, Any], batch: str, setting: str, arm: str) -> str:
    """Return the median tokens per second of generation; without an arm, those of the bare model."""
    model = folder_name(setting)
    if model != cost["asked"]["model"]:
        return ABSENT
    name = "bare" if arm == "none" else f"{model}-{arm}-0"
    spread = cost["found"][batch].get(f"{name}, tokens/s")
    return f"{spread['median']:.1f}" if spread else ABSENT


if __name__ == "__main__":
    main()
