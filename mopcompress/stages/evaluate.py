"""`evaluate` and what `bench` shares with it: the scores of one model, with or without an adapter."""

import math
from pathlib import Path
from typing import Any

import torch

from mopcompress.evaluation import evaluate, macro_perplexity, micro, task_scores
from mopcompress.models.checkpoint import load_model, resolve_model, weights_hash
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import Recipe
from mopcompress.recover.adapter import Adapter
from mopcompress.recover.folder import load_adapter
from mopcompress.recover.mixture import MixtureOfPrompts
from mopcompress.results import DocumentScores, GateReading
from mopcompress.stages.documents import load_documents
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.provenance import choose_device
from mopcompress.stages.recover import cache_states, first_layer
from mopcompress.states import CachedStates


def evaluate_folder(recipe: Recipe, adapter: Path | None, *, progress: Progress = silent) -> dict[str, Any]:
    """Score the recipe's model on its test rows, with an adapter if one is named; a JSON-able summary."""
    base = resolve_model(recipe.run.model, progress=lambda line: progress(line, 0, 0))
    model = load_model(base, device=choose_device(recipe.run.device))
    loaded, config = None, None
    if adapter is not None:
        loaded, config = load_adapter(adapter, model, base_sha256=weights_hash(base))
    documents = load_documents(recipe.run, model.tokenizer)
    layer = config.layer if config else first_layer(recipe.recovery, model)
    states = cache_states(model, documents.test, layer, recipe.run.batch_size, "test rows", progress)
    scores = score(model, states, loaded, recipe.run.batch_size, progress)
    text = None
    if documents.text:
        windows = cache_states(model, documents.text, layer, recipe.run.batch_size, "windows of text", progress)
        text = micro(score(model, windows, loaded, recipe.run.batch_size, progress)).perplexity
    reading = read_gate(loaded, states, tuple(config.tasks)) if loaded and config else None
    return {
        "model": recipe.run.model,
        "adapter": str(adapter) if adapter else None,
        "arm": config.arm if config else "none",
        "data": documents.facts,
        "perplexity": micro(scores).perplexity,
        "perplexity_macro": macro_perplexity(scores),
        "exact_match": micro(scores).exact_match,
        "text_perplexity": text,
        "documents": micro(scores).documents,
        "scored_tokens": micro(scores).scored_tokens,
        "per_task": {task: vars(one) for task, one in task_scores(scores).items()},
        "gate": vars(reading) if reading else None,
    }


def score(
    model: LanguageModel, states: CachedStates, adapter: Adapter | None, batch_size: int, progress: Progress
) -> DocumentScores:
    """Evaluate with progress."""
    total = len(states.documents)
    return evaluate(
        model,
        states,
        adapter.compiled(model) if adapter else None,
        batch_size=batch_size,
        progress=lambda done: progress("scoring test rows", done, total),
    )


def read_gate(adapter: Adapter, states: CachedStates, domains: tuple[str, ...]) -> GateReading | None:
    """What the gate does on these rows; None without a gate. `domains` are the experts' tasks, if they have any."""
    if not isinstance(adapter, MixtureOfPrompts) or adapter.gate is None:
        return None
    with torch.inference_mode():
        weights = adapter.gate(states.summaries).exp().cpu()
    tasks = sorted({document.task for document in states.documents})
    task_of = [document.task for document in states.documents]
    shares = weights / weights.shape[1]
    known = (
        domains if set(tasks) <= set(domains) else ()
    )  # on tasks that it was not made for a gate is neither right nor wrong
    right = [known[int(row.argmax())] == task for row, task in zip(weights, task_of, strict=True)] if known else []
    means = [weights[[name == task for name in task_of]].mean(0).tolist() for task in tasks]
    return GateReading(
        tasks=tasks,
        weights=means,
        accuracy=math.fsum(right) / len(right) if right else None,
        entropy_nats=float(-torch.special.xlogy(shares, shares).sum(1).mean()),
    )
