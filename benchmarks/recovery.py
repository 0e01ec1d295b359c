"""The recovery study: what a mixture, its rivals and our own arm win back, on two data sets.

    python benchmarks/recovery.py --output FOLDER [--only sni,dolly-85]       (in the project's folder)

Runs benches in the order of what their claims are worth, each in a folder of its own under FOLDER; a run that was
stopped goes on with the next cell. Rows of at most 128 tokens, 300 test rows, 120 steps of 8 rows that no step sees
twice. On SNI at 50 % the learning rates of `single`, `mop`, `lora` and `norms`, at 85 % of the first two, are chosen on
100 validation rows, by trainings as long as the one that counts (in the results, at 85 % by 30 steps); that of `mop+`
by such trials outside of this study (`2026-11-28-mop-plus`), those of `prefix`, `ia3` and `smop` by 30 steps. Another
setting, and Dolly, takes the rates of whichever of 50 and 85 % its bare model's log perplexity is nearer to, and
controls of the gate that of `mop`; Dolly at 50 % is swept once more by itself. About twenty hours of two cores.
At the end, and with `--claims` alone, FOLDER/claims.md holds what was claimed against what was measured.
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
from mopcompress.recipe import load_recipe
from mopcompress.recipe.overrides import override_recovery
from mopcompress.report.bootstrap import Interval, PairedBootstrap
from mopcompress.report.pivot import DENSE, ResultGrid, compare, make_result_grid
from mopcompress.report.result_tables import interval_text
from mopcompress.report.run_folder import Run, read_run
from mopcompress.results import DocumentScores, read_rows, read_sweeps

ROOT = Path(__file__).parents[1]
PROMPTS = ("none", "single", "mop")
CONTROLS = ("shuffled", "oracle", "idp", "uniform")  # of the gate: at the rate of mop
BATCH = 8
CLIPPING = {"gate_clipping": "together", "clip_percentile": 100}  # not the default: of all parts that say nothing of it
APART = {"gate_clipping": "apart", "clip_percentile": 100}
BY_DEFAULT = {"gate_clipping": "apart", "clip_percentile": 50}
TWO_CLUSTERS = BY_DEFAULT | {
    "experts": 2,
    "prompts_per_expert": 40,
    "gate_labels": "clusters",
}  # of mixture_settings.py
ZERO_GATE = {"gate_temper": 0.0}
UNGATED = {"gate_temper": 0.0, "gate_learning_rate": 0.0}
QUERIES_AND_VALUES = {"adapter_targets": ("q_proj", "v_proj")}  # what `lora` changes in its paper, and in `sni`
WRITERS = {"adapter_targets": ("o_proj", "down_proj")}  # what it changes here unless told otherwise
PLUS, PLUS_DAMAGED = {"mop+": 0.003}, {"mop+": 0.009}  # of the trials in 2026-11-28-mop-plus, at 50 % and at 85 %
AS_LORA = {"lora": 0.01, "masklora": 0.01, "norms": 0.01}  # the first and the last by full sweeps, clipped to 1
ACROSS = (  # arms of two folders, first the one that should be better, and what the other is called
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
REGAINED = (  # of the gap to the dense model with `mop+`: folders of no arm, of `mop+` and of the dense model, least
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
    """One bench; parts of one folder have the same settings and grids that add to each other."""

    folder: str
    grid: Mapping[str, object]
    recipe: str = "sni.yaml"
    steps: int = 120
    dense: tuple[str, ...] = field(default=())
    recovery: Mapping[str, object] = field(default_factory=dict)
    rates: str | Mapping[str, float] = ""  # by arm, or the folder whose sweeps found them; swept here if empty


def part(folder: str, ratios: str, arms: tuple[str, ...], seeds: str = "0", **more: object) -> Part:
    """A grid in the words of the command line."""
    settings = {name: more.pop(name) for name in ("recipe", "steps", "dense", "recovery", "rates") if name in more}
    return Part(folder, {"ratios": ratios, "arms": arms, "seeds": seeds, **more}, **settings)  # type: ignore[arg-type]


def plus(folder: str, ratios: str, seeds: str = "0", *, rates: Mapping[str, float] = PLUS, **more: object) -> Part:
    """`mop+` in one more setting, as it is by default."""
    return part(folder, ratios, ("mop+",), seeds, rates=rates, **{"recovery": BY_DEFAULT, **more})


PARTS = (
    part("sni", "0.5", PROMPTS, recovery=QUERIES_AND_VALUES),
    part("sni-controls", "0.5", ("eora", *CONTROLS), rates="sni"),
    part("sni", "0.5", ("norms", "lora"), recovery=QUERIES_AND_VALUES),
    part("sni-85", "0.85", PROMPTS),
    part("sni", "0.5", ("single", "mop"), "1,2", recovery=QUERIES_AND_VALUES),
    part("sni-apart", "0.5", ("single", "mop"), "0,1,2", rates="sni", recovery=APART),
    part("sni-85-apart", "0.85", ("single", "mop"), "0,1,2", rates="sni-85", recovery=APART),
    part("sni-autoclip", "0.5", ("single", "mop"), "0,1,2", rates="sni", recovery=BY_DEFAULT),
    part("sni-85-autoclip", "0.85", ("single", "mop"), "0,1,2", rates="sni-85", recovery=BY_DEFAULT),
    part("sni-lora-writers", "0.5", ("lora",), "0,1,2", recovery=WRITERS),
    plus("sni-plus", "0.5", "0,1,2"),
    plus("sni-85-plus", "0.85", "0,1,2", rates=PLUS_DAMAGED),
    part("sni-dense-plus", "0.5", ("none",), dense=("mop+",), rates=PLUS, recovery=BY_DEFAULT),
    plus("sni-settings-plus", "0.7", bits="3,2"),
    plus("sni-2of4-plus", "0.5", recipe="sni_24.yaml"),
    plus("sni-harsh-plus", "0.95", rates=PLUS_DAMAGED),
    plus("dolly-85-plus", "0.85", rates=PLUS_DAMAGED, recipe="dolly.yaml"),
    plus("dolly-50-plus", "0.5", recipe="dolly.yaml"),
    plus("sni-plus-ungated", "0.5", recovery=BY_DEFAULT | UNGATED),
    part("sni-weights", "0.5", ("lora",), "0,1,2", rates=AS_LORA, recovery=BY_DEFAULT),
    part("sni-weights", "0.5", ("masklora", "norms"), rates=AS_LORA, recovery=BY_DEFAULT),
    part("sni-rivals", "0.5", ("prefix", "ia3", "smop"), recovery=BY_DEFAULT | {"sweep_steps": 30}),
    part("sni-input", "0.5", ("input",), rates={"input": 0.03}, recovery=BY_DEFAULT),
    part(
        "sni-deep", "0.5", ("mop",), rates={"mop": 0.03}, recovery=BY_DEFAULT | {"deep": True, "prompts_per_expert": 1}
    ),
    part("dolly-50", "0.5", PROMPTS, "0,1,2", rates="sni", recipe="dolly.yaml", recovery=BY_DEFAULT),
    part("dolly-50-clusters", "0.5", ("mop",), "0,1,2", rates="sni", recipe="dolly.yaml", recovery=TWO_CLUSTERS),
    part("dolly-50-zero-gate", "0.5", ("mop",), rates="sni", recipe="dolly.yaml", recovery=BY_DEFAULT | ZERO_GATE),
    part("dolly-50-swept", "0.5", ("single", "mop"), recipe="dolly.yaml", recovery=BY_DEFAULT),
    part("dolly-85", "0.85", PROMPTS, rates="sni-85", recipe="dolly.yaml"),
    part("sni-long", "0.5", PROMPTS, rates="sni", steps=480),
    part("sni-85", "0.85", ("single", "mop"), "1,2"),
    part("sni-settings", "0.7", PROMPTS, rates="sni", bits="3,2"),
    part("sni-harsh", "0.95", PROMPTS, rates="sni-85"),
    part("sni-harsh-frozen", "0.95", ("mop",), rates="sni-85", recovery={"gate_learning_rate": 0.0}),
    part("sni-harsh-shared", "0.95", ("single", "mop"), rates="sni-85", recovery={"shared_expert": True}),
    part("sni-2of4", "0.5", PROMPTS, rates="sni", recipe="sni_24.yaml"),
    part("sni-wide", "0.5", ("single",), rates="sni", recovery={"prompts_per_expert": 21}),  # 11 x 10, the gate
    part("sni-text", "0.5", PROMPTS, rates="sni", train_text=OTHER_TEXT),
    part("sni-zero-gate", "0.5", ("mop",), rates="sni", recovery=ZERO_GATE),
    part("sni-frozen-gate", "0.5", ("mop",), rates="sni", recovery={"gate_learning_rate": 0.0}),
    part("sni-clusters", "0.5", ("mop",), rates="sni", recovery={"gate_labels": "clusters"}),
    part("dolly-85", "0.85", ("single", "mop"), "1,2", rates="sni-85", recipe="dolly.yaml"),
)


def main() -> None:
    arguments = parse()
    with progress_on(sys.stderr, quiet=False) as progress:
        for one in PARTS:
            if arguments.claims or (arguments.only and one.folder not in arguments.only):
                continue
            rows = {"train_rows": BATCH * one.steps, "validation_rows": 100, "test_rows": 300}
            written = {"write_tokens": 32} if one.folder in ANSWERED else {}
            settings = {**LOCAL[one.recipe], **rows, **written, "text": TEXT, "dense_arms": one.dense or ("none",)}
            recipe = load_recipe(ROOT / "recipes" / one.recipe, {**settings, **one.grid})
            rates = rates_of(one, arguments.output)
            training = {"steps": one.steps, "batch_size": BATCH, **CLIPPING, **rates, **one.recovery}
            asked = override_recovery(recipe, training)
            bench(asked, arguments.output / one.folder, progress=progress)
    text = "\n".join(claims(arguments.output))
    (arguments.output / "claims.md").write_text(text, encoding="utf-8")
    print(text)


def rates_of(one: Part, output: Path) -> dict[str, object]:
    """How a part's training comes to its learning rates."""
    if isinstance(one.rates, Mapping):
        return {"learning_rates": dict(one.rates)}
    return {"learning_rates": found_rates(output / one.rates)} if one.rates else {"sweep": True}


