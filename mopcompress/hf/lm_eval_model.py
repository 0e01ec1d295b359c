"""A network, with its adapter or without, as a model of EleutherAI's lm-evaluation-harness (the extra `lm-eval`)."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopcompress.hf.loglikelihood import score_continuations, write_continuations

NEW_TOKENS = 256  # the harness's own default where a task does not say


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Scores and writes in batches; an adapter reads each request's context only."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_settings: Any) -> list[int]:
        """As the harness's own models do it: with the tokenizer's special tokens, unless the text begins so."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_settings: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, rest) for _, context, rest in requests]
        scores = score_continuations(self.model, pairs, batch_size=self.batch_size, longest=self.max_length)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Every token once, each in a window as long as the model allows; an adapter reads its beginning."""
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
        scores = score_continuations(self.model, windows, batch_size=self.batch_size, longest=self.max_length)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Requests that ask for the same settings are written together."""
        answers = [""] * len(requests)
        asked = [json.dumps(request.args[1], sort_keys=True, default=str) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: (asked[place], len(requests[place].args[0])))
        for _, alike in itertools.groupby(order, key=lambda place: asked[place]):
            places = list(alike)
            settings = _settings_of(requests[places[0]].args[1])
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                contexts = [self.tok_encode(requests[place].args[0]) or [self.prefix_token_id] for place in some]
                written = write_continuations(self.model, self.tokenizer, contexts, longest=self.max_length, **settings)
                for place, answer in zip(some, written, strict=True):
                    answers[place] = answer
        return answers


def _settings_of(asked: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings in transformers' words."""
    settings = dict(asked)
    until = settings.pop("until", None) or []
    new_tokens = settings.pop("max_gen_toks", settings.pop("max_new_tokens", NEW_TOKENS))
    if not settings.get("do_sample"):
        settings = {"do_sample": False}  # a temperature means nothing then, and transformers warns of it
    return {"until": [until] if isinstance(until, str) else list(until), "max_new_tokens": new_tokens, **settings}
