"""A recovered model in transformers' hands: the gate reads the instruction alone, once, and the adapter acts."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import perturbed_adapter
from recovered_models import (
    CONTEXTS,
    DOCUMENTS,
    GENERATING_ARMS,
    GREEDY,
    LAYER,
    NEW_TOKENS,
    gated_model,
    generate_tokens,
    labelled_batch,
    padded,
    perturbed_model,
    recorded_gate,
)
from tiny_models import BLOCKS, next_of, random_tokens, recovered, tiny_model, word_tokenizer
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, pipeline

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.evaluation.loss import score_responses
from mopcompress.hf import MopForCausalLM
from mopcompress.models.compat import CACHE
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2", "opt", "gpt_neox")
BEAMS = [{"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]


@pytest.fixture(scope="module")
def model() -> MopForCausalLM:
    """Return a model that no test may change."""
    return gated_model()


# --- generation


@torch.no_grad()
def by_definition(model: MopForCausalLM, context: list[int]) -> list[int]:
    """Decode greedily as evaluation scores: one row, no cache, all states computed again for each token."""
    network, tokens = model.language_model, list(context)
    hidden = network.run_lower(torch.tensor([context]), LAYER)
    instructions = InstructionStates(hidden, torch.tensor([len(context)]), hidden.mean(1))
    for _ in range(NEW_TOKENS):
        with model.adapter.active(network, instructions):
            upper = network.run_upper(network.run_lower(torch.tensor([tokens]), LAYER), LAYER)
        tokens.append(int(network.logits(upper[0, -1:]).argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_what_evaluation_scores(family: str) -> None:
    model = gated_model(family)
    expected = [by_definition(model, context) for context in CONTEXTS]
    assert generate_tokens(model, CONTEXTS) == expected
    assert generate_tokens(model, CONTEXTS, use_cache=False) == expected
    assert generate_tokens(model.network, CONTEXTS) != expected


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_hand_written_decoding_loop_gives_the_same(family: str) -> None:
    """Without a cache the labels say what the instruction is; with one it is what the cache begins with."""
    model, context = gated_model(family), CONTEXTS[0]
    tokens, cache = torch.tensor([context]), DynamicCache(config=model.network.config)
    step_tokens = tokens
    for expected in by_definition(model, context):
        labels = tokens.clone()
        labels[:, : len(context)] = -100
        assert int(model(input_ids=tokens, labels=labels).logits[0, -1].argmax()) == expected
        assert int(model(input_ids=step_tokens, past_key_values=cache).logits[0, -1].argmax()) == expected
        step_tokens = torch.tensor([[expected]])
        tokens = torch.cat([tokens, step_tokens], dim=1)


@torch.no_grad()
def test_a_hand_written_loop_may_begin_with_padding(model: MopForCausalLM) -> None:
    alone = []
    for context in CONTEXTS:
        cache, prompt = DynamicCache(config=model.network.config), torch.tensor([context])
        first = model(input_ids=prompt, past_key_values=cache).logits[:, -1]
        second = model(input_ids=first.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
        alone.append(torch.cat([first, second]))
    (tokens, mask), cache = padded(CONTEXTS), DynamicCache(config=model.network.config)
    first = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
    mask, next_tokens = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), first.argmax(-1, keepdim=True)
    second = model(input_ids=next_tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert_close(torch.stack([first, second], dim=1), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_cache_that_another_model_began_raises(model: MopForCausalLM) -> None:
    cache = model.network(input_ids=torch.tensor([CONTEXTS[0]]))[CACHE]
    with pytest.raises(DataError, match="was not begun by this model"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def generate_with_scores(
    model: MopForCausalLM, rows: list[list[int]], **settings: Any
) -> tuple[list[list[int]], Tensor]:
    """Generate tokens and the score of each, which shows a gate even if the tokens are the same."""
    tokens, mask = padded(rows)
    more = {"output_scores": True, "return_dict_in_generate": True}
    output = model.generate(tokens, attention_mask=mask, **GREEDY | more | settings)
    scores = model.compute_transition_scores(output.sequences, output.scores, output.get("beam_indices"))
    return output.sequences[:, tokens.shape[1] :].tolist(), scores


@pytest.mark.parametrize("settings", [{}, *BEAMS])
@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_each_row_is_generated_as_if_alone(arm: str, settings: dict[str, Any]) -> None:
    """Its beams have its gate too."""
    model = perturbed_model(arm)
    answers, scores = generate_with_scores(model, CONTEXTS, **settings)
    alone = [generate_with_scores(model, [context], **settings) for context in CONTEXTS]
    assert answers == [answer for row_answers, _ in alone for answer in row_answers]
    assert_close(scores, torch.cat([row_scores for _, row_scores in alone]), rtol=1e-4, atol=1e-4)
    assert answers != generate_tokens(model.network, CONTEXTS, **settings)


@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_samples_depend_on_the_gate_of_their_row_and_the_seed(arm: str) -> None:
    """Sampled at a temperature of nearly 0, every sequence is the greedy one."""
    model, temperature = perturbed_model(arm), 1e-4
    answers, scores = generate_with_scores(model, CONTEXTS)
    again, sampled = generate_with_scores(
        model, CONTEXTS, do_sample=True, temperature=temperature, num_return_sequences=3
    )
    assert again == [answer for answer in answers for _ in range(3)]
    assert_close(sampled * temperature, scores.repeat_interleave(3, dim=0), rtol=1e-4, atol=1e-4)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate_tokens(model, CONTEXTS, do_sample=True))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_static_cache_changes_nothing(model: MopForCausalLM) -> None:
    static = {"cache_implementation": "static", "disable_compile": True}
    assert generate_tokens(model, CONTEXTS, **static) == generate_tokens(model, CONTEXTS)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_gate_reads_the_prompt_once_per_call(model: MopForCausalLM, use_cache: bool) -> None:
    with recorded_gate(model) as gates:
        answers = [generate_tokens(model, rows, use_cache=use_cache) for rows in (CONTEXTS, CONTEXTS[::-1], CONTEXTS)]
    assert len(gates) == 3
    assert_close(gates[0], gates[1].flip(0))
    assert torch.equal(gates[0], gates[2])
    assert float(gates[0].std(0).max()) > 0.1
    assert answers[0] == answers[1][::-1] == answers[2]
    alone = MopForCausalLM.forward(model, input_ids=torch.tensor([CONTEXTS[0]]))
    assert alone.logits.shape[1] == len(CONTEXTS[0])  # a forward after generate is a forward again


def test_padding_is_not_read(model: MopForCausalLM) -> None:
    with recorded_gate(model) as gates:
        generate_tokens(model, CONTEXTS)
        for context in CONTEXTS:
            generate_tokens(model, [context])
    assert_close(gates[0], torch.cat(gates[1:]))


def test_generation_from_a_cache_reads_the_whole_text_again(model: MopForCausalLM) -> None:
    first = torch.tensor([CONTEXTS[0]])
    output = model.generate(first, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([output.sequences, random_tokens(1, 3)], dim=1)
    with recorded_gate(model) as gates:
        model.generate(longer, **GREEDY | {CACHE: output[CACHE]})
        generate_tokens(model, longer.tolist())
    assert_close(*gates)


def test_the_prompt_runs_through_every_block_once(model: MopForCausalLM) -> None:
    ran: Counter[int] = Counter()
    generate_tokens(model, CONTEXTS, max_new_tokens=1)  # compiled now
    handles = [
        block.register_forward_hook(lambda *_call, index=index: ran.update([index]))
        for index, block in enumerate(model.language_model.blocks)
    ]
    generate_tokens(model, CONTEXTS, max_new_tokens=3)
    for handle in handles:
        handle.remove()
    assert ran == dict.fromkeys(range(BLOCKS), 3)


def test_prompts_are_compiled_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = gated_model(), Counter[str]()
    compile_for_inference = MixtureOfPrompts.compile_for_inference
    monkeypatch.setattr(
        MixtureOfPrompts,
        "compile_for_inference",
        lambda self, network: (count.update(["compiled"]), compile_for_inference(self, network))[1],
    )
    before = [generate_tokens(model, CONTEXTS) for _ in range(2)]
    assert (count["compiled"], before[0]) == (1, before[1])
    with torch.no_grad():
        model.adapter.prompts.neg_()
    assert generate_tokens(model, CONTEXTS) != before[0]
    assert count["compiled"] == 2
    model.train().eval()
    generate_tokens(model, CONTEXTS)
    assert count["compiled"] == 3


def test_a_prompt_in_chunks_raises(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="prefill_chunk_size"):
        generate_tokens(model, CONTEXTS, prefill_chunk_size=2)


DRAFTED = {
    "the prompt's own words": lambda: {"prompt_lookup_num_tokens": 3},
    "another model's": lambda: {"assistant_model": tiny_model(seed=1).network},
}


@pytest.mark.parametrize("draft", DRAFTED)
@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_a_draft_after_the_prompt_is_not_read(arm: str, draft: str) -> None:
    """A drafted answer is faster, and no other answer."""
    model, prompt = perturbed_model(arm), CONTEXTS[0] + CONTEXTS[0]
    drafted = model.generate(torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())[:, len(prompt) :].tolist()
    assert drafted == generate_tokens(model, [prompt])


@pytest.mark.parametrize("draft", DRAFTED)
def test_the_gate_is_the_same_when_an_answer_is_drafted(model: MopForCausalLM, draft: str) -> None:
    prompt = CONTEXTS[0] + CONTEXTS[0]
    with recorded_gate(model) as gates:
        generate_tokens(model, [prompt])
        generate_tokens(model, [prompt], **DRAFTED[draft]())
        for arguments in ({}, {"inputs": None}):
            model.generate(**arguments, input_ids=torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())
        model.generate(None, input_ids=torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())
    assert len(gates) == 5
    for other in gates[1:]:
        assert_close(other, gates[0])


def test_no_hook_stays(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="row 1: no token before the response"):
        model(input_ids=random_tokens(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    generate_tokens(model, CONTEXTS)
    assert not any(block._forward_pre_hooks for block in model.language_model.blocks)


# --- forward with labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_training_and_evaluation(family: str, side: str) -> None:
    model = gated_model(family)
    batch = HiddenStateDataset(model.language_model, DOCUMENTS, LAYER, batch_size=2).batch(range(len(DOCUMENTS)))
    with torch.no_grad(), model.adapter.active(model.language_model, batch.instructions):
        expected = score_responses(model.language_model, batch, LAYER).nll.mean()
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            assert_close(model(**labelled_batch(DOCUMENTS, side=side)).loss, expected, rtol=1e-4, atol=1e-4)


def test_nothing_after_the_first_response_is_read(model: MopForCausalLM) -> None:
    """A second turn of the user depends on the first answer."""
    tokens = random_tokens(1, 9)
    labels = torch.full_like(tokens, -100)
    labels[:, 4:6] = tokens[:, 4:6]
    other = tokens.clone()
    other[:, 4:] = next_of(tokens[:, 4:])
    with recorded_gate(model) as gates:
        model(input_ids=tokens, labels=labels)
        model(input_ids=other, labels=torch.where(labels == -100, -100, other))
        model(input_ids=tokens, instruction_mask=torch.arange(9)[None] < 4)
    assert torch.equal(gates[0], gates[1])
    assert_close(gates[0], gates[2])


def test_a_response_without_an_instruction_raises(model: MopForCausalLM) -> None:
    tokens = random_tokens(2, 5)
    with pytest.raises(DataError, match="row 0: no token before the response"):
        model(input_ids=tokens, labels=tokens)


def test_training_without_labels_or_mask_raises() -> None:
    model, batch = gated_model().train(), labelled_batch(DOCUMENTS, side="left")
    labels = batch.pop("labels")
    with pytest.raises(DataError, match="would read the response too"):
        model(**batch)
    output = model(**batch, instruction_mask=batch["attention_mask"].bool() & (labels == -100))
    assert torch.equal(output.logits, model(**batch, labels=labels).logits)


def test_replicas_of_data_parallel_raise(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="accelerate launch"):
        model._replicate_for_data_parallel()


def test_gradients_reach_the_adapter_and_nothing_else() -> None:
    for mode in (True, False):
        model = gated_model().train(mode)
        model(**labelled_batch(DOCUMENTS, side="left")).loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
            f"adapter.{name}" for name, _ in model.adapter.named_parameters()
        }


@pytest.mark.parametrize("arm", GENERATING_ARMS)
def test_in_evaluation_gradients_change_nothing(arm: str) -> None:
    """With gradients and without: no noise, and only the experts that act in generation."""
    adapter = perturbed_adapter(arm, tiny_model(), layer=LAYER)[0]
    if arm == "mop":
        adapter.weighting = replace(adapter.weighting, top_k=1)
    model, batch = recovered(tiny_model(), adapter), labelled_batch(DOCUMENTS, side="left")
    with torch.no_grad():
        expected = model(**batch).logits
    for _ in range(2):
        assert_close(model(**batch).logits.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_answers_as_generate_does(model: MopForCausalLM) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", "left"
    prompts = [tokenizer.decode(context) for context in CONTEXTS]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    outputs = pipe(
        prompts, batch_size=3, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False, eos_token_id=None
    )
    expected = generate_tokens(model, CONTEXTS, eos_token_id=None)
    words = [tokenizer.decode(row, skip_special_tokens=True).split() for row in expected]
    assert [output[0]["generated_text"].split() for output in outputs] == words