def found_rates(folder: Path) -> dict[str, float]:
    """What the sweeps of a bench of one setting found, by arm."""
    found = read_sweeps(folder / "sweeps").values()
    rates = {one.arm: one.learning_rate for one in found if one.arm in PROMPTS}
    return rates | dict.fromkeys(CONTROLS, rates["mop"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", type=folders, default=(), metavar="FOLDERS", help="of the parts, with commas between")
    parser.add_argument("--claims", action="store_true", help="only write claims.md again")
    return parser.parse_args()


def folders(text: str) -> tuple[str, ...]:
    """Names of parts' folders; another one is an error of the command line."""
    asked, known = tuple(text.split(",")), {one.folder for one in PARTS}
    if unknown := set(asked) - known:
        raise argparse.ArgumentTypeError(f"no part {min(unknown)!r}; there are {', '.join(sorted(known))}")
    return asked


def claims(output: Path) -> Iterator[str]:
    """Every claim in every setting it was measured in: the change of perplexity with its interval, or a share.

    Micro and macro have a verdict each: a claim can be shown over tokens and not over tasks.
    """
    yield "Changes of perplexity with 95 % intervals, over the seeds that both arms have. *Shown*: the interval leaves"
    yield "out 0 and, where a claim has a number, the estimate is as low; the interval may reach above that number."
    yield ""
    yield "| data | setting | claim | micro | macro | micro shown | macro shown |"
    yield "|---|---|---|---|---|---|---|"
    for folder in dict.fromkeys(one.folder for one in PARTS):
        if (output / folder / "rows.jsonl").exists():
            run = read_run(output / folder)
            yield from _claims_of(folder, run, make_result_grid(run.rows, run.spec))
    for first, second, called in ACROSS:
        yield from _across(output, first, second, called)
    for three, setting, least in REGAINED:
        yield from _regained(output, three, setting, least)


def _claims_of(folder: str, run: Run, grid: ResultGrid) -> Iterator[str]:
    """Whether `mop` is as far below `single` as was claimed; less than 0 is better for it."""
    least = -0.03 if folder.startswith("dolly") else -0.10
    for one in compare(run, grid):
        if (one.first, one.second) == ("mop", "single") and one.setting != DENSE:
            verdicts = _verdicts(one.micro, one.macro, least)
            yield f"| {folder} | {one.setting} | mop against single, {least:+.0%} | {verdicts} |"


def _across(output: Path, first: tuple[str, str], second: tuple[str, str], called: str) -> Iterator[str]:
    """An arm against one in another folder, on the same rows, in every setting that both have."""
    (folder, arm), (other, _) = first, second
    ours, theirs = (_by_setting(output / where, what) for where, what in (first, second))
    for setting in [one for one in ours if ours[one].keys() & theirs.get(one, {}).keys()]:
        _check_one_model(output, (folder, other), setting)
        seeds = sorted(ours[setting].keys() & theirs[setting].keys())
        scores = ours[setting][seeds[0]]
        assert list(scores.scored_tokens) == list(theirs[setting][seeds[0]].scored_tokens), f"{other}: other rows"
        bootstrap = PairedBootstrap(scores.tasks, scores.scored_tokens)
        means = [np.mean([one[setting][seed].nats for seed in seeds], axis=0) for one in (ours, theirs)]
        verdicts = _verdicts(bootstrap.micro(*means), bootstrap.macro(*means))
        counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        yield f"| {folder}, {other} | {setting} | {arm} against {called}, {counted} | {verdicts} |"


def _verdicts(micro: Interval, macro: Interval, least: float = 0.0) -> str:
    """Both changes, then whether each is clear of 0 and at least as large as `least`, a share of the perplexity.

    Without an interval, of too few documents of a task, there is no telling.
    """
    both = (micro, macro)
    shown = ["yes" if one.high < 0 and one.estimate <= math.log1p(least) else "no" for one in both]
    told = ["n/a" if one.lacks_documents else word for one, word in zip(both, shown, strict=True)]
    return " | ".join([*map(interval_text, both), *told])


def _regained(output: Path, three: Sequence[str], setting: str, least: float) -> Iterator[str]:
    """How much of the log perplexity that lies between no arm and the dense model with `mop+` the same arm regains."""
    bare, folder, dense_folder = three
    if not all((output / name / "rows.jsonl").exists() for name in three):
        return
    _check_one_model(output, (bare, folder), setting)
    arms = ((bare, setting, "none"), (folder, setting, "mop+"), (dense_folder, "dense", "mop+"))
    found = [_by_setting(output / name, arm).get(where, {}).get(0) for name, where, arm in arms]
    none, ours, dense = (sum(one.nats) if one else math.nan for one in found)
    share = (none - ours) / (none - dense)
    if math.isfinite(share):
        shown = "yes" if share >= least else "no"
        yield f"| {folder} | {setting} | mop+ regains {least:.0%} of the dense mop+ | {share:.0%} | | {shown} | |"


def _check_one_model(output: Path, folders: Sequence[str], setting: str) -> None:
    """Raise `DataError` where arms of two folders stand on other weights, as of models pruned by other threads.

    Or where rows do not say on which.
    """
    paths = [output / name / "rows.jsonl" for name in folders]
    rows = [row for path in paths for row in read_rows(path) if row.setting == setting]
    hashes = {row.model_sha256 for row in rows}
    if None in hashes:
        raise DataError(f"{' and '.join(folders)}: rows of {setting} without model_sha256; complete them")
    if len(hashes) > 1:
        raise DataError(f"{' and '.join(folders)}: {setting} is {len(hashes)} models; their arms cannot be compared")


def _by_setting(folder: Path, arm: str) -> dict[str, dict[int, DocumentScores]]:
    """Scores of an arm by setting and seed, of what is there."""
    found: dict[str, dict[int, DocumentScores]] = defaultdict(dict)
    if (folder / "rows.jsonl").exists():
        for (setting, what, seed), scores in read_run(folder).documents.items():
            if what == arm:
                found[setting][seed] = scores
    return found


if __name__ == "__main__":
    main()
