"""Commands run in this process, seen as a shell would see them."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mopcompress.cli import app

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"  # a grid for a tiny model


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def invoke(*words: object) -> Outcome:
    """Run `mopcompress WORDS`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        app([str(word) for word in words], prog_name="mopcompress")
    return Outcome(ended.value.code or 0, out.getvalue(), err.getvalue())


def set_fields(part: str, **fields: object) -> list[str]:
    """Return the words of `--set` that give these fields of a part of the recipe."""
    return [word for field, value in fields.items() for word in ("--set", f"{part}.{field}={value}")]


def write_data(folder: Path, *, rows: int = 8) -> Path:
    """Write two tasks in three splits, short enough for a model of 512 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "validation", "test")):
        lines = []
        for row in range(rows):
            cat = f"cat {100 * number + row}"
            task = ("say", "ask")[row % 2]
            lines.append({"task": task, "instruction": f"{task} {cat}", "input": "", "output": f"the {cat}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def left_behind(folder: Path) -> list[str]:
    """Return the paths that look like a finished result, or that an incomplete one left."""
    marks = ("manifest.json", "report.html", "report.json", "model.safetensors", "adapter.safetensors", "rows.jsonl")
    return [str(path) for path in folder.rglob("*") if path.name in marks or ".partial-" in path.name]


CALIBRATED = ("--num-calibration-samples", 4, "--max-seq-length", 32, "--device", "cpu")
QUICK_RECOVERY = (
    *("--steps", 2),
    *set_fields("recovery", prompts_per_expert=2, gate_pretraining_steps=3, train_batch_size=4),
)
