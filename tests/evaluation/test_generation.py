"""Generation with prompts: the network's own `generate`, with the same instruction and gate as evaluation."""

import pytest
import torch
from tiny_models import HIDDEN, generate, instructions_of, tiny_model, word_tokenizer

from mopcompress.errors import DataError
from mopcompress.models.attention import attend_to
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

PROMPTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16"]
LAYER = 1


def mixture(*, gated: bool = True, seed: int = 0) -> MixtureOfPrompts:
    """Return two experts of three prompts, large enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(HIDDEN, 2, generator=generator) if gated else None
    return MixtureOfPrompts(3 * torch.randn(2, 3, HIDDEN, generator=generator), LAYER, gate).requires_grad_(False)


def step_by_step(model: LanguageModel, prompts: MixtureOfPrompts, context: list[int], count: int) -> list[int]:
    """Decode greedily by the definition: all states are computed again for each token, without cache or batch."""
    tokens = list(context)
    with torch.inference_mode():
        instructions = instructions_of(model, torch.tensor([context]), LAYER)
        for _ in range(count):
            with attend_to(prompts.prefix(model, instructions)):
                hidden = model.run_upper(model.run_lower(torch.tensor([tokens]), LAYER), LAYER)
            tokens.append(int(model.logits(hidden[0, -1:]).argmax()))
    return tokens[len(context) :]


def context_of(prompt: str) -> list[int]:
    return word_tokenizer()(f"{prompt}\nAnswer:")["input_ids"]


def decoded(tokens: list[int]) -> str:
    end = tokens.index(2) if 2 in tokens else len(tokens)
    return word_tokenizer().decode(tokens[:end], skip_special_tokens=True).strip()


@pytest.mark.parametrize("gated", [True, False])
def test_generation_is_greedy_decoding_by_definition(tiny_llama: LanguageModel, gated: bool) -> None:
    prompts = mixture(gated=gated)
    expected = [decoded(step_by_step(tiny_llama, prompts, context_of(prompt), 8)) for prompt in PROMPTS]
    assert generate(tiny_llama, prompts, PROMPTS, max_new_tokens=8) == expected
    assert any(expected)


def test_answers_are_greedy_whatever_the_config_says() -> None:
    model, prompts = tiny_model(), mixture()
    expected = generate(model, prompts, PROMPTS, max_new_tokens=8)
    settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    for name, value in settings.items():
        setattr(model.network.generation_config, name, value)
    assert generate(model, prompts, PROMPTS, max_new_tokens=8) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_the_cache_and_the_batch_change_nothing(family: str) -> None:
    model, prompts = tiny_model(family), mixture()
    batched = generate(model, prompts, PROMPTS, max_new_tokens=8)
    assert batched == generate(model, prompts, PROMPTS, max_new_tokens=8, use_cache=False)
    assert batched == [generate(model, prompts, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]


def test_without_a_mixture_it_is_the_stock_model(tiny_llama: LanguageModel) -> None:
    expected = []
    for prompt in PROMPTS:
        context = torch.tensor([context_of(prompt)])
        mask = torch.ones_like(context)
        generated = tiny_llama.network.generate(context, attention_mask=mask, do_sample=False, max_new_tokens=8)
        expected.append(decoded(generated[0, context.shape[1] :].tolist()))
    assert generate(tiny_llama, None, PROMPTS, max_new_tokens=8) == expected
    assert expected != generate(tiny_llama, mixture(), PROMPTS, max_new_tokens=8)


def test_an_answer_has_at_most_max_new_tokens(tiny_llama: LanguageModel) -> None:
    short, long = (generate(tiny_llama, None, PROMPTS, max_new_tokens=count) for count in (2, 8))
    assert all(len(answer.split()) <= 2 for answer in short)
    assert all(longer.startswith(shorter) for shorter, longer in zip(short, long, strict=True))


def test_no_prompts_give_no_answers(tiny_llama: LanguageModel) -> None:
    assert generate(tiny_llama, None, [], max_new_tokens=8) == []


def test_an_answer_beyond_the_context_is_refused(tiny_llama: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"context of 64 tokens; shorten the prompt"):
        generate(tiny_llama, None, PROMPTS, max_new_tokens=64)


def test_an_answer_is_streamed_in_pieces(tiny_llama: LanguageModel) -> None:
    pieces: list[str] = []
    answer = generate(tiny_llama, mixture(), PROMPTS[:1], max_new_tokens=8, on_text=pieces.append)
    assert len(pieces) > 1
    assert ["".join(pieces).rstrip()] == answer
