"""The recovery study: how much a mixture, its rivals and our own arm win back, on two data sets.

    python benchmarks/recovery.py --output FOLDER [--only sni,dolly-85]       (in the project's folder)

Runs benches in the order of the importance of their claims, each in a folder of its own under FOLDER. An interrupted
run resumes with the next cell. Rows of at most 128 tokens, 300 test rows, 120 steps of 8 rows that no step sees twice.

Learning rates: on SNI at 50 % those of `single`, `mop`, `lora` and `norms`, at 85 % of the first two, are chosen on 100
validation rows, by trainings as long as the one that counts (in the results, at 85 % by 30 steps). That of `mop+` is
chosen by such trials outside of this study (`2026-11-28-mop-plus`), those of `prefix`, `ia3` and `smop` by 30 steps.
Another setting, and Dolly, takes the rates of 50 or of 85 %, whichever model's log perplexity without an adapter is
nearer. Controls of the gate take the rate of `mop`; Dolly at 50 % is swept once more by itself.

About twenty hours on two cores. At the end, and with `--claims` alone, FOLDER/claims.md compares every claim with the
measurement.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mopcompress.cli.progress_display import progress_on
from mopcompress.entrypoints.bench.runner import bench
from mopcompress.errors import DataError
from mopcompress.recipe import Recipe, load_recipe
from mopcompress.recipe.overrides import override_recovery
from mopcompress.report.bootstrap import Interval, PairedBootstrap
from mopcompress.report.pivot import DENSE, ResultGrid, compare_arms, make_result_grid
from mopcompress.report.result_tables import interval_text
from mopcompress.report.run_folder import Run, read_run
from mopcompress.results import DocumentScores, read_rows, read_sweeps

ROOT = Path(__file__).parents[1]
PROMPTS = ("none", "single", "mop")
CONTROLS = ("shuffled", "oracle", "idp", "uniform")  # of the gate: at the rate of mop
BATCH = 8
CLIPPING = {"gate_clipping": "together", "grad_clip_percentile": 100}  # not the default: for all parts without another
APART = {"gate_clipping": "apart", "grad_clip_percentile": 100}
BY_DEFAULT = {"gate_clipping": "apart", "grad_clip_percentile": 50}
TWO_CLUSTERS = BY_DEFAULT | {
    "experts": 2,
    "prompts_per_expert": 40,
    "gate_labels": "clusters",
}  # of mixture_settings.py
ZERO_GATE = {"gate_logit_scale": 0.0}
UNGATED = {"gate_logit_scale": 0.0, "gate_learning_rate": 0.0}
QUERIES_AND_VALUES = {"adapter_targets": ("q_proj", "v_proj")}  # those that `lora` changes in its paper, and in `sni`
WRITERS = {"adapter_targets": ("o_proj", "down_proj")}  # those that it changes by default
PLUS, PLUS_DAMAGED = {"mop+": 0.003}, {"mop+": 0.009}  # of the trials in 2026-11-28-mop-plus, at 50 % and at 85 %
AS_LORA = {"lora": 0.01, "masklora": 0.01, "norms": 0.01}  # the first and the last by full sweeps, clipped to 1
ACROSS = (  # arms of two folders: the one that should be better, the other, and the other's name in claims
    (("sni", "mop"), ("sni-controls", "shuffled"), "shuffled"),
    (("sni", "mop"), ("sni", "single"), "uniform, which single is to the bit"),
    (("sni", "mop"), ("sni-controls", "idp"), "idp"),
    (("sni", "mop"), ("sni-controls", "oracle"), "oracle"),
    (("sni", "mop"), ("sni-wide", "single"), "single with as many parameters"),
    (("sni", "mop"), ("sni-apart", "mop"), "mop whose gate is clipped apart"),
    (("sni", "mop"), ("sni-autoclip", "mop"), "mop clipped by the norms so far, as by default"),
    (("sni", "mop"), ("sni-zero-gate", "mop"), "mop whose gate begins at zero"),
    (("sni", "mop"), ("sni-frozen-gate", "mop"), "mop with a frozen gate"),
    (("sni", "mop"), ("sni-clusters", "mop"), "mop without task labels"),
    (("sni-autoclip", "mop"), ("sni-input", "input"), "input"),
    (("sni-autoclip", "mop"), ("sni-deep", "mop"), "mop of every layer's own keys and values"),
    (("sni-harsh-shared", "mop"), ("sni-harsh", "mop"), "mop without a shared expert"),
    (("sni-harsh", "mop"), ("sni-harsh-shared", "single"), "single of ten tokens more"),
    (("sni-plus", "mop+"), ("sni-plus-ungated", "mop+"), "itself without a gate"),
    (("sni-plus", "mop+"), ("sni-weights", "lora"), "lora"),
    (("sni-plus", "mop+"), ("sni-weights", "masklora"), "masklora"),
    (("sni-plus", "mop+"), ("sni-weights", "norms"), "norms"),
    (("sni-plus", "mop+"), ("sni-lora-writers", "lora"), "lora, clipped to 1"),
    (("sni-plus", "mop+"), ("sni", "lora"), "lora on queries and values, clipped to 1"),
    (("sni-plus", "mop+"), ("sni", "norms"), "norms, clipped to 1"),
    (("sni-plus", "mop+"), ("sni-rivals", "prefix"), "prefix"),
    (("sni-plus", "mop+"), ("sni-input", "input"), "input"),
    (("sni-plus", "mop+"), ("sni-rivals", "ia3"), "ia3"),
    (("sni-plus", "mop+"), ("sni-rivals", "smop"), "smop"),
    (("sni-plus", "mop+"), ("sni-controls", "eora"), "eora"),
    (("sni-plus", "mop+"), ("sni-controls", "idp"), "idp, clipped to 1"),
    (("sni-plus", "mop+"), ("sni-autoclip", "mop"), "mop"),
    (("sni-plus", "mop+"), ("sni-autoclip", "single"), "single"),
    *(
        ((f"{folder}-plus", "mop+"), (folder, arm), f"{arm}, clipped to 1")
        for folder in ("sni-85", "sni-settings", "sni-2of4", "sni-harsh", "dolly-85")
        for arm in ("mop", "single")
    ),
    (("dolly-50-clusters", "mop"), ("dolly-50", "single"), "single (mop of two experts that k-means found)"),
    (("dolly-50-zero-gate", "mop"), ("dolly-50", "single"), "single (mop whose gate begins at zero)"),
    (("dolly-50-plus", "mop+"), ("dolly-50", "mop"), "mop"),
    (("dolly-50-plus", "mop+"), ("dolly-50", "single"), "single"),
)
# folders without an arm, with `mop+` and of the dense model with `mop+`; setting; fraction of the gap that is claimed
RECOVERED = (
    (("sni", "sni-plus", "sni-dense-plus"), "sparsegpt 50%", 0.8),
    (("sni-85", "sni-85-plus", "sni-dense-plus"), "sparsegpt 85%", 0.5),
)
ANSWERED = ("sni", "sni-apart", "sni-autoclip", "sni-plus", "sni-long")  # of short answers, some with one right form
LM = "../shared/data/lm"  # from the project's folder
TEXT, OTHER_TEXT = f"{LM}/wikitext2_tokens_test.txt", f"{LM}/wikipedia_paragraphs_from_dolly_train.txt"
SNI = {"data": "../shared/data/superni", "calibration": OTHER_TEXT, "max_length": 1024}
LOCAL = {  # the recipes name hub data sets; the study has local copies
    "sni.yaml": SNI,
    "sni_24.yaml": SNI,
    "dolly.yaml": SNI | {"data": "../shared/data/dolly15k"},
}


@dataclass(frozen=True)
class Part:
    """One bench; parts of the same folder have the same settings, and their grids complete each other."""

    folder: str
    grid: Mapping[str, object]
    recipe: str = "sni.yaml"
    steps: int = 120
    dense: tuple[str, ...] = field(default=())
    recovery: Mapping[str, object] = field(default_factory=dict)
    rates: str | Mapping[str, float] = ""  # by arm, or the folder whose sweeps found them; swept here if empty


def make_part(folder: str, ratios: str, arms: tuple[str, ...], seeds: str = "0", **more: object) -> Part:
    """Make a part from a grid in the words of the command line."""
    settings = {name: more.pop(name) for name in ("recipe", "steps", "dense", "recovery", "rates") if name in more}
    return Part(folder, {"ratios": ratios, "arms": arms, "seeds": seeds, **more}, **settings)  # type: ignore[arg-type]


def plus_part(folder: str, ratios: str, seeds: str = "0", *, rates: Mapping[str, float] = PLUS, **more: object) -> Part:
    """Make a part of `mop+` in one more setting, with its defaults."""
    return make_part(folder, ratios, ("mop+",), seeds, rates=rates, **{"recovery": BY_DEFAULT, **more})


PARTS = (
    make_part("sni", "0.5", PROMPTS, recovery=QUERIES_AND_VALUES),
    make_part("sni-controls", "0.5", ("eora", *CONTROLS), rates="sni"),
    make_part("sni", "0.5", ("norms", "lora"), recovery=QUERIES_AND_VALUES),
    make_part("sni-85", "0.85", PROMPTS),
    make_part("sni", "0.5", ("single", "mop"), "1,2", recovery=QUERIES_AND_VALUES),
    make_part("sni-apart", "0.5", ("single", "mop"), "0,1,2", rates="sni", recovery=APART),
    make_part("sni-85-apart", "0.85", ("single", "mop"), "0,1,2", rates="sni-85", recovery=APART),
    make_part("sni-autoclip", "0.5", ("single", "mop"), "0,1,2", rates="sni", recovery=BY_DEFAULT),
    make_part("sni-85-autoclip", "0.85", ("single", "mop"), "0,1,2", rates="sni-85", recovery=BY_DEFAULT),
    make_part("sni-lora-writers", "0.5", ("lora",), "0,1,2", recovery=WRITERS),
    plus_part("sni-plus", "0.5", "0,1,2"),
    plus_part("sni-85-plus", "0.85", "0,1,2", rates=PLUS_DAMAGED),
    make_part("sni-dense-plus", "0.5", ("none",), dense=("mop+",), rates=PLUS, recovery=BY_DEFAULT),
    plus_part("sni-settings-plus", "0.7", bits="3,2"),
    plus_part("sni-2of4-plus", "0.5", recipe="sni_24.yaml"),
    plus_part("sni-harsh-plus", "0.95", rates=PLUS_DAMAGED),
    plus_part("dolly-85-plus", "0.85", rates=PLUS_DAMAGED, recipe="dolly.yaml"),
    plus_part("dolly-50-plus", "0.5", recipe="dolly.yaml"),
    plus_part("sni-plus-ungated", "0.5", recovery=BY_DEFAULT | UNGATED),
    make_part("sni-weights", "0.5", ("lora",), "0,1,2", rates=AS_LORA, recovery=BY_DEFAULT),
    make_part("sni-weights", "0.5", ("masklora", "norms"), rates=AS_LORA, recovery=BY_DEFAULT),
    make_part("sni-rivals", "0.5", ("prefix", "ia3", "smop"), recovery=BY_DEFAULT | {"sweep_steps": 30}),
    make_part("sni-input", "0.5", ("input",), rates={"input": 0.03}, recovery=BY_DEFAULT),
    make_part(
        "sni-deep",
        "0.5",
        ("mop",),
        rates={"mop": 0.03},
        recovery=BY_DEFAULT | {"per_layer_prompts": True, "prompts_per_expert": 1},
    ),
    make_part("dolly-50", "0.5", PROMPTS, "0,1,2", rates="sni", recipe="dolly.yaml", recovery=BY_DEFAULT),
    make_part("dolly-50-clusters", "0.5", ("mop",), "0,1,2", rates="sni", recipe="dolly.yaml", recovery=TWO_CLUSTERS),
    make_part("dolly-50-zero-gate", "0.5", ("mop",), rates="sni", recipe="dolly.yaml", recovery=BY_DEFAULT | ZERO_GATE),
    make_part("dolly-50-swept", "0.5", ("single", "mop"), recipe="dolly.yaml", recovery=BY_DEFAULT),
    make_part("dolly-85", "0.85", PROMPTS, rates="sni-85", recipe="dolly.yaml"),
    make_part("sni-long", "0.5", PROMPTS, rates="sni", steps=480),
    make_part("sni-85", "0.85", ("single", "mop"), "1,2"),
    make_part("sni-settings", "0.7", PROMPTS, rates="sni", bits="3,2"),
    make_part("sni-harsh", "0.95", PROMPTS, rates="sni-85"),
    make_part("sni-harsh-frozen", "0.95", ("mop",), rates="sni-85", recovery={"gate_learning_rate": 0.0}),
    make_part("sni-harsh-shared", "0.95", ("single", "mop"), rates="sni-85", recovery={"shared_expert": True}),
    make_part("sni-2of4", "0.5", PROMPTS, rates="sni", recipe="sni_24.yaml"),
    make_part("sni-wide", "0.5", ("single",), rates="sni", recovery={"prompts_per_expert": 21}),  # 11 x 10, the gate
    make_part("sni-text", "0.5", PROMPTS, rates="sni", train_text=OTHER_TEXT),
    make_part("sni-zero-gate", "0.5", ("mop",), rates="sni", recovery=ZERO_GATE),
    make_part("sni-frozen-gate", "0.5", ("mop",), rates="sni", recovery={"gate_learning_rate": 0.0}),
    make_part("sni-clusters", "0.5", ("mop",), rates="sni", recovery={"gate_labels": "clusters"}),
    make_part("dolly-85", "0.85", ("single", "mop"), "1,2", rates="sni-85", recipe="dolly.yaml"),
)


def main() -> None:
    arguments = parse()
    with progress_on(sys.stderr, quiet=False) as progress:
        for part in PARTS:
            if arguments.claims or (arguments.only and part.folder not in arguments.only):
                continue
            bench(recipe_of(part, arguments.output), arguments.output / part.folder, progress=progress)
    text = "\n".join(claims(arguments.output))
    (arguments.output / "claims.md").write_text(text, encoding="utf-8")
    print(text)


def recipe_of(part: Part, output: Path) -> Recipe:
    """Return the recipe of a part: its data, grid, steps and learning rates."""
    rows = {"train_rows": BATCH * part.steps, "validation_rows": 100, "test_rows": 300}
    answers = {"max_new_tokens": 32} if part.folder in ANSWERED else {}
    settings = {**LOCAL[part.recipe], **rows, **answers, "eval_text": TEXT, "dense_arms": part.dense or ("none",)}
    recipe = load_recipe(ROOT / "recipes" / part.recipe, {**settings, **part.grid})
    rates = learning_rates(part, output)
    training = {"steps": part.steps, "train_batch_size": BATCH, **CLIPPING, **rates, **part.recovery}
    return override_recovery(recipe, training)


def learning_rates(part: Part, output: Path) -> dict[str, object]:
    """Return the recovery fields that give a part its learning rates."""
    if isinstance(part.rates, Mapping):
        return {"learning_rates": dict(part.rates)}
    return {"learning_rates": swept_rates(output / part.rates)} if part.rates else {"sweep": True}


def swept_rates(folder: Path) -> dict[str, float]:
    """Return the best learning rate of each arm in the sweeps of a bench with one setting."""
    sweeps = read_sweeps(folder / "sweeps").values()
    rates = {sweep.arm: sweep.learning_rate for sweep in sweeps if sweep.arm in PROMPTS}
    return rates | dict.fromkeys(CONTROLS, rates["mop"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", type=folders, default=(), metavar="FOLDERS", help="of the parts, with commas between")
    parser.add_argument("--claims", action="store_true", help="only write claims.md again")
    return parser.parse_args()


def folders(text: str) -> tuple[str, ...]:
    """Split names of folders; a name without a part is an error of the command line."""
    names, parts = tuple(text.split(",")), {part.folder for part in PARTS}
    if unknown := set(names) - parts:
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; there are {', '.join(sorted(parts))}")
    return names


def claims(output: Path) -> Iterator[str]:
    """Yield the lines of claims.md: the change of perplexity with its interval, or a recovered fraction.

    Micro and macro have a verdict each: a claim can be shown over tokens and not over tasks.
    """
    yield "Changes of perplexity with 95 % intervals, over the seeds that both arms have. *Shown*: the interval leaves"
    yield "out 0 and, where a claim has a number, the estimate is as low; the interval may reach above that number."
    yield ""
    yield "| data | setting | claim | micro | macro | micro shown | macro shown |"
    yield "|---|---|---|---|---|---|---|"
    for folder in dict.fromkeys(part.folder for part in PARTS):
        if (output / folder / "rows.jsonl").exists():
            run = read_run(output / folder)
            yield from _mixture_claims(folder, run, make_result_grid(run.rows, run.spec))
    for first, second, name in ACROSS:
        yield from _claims_across(output, first, second, name)
    for folders, setting, least in RECOVERED:
        yield from _recovered_claims(output, folders, setting, least)


def _mixture_claims(folder: str, run: Run, grid: ResultGrid) -> Iterator[str]:
    """Test whether the perplexity of `mop` is below that of `single` by the claimed fraction."""
    least = -0.03 if folder.startswith("dolly") else -0.10
    for pair in compare_arms(run, grid):
        if (pair.first, pair.second) == ("mop", "single") and pair.setting != DENSE:
            verdicts = _verdicts(pair.micro, pair.macro, least)
            yield f"| {folder} | {pair.setting} | mop against single, {least:+.0%} | {verdicts} |"


def _claims_across(output: Path, first: tuple[str, str], second: tuple[str, str], name: str) -> Iterator[str]:
    """Compare an arm with one of another folder, on the same rows, in every setting that both have."""
    (folder, arm), (other, _) = first, second
    scores_of_first, scores_of_second = (_scores_by_setting(output / path, arm) for path, arm in (first, second))
    for setting, by_seed in scores_of_first.items():
        seeds = sorted(by_seed.keys() & scores_of_second.get(setting, {}).keys())
        if not seeds:
            continue
        _check_one_model(output, (folder, other), setting)
        scores = by_seed[seeds[0]]
        others = scores_of_second[setting]
        assert list(scores.scored_tokens) == list(others[seeds[0]].scored_tokens), f"{other}: other rows"
        bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
        means = [np.mean([arm_scores[seed].nats for seed in seeds], axis=0) for arm_scores in (by_seed, others)]
        verdicts = _verdicts(bootstrap.micro(*means), bootstrap.macro(*means))
        counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        yield f"| {folder}, {other} | {setting} | {arm} against {name}, {counted} | {verdicts} |"


def _verdicts(micro: Interval, macro: Interval, least: float = 0.0) -> str:
    """Show both changes, then for each whether it is below 0 and at least as large as `least`, a fraction.

    Without an interval, because a task has too few documents, there is no verdict.
    """
    both = (micro, macro)
    shown = [
        "n/a"
        if interval.lacks_documents
        else "yes"
        if interval.high < 0 and interval.estimate <= math.log1p(least)
        else "no"
        for interval in both
    ]
    return " | ".join([*map(interval_text, both), *shown])


def _recovered_claims(output: Path, folders: Sequence[str], setting: str, least: float) -> Iterator[str]:
    """Test how much of the log perplexity between no arm and the dense model with `mop+` the same arm recovers."""
    bare, folder, dense_folder = folders
    if not all((output / name / "rows.jsonl").exists() for name in folders):
        return
    _check_one_model(output, (bare, folder), setting)
    arms = ((bare, setting, "none"), (folder, setting, "mop+"), (dense_folder, "dense", "mop+"))
    scores = [_scores_by_setting(output / name, arm).get(where, {}).get(0) for name, where, arm in arms]
    none, plus, dense = (sum(each.nats) if each else math.nan for each in scores)
    fraction = (none - plus) / (none - dense)
    if math.isfinite(fraction):
        shown = "yes" if fraction >= least else "no"
        yield f"| {folder} | {setting} | mop+ regains {least:.0%} of the dense mop+ | {fraction:.0%} | | {shown} | |"


def _check_one_model(output: Path, folders: Sequence[str], setting: str) -> None:
    """Raise `DataError` when arms of two folders have different weights below them, or rows do not record which.

    Models that were pruned with another number of threads differ, for example.
    """
    paths = [output / name / "rows.jsonl" for name in folders]
    rows = [row for path in paths for row in read_rows(path) if row.setting == setting]
    hashes = {row.model_sha256 for row in rows}
    if None in hashes:
        raise DataError(f"{' and '.join(folders)}: rows of {setting} without model_sha256; complete them")
    if len(hashes) > 1:
        raise DataError(f"{' and '.join(folders)}: {setting} is {len(hashes)} models; their arms cannot be compared")


def _scores_by_setting(folder: Path, arm: str) -> dict[str, dict[int, DocumentScores]]:
    """Return the scores of an arm by setting and seed; nothing for a folder without rows."""
    scores: dict[str, dict[int, DocumentScores]] = defaultdict(dict)
    if (folder / "rows.jsonl").exists():
        for cell, documents in read_run(folder).documents.items():
            if cell.arm == arm:
                scores[cell.setting][cell.seed] = documents
    return scores


if __name__ == "__main__":
    main()
