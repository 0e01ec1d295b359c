"""A network, with its adapter or without, as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`)."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopcompress.hf.loglikelihood import generate_continuations, score_continuations

MAX_NEW_TOKENS = 256  # the harness's own default for tasks that set none


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of the harness that scores and generates in batches; an adapter reads each request's context only."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_settings: Any) -> list[int]:
        """Encode as the harness's own models do: with special tokens, unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_settings: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self.model, pairs, batch_size=self.batch_size, max_length=self.max_length)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score every token once, in windows as long as the model allows; an adapter reads a window's context."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        scores = score_continuations(self.model, windows, batch_size=self.batch_size, max_length=self.max_length)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, together for requests with the same settings."""
        answers = [""] * len(requests)
        settings_keys = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (settings_keys[index], len(requests[index].args[0])))
        for _, group in itertools.groupby(order, key=lambda index: settings_keys[index]):
            group_indices = list(group)
            settings = _generation_settings(requests[group_indices[0]].args[1])
            for start in range(0, len(group_indices), self.batch_size):
                indices = group_indices[start : start + self.batch_size]
                contexts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices]
                batch = generate_continuations(
                    self.model, self.tokenizer, contexts, max_length=self.max_length, **settings
                )
                for index, answer in zip(indices, batch, strict=True):
                    answers[index] = answer
        return answers


def _generation_settings(task_settings: dict[str, Any]) -> dict[str, Any]:
    """Translate a task's generation settings into transformers' names."""
    settings = dict(task_settings)
    until = settings.pop("until", None) or []
    new_tokens = settings.pop("max_gen_toks", settings.pop("max_new_tokens", MAX_NEW_TOKENS))
    if not settings.get("do_sample"):
        settings = {"do_sample": False}  # a temperature has no effect then, and transformers warns of it
    return {"until": [until] if isinstance(until, str) else list(until), "max_new_tokens": new_tokens, **settings}
