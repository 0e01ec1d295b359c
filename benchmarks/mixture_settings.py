"""Settings of a mixture against one prompt: each is trained once and scored on validation rows.

    python benchmarks/mixture_settings.py MODEL --data FOLDER --output FILE.jsonl [--only NAMES]

Rows and steps are those of `recovery.py` and rates are the arms' own, with 300 validation rows and no test row: a
choice that is made here is measured there. All settings have the same number of prompt tokens, or a few more or less
where they do not divide. Each setting writes one line when it is done; settings that are in FILE already are not
trained again. Prints each against the single prompt (of its own kind: a deep mixture against a deep prompt) with the
interval of a paired bootstrap over rows.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mopcompress.cli.progress_display import progress_on
from mopcompress.data.dataset import load_dataset
from mopcompress.entrypoints.evaluate import score
from mopcompress.entrypoints.inputs import SplitStates
from mopcompress.entrypoints.train_adapter import TrainingSetup, train_adapter
from mopcompress.environment import choose_device
from mopcompress.evaluation.perplexity import macro_perplexity, micro_average
from mopcompress.models.model_loading import open_model
from mopcompress.progress import Progress
from mopcompress.recipe import load_recipe
from mopcompress.recipe.pruning_modifiers import replace_checked
from mopcompress.recover.adapter import trained_parameters
from mopcompress.report.bootstrap import PairedBootstrap
from mopcompress.report.number_format import change_with_interval

ROOT = Path(__file__).parents[1]
STEPS, BATCH, ROWS = 120, 8, 300
CANDIDATES: dict[str, dict[str, object]] = {
    "single": {"arm": "single"},
    "as it is": {"arm": "mop"},
    "2 clusters": {"arm": "mop", "experts": 2, "prompts_per_expert": 40, "gate_labels": "clusters"},
    "3 clusters": {"arm": "mop", "experts": 3, "prompts_per_expert": 27, "gate_labels": "clusters"},
    "shared expert": {"arm": "mop", "shared_expert": True, "prompts_per_expert": 9},
    "gate begins at zero": {"arm": "mop", "gate_logit_scale": 0.0},
    "frozen gate": {"arm": "mop", "gate_learning_rate": 0.0},
    "separate softmax": {"arm": "mop", "gate_mode": "separate"},
    "deep single": {"arm": "single", "per_layer_prompts": True},
    "deep": {"arm": "mop", "per_layer_prompts": True},
    "single of 4 times the steps": {"arm": "single", "steps": 4 * STEPS},
    "4 times the steps": {"arm": "mop", "steps": 4 * STEPS},
}
BASELINES = {"deep": "deep single", "4 times the steps": "single of 4 times the steps"}  # the others: single


def main() -> None:
    arguments = parse()
    results = read(arguments.output)
    with progress_on(sys.stderr, quiet=False) as progress:
        for name in arguments.only or CANDIDATES:
            if name not in results:
                results[name] = measure(name, arguments, progress)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[name]) + "\n")
    for name, row in results.items():
        baseline = results.get(BASELINES.get(name, "single"))
        against = f", {change(row, baseline)} against {baseline['name']}" if baseline and baseline != row else ""
        print(f"{name}: perplexity {row['perplexity']:.4g} (macro {row['perplexity_macro']:.4g}){against}")


def measure(name: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train one setting with the arm's own rate, and score the validation rows."""
    changes = CANDIDATES[name]
    steps = changes.get("steps", STEPS)
    assert isinstance(steps, int)
    rows = {"train_rows": BATCH * steps, "validation_rows": ROWS, "test_rows": 10}
    recipe = load_recipe(arguments.recipe, {"model": arguments.model, "data": arguments.data, **rows})
    modifier = replace_checked(recipe.recovery, **{"steps": STEPS, "train_batch_size": BATCH, **changes})
    run = recipe.run
    base = open_model(run.model, device=choose_device(run.device))
    states = SplitStates(base, load_dataset(run, base.model.tokenizer), run.eval_batch_size, progress)
    trained = train_adapter(modifier, TrainingSetup(states=states, seed=run.seed, progress=progress))
    validation = states.validation(trained.config.layer)
    scores = score(base.model, validation, trained.adapter, run.eval_batch_size, progress)
    return {
        "name": name,
        "changes": changes,
        "perplexity": micro_average(scores).perplexity,
        "perplexity_macro": macro_perplexity(scores),
        "trained_parameters": trained_parameters(trained.adapter),
        "learning_rate": modifier.rate,
        "rows": len(scores.nats),
        "tasks": list(scores.tasks),
        "scored_tokens": list(scores.scored_tokens),
        "nats": list(scores.nats),
        "model": base.sha256,
    }


def change(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """Return the change of perplexity with its interval. The rows must be the same."""
    assert row["scored_tokens"] == baseline["scored_tokens"], "scored on other rows"
    assert row["model"] == baseline["model"], "trained on another model"
    bootstrap = PairedBootstrap(row["tasks"], row["scored_tokens"])
    interval = bootstrap.micro(np.asarray(row["nats"]), np.asarray(baseline["nats"]))
    return change_with_interval(interval.estimate, interval.low, interval.high)


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="compressed folder")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "dolly.yaml")
    local = ROOT.parent / "shared" / "data" / "dolly15k"
    parser.add_argument("--data", default=str(local), help="local copy of the recipe's data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", type=candidates, default=(), metavar="NAMES", help="of the settings, with commas between"
    )
    return parser.parse_args()


def candidates(text: str) -> tuple[str, ...]:
    """Split names of settings; an unknown name is an error of the command line."""
    if unknown := {*text.split(",")} - {*CANDIDATES}:
        raise argparse.ArgumentTypeError(f"no setting {min(unknown)!r}; there are {', '.join(CANDIDATES)}")
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
