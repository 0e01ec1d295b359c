"""`evaluate --lm-eval`: tasks of the lm-evaluation-harness, on a model with or without an adapter."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mopcompress.environment import choose_device
from mopcompress.errors import UnavailableError, UsageError
from mopcompress.hf.model import MopForCausalLM
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.progress import Progress, silent
from mopcompress.recipe import Recipe
from mopcompress.recover.save_and_load import load_adapter


def evaluate_tasks(
    recipe: Recipe,
    adapter: Path | None,
    tasks: Sequence[str],
    definitions: Path | None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The harness's results by task; a JSON-able summary. `definitions` is a folder of tasks besides its own.

    Raises `UnavailableError` without the harness, `UsageError` for a task that it does not know.
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
    base = resolve_model(recipe.run.model, progress=progress.message)
    model = load_model(base, device=choose_device(recipe.run.device))
    network: PreTrainedModel = model.network
    if adapter is not None:
        network = MopForCausalLM.around(model, *load_adapter(adapter, model, base_sha256=weights_hash(base)))
    progress.message(f"{', '.join(tasks)}, in the lm-evaluation-harness")
    with torch.inference_mode():
        found = lm_eval.simple_evaluate(
            model=HarnessModel(network, model.tokenizer, batch_size=recipe.run.eval_batch_size),
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
        "results": found["results"],
        "versions": found["versions"],
        "shots": found["n-shot"],
        "samples": found["n-samples"],
    }
