"""`evaluate` and what `bench` shares with it: the scores of one model, with or without an adapter."""

from pathlib import Path
from typing import Any

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.entrypoints.inputs import load_dataset_for
from mopcompress.environment import choose_device
from mopcompress.evaluation.generation_metrics import sample_answers, score_generation
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.perplexity import evaluate, macro_perplexity, macro_rouge_l, micro_average, task_scores
from mopcompress.evaluation.state_cache import load_or_compute_states
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.progress import Progress, silent
from mopcompress.recipe import Recipe
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.gate_statistics import measure_gate
from mopcompress.recover.save_and_load import load_adapter
from mopcompress.results import DocumentScores


def evaluate_folder(recipe: Recipe, adapter: Path | None, *, progress: Progress = silent) -> dict[str, Any]:
    """Score the recipe's model on its test rows, with an adapter if one is named; a JSON-able summary."""
    base = resolve_model(recipe.run.model, progress=progress.message)
    model = load_model(base, device=choose_device(recipe.run.device))
    loaded, config, sha256, size = None, None, weights_hash(base), recipe.run.eval_batch_size
    if adapter is not None:
        loaded, config = load_adapter(adapter, model, base_sha256=sha256)
    documents = load_dataset_for(model, recipe.run)
    layer = config.layer if config else first_layer("none", recipe.recovery.layer, model)
    states = load_or_compute_states(
        model, sha256, documents.test, layer, recipe.run.eval_batch_size, "test rows", progress
    )
    scores = score(model, states, loaded, recipe.run.eval_batch_size, progress)
    if recipe.run.max_new_tokens is not None:
        scores = score_generation(
            scores,
            model,
            states,
            loaded.compile_for_inference(model) if loaded else None,
            max_new_tokens=recipe.run.max_new_tokens,
            batch_size=size,
            progress=progress,
        )
    text = None
    if documents.text and not (config and ARM_DEFAULTS[config.arm].needs_tasks):
        windows = load_or_compute_states(
            model, sha256, documents.text, layer, recipe.run.eval_batch_size, "windows of text", progress
        )
        text = micro_average(score(model, windows, loaded, recipe.run.eval_batch_size, progress)).perplexity
    reading = measure_gate(model, loaded, states, config.tasks, batch_size=size) if loaded and config else None
    return {
        "model": recipe.run.model,
        "adapter": str(adapter) if adapter else None,
        "arm": config.arm if config else "none",
        "data": documents.facts,
        "perplexity": micro_average(scores).perplexity,
        "perplexity_macro": macro_perplexity(scores),
        "exact_match": micro_average(scores).exact_match,
        "text_perplexity": text,
        "rouge_l": micro_average(scores).rouge_l,
        "rouge_l_macro": macro_rouge_l(scores),
        "written_exact_match": micro_average(scores).written_exact_match,
        "samples": [vars(sample) for sample in sample_answers(model, documents.test, scores)],
        "documents": micro_average(scores).documents,
        "scored_tokens": micro_average(scores).scored_tokens,
        "per_task": {task: vars(one) for task, one in task_scores(scores).items()},
        "gate": vars(reading) if reading else None,
    }


def score(
    model: LanguageModel, states: HiddenStateDataset, adapter: Adapter | None, batch_size: int, progress: Progress
) -> DocumentScores:
    """Evaluate with progress."""
    total = len(states.documents)
    return evaluate(
        model,
        states,
        adapter.compile_for_inference(model) if adapter else None,
        batch_size=batch_size,
        progress=lambda done: progress.update("scoring test rows", done, total),
    )
