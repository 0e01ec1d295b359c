"""The recovery study: what a mixture, its rivals and our own arm win back, on two data sets.

    python benchmarks/recovery.py --output FOLDER [--only sni,dolly]

Runs benches in the order of what their claims are worth, each in a folder of its own under FOLDER; a run that was
stopped goes on with the next cell. Rows of at most 128 tokens, 300 test rows, 120 steps of 8 rows that no step sees
twice; learning rates are chosen for each arm and setting on 100 validation rows. About ten hours of two cores. At the
end, and with `--claims` alone, FOLDER/claims.md holds what was claimed against what was measured.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mopcompress.console import progress_on
from mopcompress.recipe import load_recipe
from mopcompress.recipe.commands import with_recovery
from mopcompress.report.formats import change_with_interval
from mopcompress.report.intervals import PairedBootstrap
from mopcompress.report.run import Run, read_run
from mopcompress.report.tables import Grid, compare, make_grid, recovery
from mopcompress.stages.bench import bench

ROOT = Path(__file__).parents[1]
MAIN = ("none", "single", "mop", "mop+")
GATE = ("single", "uniform", "shuffled")  # what shows the worth of the gate
CONTROLS = ("uniform", "shuffled", "lora", "norms", "eora", "prefix", "oracle", "idp", "input")
BATCH = 8
VARIANTS = {  # folders that ask what one thing is worth: an arm as it is, the arm there, and what that is
    "sni-rate": ("mop", "single", "single at the rate of mop"),
    "sni-wide": ("mop", "single", "single with as many parameters"),
    "sni-ungated": ("mop+", "mop+", "mop+ without a gate"),
    "sni-zero-gate": ("mop", "mop", "mop whose gate begins at zero"),
    "sni-frozen-gate": ("mop", "mop", "mop with a frozen gate"),
    "sni-clusters": ("mop", "mop", "mop without task labels"),
}
LM = ROOT.parent / "shared" / "data" / "lm"
TEXT, OTHER_TEXT = str(LM / "wikitext2_tokens_test.txt"), str(LM / "wikipedia_paragraphs_from_dolly_train.txt")


@dataclass(frozen=True)
class Part:
    """One bench; parts of one folder have the same settings and grids that add to each other."""

    folder: str
    grid: Mapping[str, object]
    recipe: str = "sni.yaml"
    steps: int = 120
    dense: tuple[str, ...] = field(default=())
    recovery: Mapping[str, object] = field(default_factory=dict)


def part(folder: str, ratios: str, arms: tuple[str, ...], seeds: str = "0", **more: object) -> Part:
    """A grid in the words of the command line."""
    settings = {name: more.pop(name) for name in ("recipe", "steps", "dense", "recovery") if name in more}
    return Part(folder, {"ratios": ratios, "arms": arms, "seeds": seeds, **more}, **settings)  # type: ignore[arg-type]


PARTS = (
    part("sni", "0.5", MAIN),
    part("sni", "0.85", MAIN),
    part("sni", "0.5", ("uniform", "shuffled")),
    part("sni", "0.5", MAIN, dense=("single", "mop", "mop+")),
    part("dolly", "0.5", MAIN, recipe="dolly.yaml"),
    part("sni-rate", "0.5", ("none", "single"), recovery={"sweep": False, "learning_rate": 0.5}),
    part("sni", "0.5", CONTROLS),
    part("sni", "0.5", ("single", "mop"), "1,2"),
    part("dolly", "0.85", MAIN, recipe="dolly.yaml", dense=("single", "mop", "mop+")),
    part("dolly", "0.5", ("single", "mop"), "1,2", recipe="dolly.yaml"),
    part("sni", "0.7,0.95", MAIN, bits="3,2"),
    part("sni-long", "0.5", ("none", "single", "mop"), steps=480),
    part("sni-2of4", "0.5", MAIN, recipe="sni_24.yaml"),
    part("sni-wide", "0.5", ("none", "single"), recovery={"prompts_per_expert": 21}),  # 11 experts' 10, and the gate
    part("sni-ungated", "0.5", ("none", "mop+"), recovery={"gate_temper": 0.0, "gate_learning_rate": 0.0}),
    part("sni-text", "0.5", MAIN, train_text=OTHER_TEXT),
    part("sni-zero-gate", "0.5", ("none", "mop"), recovery={"gate_temper": 0.0}),
    part("sni-frozen-gate", "0.5", ("none", "mop"), recovery={"gate_learning_rate": 0.0}),
    part("sni-clusters", "0.5", ("none", "mop"), recovery={"gate_labels": "clusters"}),
    part("sni", "0.85", ("single", "mop"), "1,2"),
    part("dolly", "0.85", ("single", "mop"), "1,2", recipe="dolly.yaml"),
)


def main() -> None:
    arguments = parse()
    with progress_on(sys.stderr, quiet=False) as progress:
        for one in PARTS:
            if arguments.claims or (arguments.only and one.folder not in arguments.only.split(",")):
                continue
            rows = {"train_rows": BATCH * one.steps, "validation_rows": 100, "test_rows": 300}
            # answers of SNI are short, and some have one right form; those of Dolly are long and free
            answered = one.folder.startswith("sni") and one.folder not in VARIANTS
            written = {"write_tokens": 32} if answered else {}
            settings = {**rows, **written, "text": TEXT, "dense_arms": one.dense or ("none",)}
            recipe = load_recipe(ROOT / "recipes" / one.recipe, {**settings, **one.grid})
            training = {"steps": one.steps, "batch_size": BATCH, "sweep": True, "sweep_steps": 30, **one.recovery}
            asked = with_recovery(recipe, training)
            bench(asked, arguments.output / one.folder, progress=progress)
    text = "\n".join(claims(arguments.output))
    (arguments.output / "claims.md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="", metavar="FOLDERS", help="of the parts, with commas between")
    parser.add_argument("--claims", action="store_true", help="only write claims.md again")
    return parser.parse_args()


def claims(output: Path) -> Iterator[str]:
    """Every claim in every setting it was measured in: the change of perplexity with its interval, or a share."""
    yield "| data | setting | claim | micro | macro | shown |"
    yield "|---|---|---|---|---|---|"
    for folder in dict.fromkeys(one.folder for one in PARTS):
        if (output / folder / "rows.jsonl").exists():
            run = read_run(output / folder)
            yield from _claims_of(folder, run, make_grid(run.rows, run.spec))
            if folder in VARIANTS:
                yield from _against_plain(output, folder, run)


def _claims_of(folder: str, run: Run, grid: Grid) -> Iterator[str]:
    """Less than 0 is better for the first of a pair; a claim with a number is shown when the change is as large."""
    wanted = -0.03 if folder.startswith("dolly") else -0.10
    for one in compare(run, grid):
        pair = f"{one.first} against {one.second}"
        if one.setting == "dense" or not (one.first == "mop+" or pair in {f"mop against {arm}" for arm in GATE}):
            continue
        large_enough = one.micro.estimate <= math.log1p(wanted) if one.second == "single" else True
        shown = "yes" if one.micro.high < 0 and large_enough else "no"
        asked = f"{pair}, {wanted:+.0%}" if pair == "mop against single" else pair
        changes = (change_with_interval(each.estimate, each.low, each.high) for each in (one.micro, one.macro))
        yield f"| {folder} | {one.setting} | {asked} | {' | '.join(changes)} | {shown} |"
    for setting, least in (("sparsegpt 50%", 0.8), ("sparsegpt 85%", 0.5)):
        regained = recovery(grid, setting, "mop+", dense_arm="mop+")
        if regained is not None:
            shown = "yes" if regained >= least else "no"
            yield f"| {folder} | {setting} | mop+ regains {least:.0%} of the dense mop+ | {regained:.0%} | | {shown} |"


def _against_plain(output: Path, folder: str, run: Run) -> Iterator[str]:
    """An arm as it is against one in another setting, on the same rows."""
    arm, there, called = VARIANTS[folder]
    setting = "sparsegpt 50%"
    plain, changed = (
        read_run(output / "sni").documents.get((setting, arm, 0)),
        run.documents.get((setting, there, 0)),
    )
    if plain is None or changed is None:
        return
    assert list(plain.scored_tokens) == list(changed.scored_tokens), f"{folder} was scored on other rows"
    bootstrap = PairedBootstrap(plain.tasks, plain.scored_tokens)
    pair = np.asarray(plain.nats), np.asarray(changed.nats)
    found = bootstrap.micro(*pair), bootstrap.macro(*pair)
    changes = " | ".join(change_with_interval(one.estimate, one.low, one.high) for one in found)
    yield f"| {folder} | {setting} | {arm} against {called} | {changes} | {'yes' if found[0].high < 0 else 'no'} |"


if __name__ == "__main__":
    main()
