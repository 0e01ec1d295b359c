"""Text sampled from a model: calibration data without a data set."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from mopcompress.models.compat import CACHE
from mopcompress.models.language_model import LanguageModel


def sample_text(
    model: LanguageModel,
    *,
    samples: int,
    length: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Int[Tensor, "samples length"]:
    """Sample at temperature 1 from the model's own distribution, each sample from its own first token.

    First tokens are drawn uniformly from the vocabulary's ordinary tokens, so that topics differ. Special tokens are
    never drawn: calibration text is plain text. `progress` is called with the number of tokens per sample so far.

    Raises `DataError` when a sample is longer than the model's context.
    """
    model.check_context(length, "calibration text", "lower --max-seq-length")
    generator = torch.Generator(model.device).manual_seed(seed)
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), device=model.device)
    probabilities = torch.ones(samples, model.config.vocab_size, device=model.device)
    tokens, cache = [], None
    with torch.inference_mode():
        while True:
            probabilities[:, special] = 0
            tokens.append(torch.multinomial(probabilities, 1, generator=generator))
            progress(len(tokens))
            if len(tokens) == length:
                return torch.cat(tokens, dim=1)
            output = model.network(input_ids=tokens[-1], use_cache=True, **{CACHE: cache})
            cache = output[CACHE]
            probabilities = output.logits[:, -1].softmax(-1)
