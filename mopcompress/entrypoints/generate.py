"""`generate`: answers of a model, with or without an adapter, to prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopcompress.environment import choose_device
from mopcompress.evaluation.generation import generate
from mopcompress.hf.model import MopForCausalLM
from mopcompress.models.model_loading import open_model
from mopcompress.progress import Progress, silent
from mopcompress.recipe import RunSpec
from mopcompress.recover.save_and_load import load_adapter


def load_network(
    run: RunSpec, adapter: Path | None, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the run's model as transformers knows it, under an adapter if one is named, and its tokenizer."""
    base = open_model(run.model, device=choose_device(run.device), log=progress.message)
    if adapter is None:
        return base.model.network, base.model.tokenizer
    loaded, config = load_adapter(adapter, base.model, base_sha256=base.sha256)
    return MopForCausalLM.from_parts(base.model, loaded, config), base.model.tokenizer


class AnswerGenerator:
    """The run's model, under an adapter if one is named, loaded once for many prompts."""

    def __init__(self, run: RunSpec, adapter: Path | None, *, max_new_tokens: int, progress: Progress = silent) -> None:
        self._network, self._tokenizer = load_network(run, adapter, progress)
        self._batch_size = run.eval_batch_size
        self._max_new_tokens, self._progress = max_new_tokens, progress

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """Return the answer to each prompt, generated batch by batch."""
        answers: list[str] = []
        for start in range(0, len(prompts), self._batch_size):
            batch = prompts[start : start + self._batch_size]
            answers += generate(self._network, self._tokenizer, batch, max_new_tokens=self._max_new_tokens)
            if len(prompts) > self._batch_size:
                self._progress.update("generating", len(answers), len(prompts))
        return answers

    def stream(self, prompt: str, on_text: Callable[[str], None]) -> None:
        """Generate the answer to one prompt, and pass each piece of its text to `on_text` at once."""
        generate(self._network, self._tokenizer, [prompt], max_new_tokens=self._max_new_tokens, on_text=on_text)
