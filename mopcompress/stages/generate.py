"""`generate`: a base folder and perhaps an adapter in, answers out."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mopcompress.models.checkpoint import load_model, resolve_model, weights_hash
from mopcompress.recipe import RunSpec
from mopcompress.recover.folder import load_adapter
from mopcompress.recover.generation import generate
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.provenance import choose_device

Answer = Callable[[Sequence[str]], list[str]]


def open_generator(run: RunSpec, adapter: Path | None, *, max_new_tokens: int, progress: Progress = silent) -> Answer:
    """Load the run's model, and the adapter if one is named, once; the function answers prompts, batch by batch."""
    base = resolve_model(run.model, progress=lambda line: progress(line, 0, 0))
    model = load_model(base, device=choose_device(run.device))
    loaded = load_adapter(adapter, model, base_sha256=weights_hash(base))[0] if adapter else None

    def answer(prompts: Sequence[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(prompts), run.batch_size):
            some = prompts[start : start + run.batch_size]
            answers += generate(model, loaded, some, max_new_tokens=max_new_tokens)
            if len(prompts) > run.batch_size:
                progress("generating", len(answers), len(prompts))
        return answers

    return answer
