"""`evaluate --lm-eval`: tasks of the lm-evaluation-harness, for a model with or without an adapter."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mopcompress.entrypoints.generate import load_network
from mopcompress.errors import UnavailableError, UsageError
from mopcompress.progress import Progress, silent
from mopcompress.recipe import Recipe


def evaluate_tasks(
    recipe: Recipe,
    adapter: Path | None,
    tasks: Sequence[str],
    definitions: Path | None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run tasks of the harness; returns a JSON-able summary with its results by task.

    `definitions` is a folder of tasks besides its own. Raises `UnavailableError` without the harness, `UsageError` for
    a task that it does not know.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from mopcompress.hf.lm_eval_model import HarnessModel
    except ImportError as error:
        raise UnavailableError(
            f"--lm-eval: no lm-evaluation-harness here ({error}); install it: pip install 'mopcompress[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=None if definitions is None else str(definitions))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"--lm-eval: the harness knows no task {unknown[0]!r}; lm-eval ls tasks lists them")
    network, tokenizer = load_network(recipe.run, adapter, progress)
    progress.message(f"{', '.join(tasks)}, in the lm-evaluation-harness")
    with torch.inference_mode():
        results = lm_eval.simple_evaluate(
            model=HarnessModel(network, tokenizer, batch_size=recipe.run.eval_batch_size),
            tasks=list(tasks),
            task_manager=manager,
            log_samples=False,
            random_seed=recipe.run.seed,
            numpy_random_seed=recipe.run.seed,
            torch_random_seed=recipe.run.seed,
            fewshot_random_seed=recipe.run.seed,
        )
    return {
        "model": recipe.run.model,
        "adapter": str(adapter) if adapter else None,
        "harness": importlib.metadata.version("lm_eval"),
        "results": results["results"],
        "versions": results["versions"],
        "shots": results["n-shot"],
        "samples": results["n-samples"],
    }
