"""`generate`: a base folder and perhaps an adapter in, answers out."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from mopcompress.environment import choose_device
from mopcompress.evaluation.generation import generate
from mopcompress.hf.model import MopForCausalLM
from mopcompress.models.model_loading import load_model, resolve_model, weights_hash
from mopcompress.progress import Progress, silent
from mopcompress.recipe import RunSpec
from mopcompress.recover.save_and_load import load_adapter


class AnswerGenerator:
    """The run's model, with an adapter if one is named, loaded once."""

    def __init__(self, run: RunSpec, adapter: Path | None, *, max_new_tokens: int, progress: Progress = silent) -> None:
        base = resolve_model(run.model, progress=progress.message)
        model = load_model(base, device=choose_device(run.device))
        self._model: PreTrainedModel = model.network
        if adapter is not None:
            self._model = MopForCausalLM.around(model, *load_adapter(adapter, model, base_sha256=weights_hash(base)))
        self._tokenizer, self._batch_size = model.tokenizer, run.eval_batch_size
        self._max_new_tokens, self._progress = max_new_tokens, progress

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """To each prompt, batch by batch."""
        answers: list[str] = []
        for start in range(0, len(prompts), self._batch_size):
            some = prompts[start : start + self._batch_size]
            answers += generate(self._model, self._tokenizer, some, max_new_tokens=self._max_new_tokens)
            if len(prompts) > self._batch_size:
                self._progress.update("generating", len(answers), len(prompts))
        return answers

    def tell(self, prompt: str, told: Callable[[str], None]) -> None:
        """Give the answer to one prompt in pieces, as it comes."""
        generate(self._model, self._tokenizer, [prompt], max_new_tokens=self._max_new_tokens, told=told)
