"""`evaluate`, and the measurement that `bench` shares with it: one model, with or without an adapter, on test rows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.entrypoints.inputs import SplitStates, load_dataset_for
from mopcompress.environment import choose_device
from mopcompress.evaluation.generation_metrics import sample_answers, score_generation
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, macro_perplexity, macro_rouge_l, micro_average, task_scores
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import open_model
from mopcompress.progress import Progress, silent
from mopcompress.recipe import Recipe
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import Adapter, AdapterConfig
from mopcompress.recover.gate_statistics import measure_gate
from mopcompress.recover.save_and_load import load_adapter
from mopcompress.results import AnswerSample, DocumentScores, GateStatistics


@dataclass(frozen=True)
class Measurement:
    """Scores of one model, with or without an adapter, on the test rows of a dataset."""

    scores: DocumentScores
    text_perplexity: float | None  # on plain text; None without a text or for arms that need a task label
    samples: tuple[AnswerSample, ...]  # of generated answers
    gate: GateStatistics | None
    seconds: float  # wall time of scoring the test rows, without generation

    def summary(self) -> dict[str, Any]:
        """Return the fields that the rows of a bench and the output of `evaluate` have in common."""
        overall = micro_average(self.scores)
        return {
            "perplexity": overall.perplexity,
            "perplexity_macro": macro_perplexity(self.scores),
            "exact_match": overall.exact_match,
            "text_perplexity": self.text_perplexity,
            "rouge_l": overall.rouge_l,
            "rouge_l_macro": macro_rouge_l(self.scores),
            "written_exact_match": overall.written_exact_match,
            "samples": self.samples,
            "documents": overall.documents,
            "scored_tokens": overall.scored_tokens,
            "per_task": task_scores(self.scores),
            "gate": self.gate,
        }


def measure(
    states: SplitStates,
    layer: int,
    adapter: Adapter | None = None,
    config: AdapterConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Score the test rows and the plain text of a dataset, under `adapter` if one is given with its `config`.

    `layer` is the first block that the adapter changes. With `max_new_tokens`, answers of at most so many tokens are
    generated and scored too. Plain text names no task, so it is left out for an arm that needs one.
    """
    model, batch_size = states.base.model, states.batch_size
    test = states.test(layer)
    has_text = bool(states.dataset.text) and not (config and ARM_DEFAULTS[config.arm].needs_tasks)
    text = states.text(layer) if has_text else None
    start = time.perf_counter()
    scores = score(model, test, adapter, batch_size, progress)
    seconds = time.perf_counter() - start
    if max_new_tokens is not None:
        scores = score_generation(
            scores,
            model,
            test,
            adapter.compile_for_inference(model) if adapter else None,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    gate_tasks = config.tasks if config else ()
    return Measurement(
        scores=scores,
        text_perplexity=micro_average(score(model, text, adapter, batch_size, progress)).perplexity if text else None,
        samples=sample_answers(model, test.documents, scores),
        gate=measure_gate(model, adapter, test, gate_tasks, batch_size=batch_size) if adapter else None,
        seconds=seconds,
    )


def evaluate_folder(recipe: Recipe, adapter: Path | None, *, progress: Progress = silent) -> dict[str, Any]:
    """Score the recipe's model on its test rows, with an adapter if one is named; returns a JSON-able summary."""
    base = open_model(recipe.run.model, device=choose_device(recipe.run.device), log=progress.message)
    loaded, config = None, None
    if adapter is not None:
        loaded, config = load_adapter(adapter, base.model, base_sha256=base.sha256)
    dataset = load_dataset_for(base.model, recipe.run)
    states = SplitStates(base, dataset, recipe.run.eval_batch_size, progress)
    layer = config.layer if config else first_layer("none", recipe.recovery.layer, base.model)
    summary = measure(
        states, layer, loaded, config, max_new_tokens=recipe.run.max_new_tokens, progress=progress
    ).summary()
    return {
        "model": recipe.run.model,
        "adapter": str(adapter) if adapter else None,
        "arm": config.arm if config else "none",
        "data": dataset.facts,
        **summary,
        "samples": [vars(sample) for sample in summary["samples"]],
        "per_task": {task: vars(task_score) for task, task_score in summary["per_task"].items()},
        "gate": vars(summary["gate"]) if summary["gate"] else None,
    }


def score(
    model: LanguageModel, states: HiddenStateDataset, adapter: Adapter | None, batch_size: int, progress: Progress
) -> DocumentScores:
    """Score the responses of all documents, under `adapter` if one is given, and report progress."""
    total = len(states.documents)
    return evaluate(
        model,
        states,
        adapter.compile_for_inference(model) if adapter else None,
        batch_size=batch_size,
        progress=lambda done: progress.update("scoring test rows", done, total),
    )
