"""A recovered model in transformers' hands: the gate reads the instruction alone, once, and stands."""

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BLOCKS,
    HIDDEN,
    next_of,
    random_documents,
    random_tokens,
    recovered,
    saved,
    tiny_model,
    word_tokenizer,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, pipeline

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError, UsageError
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.evaluation.loss import score_responses
from mopcompress.hf import MopConfig, MopForCausalLM
from mopcompress.hf.adapter_loading import parse_device_map
from mopcompress.models.compat import CACHE
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import weights_hash
from mopcompress.models.modules import weight_of
from mopcompress.models.repair import write_repairs
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.gate import Gate
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.save_and_load import config_from_disk, save_adapter
from mopcompress.storage import artifacts

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt2", "opt", "gpt_neox")
LAYER, NEW = 1, 6
CONTEXTS = [random_tokens(length, seed=length).tolist() for length in (9, 4, 6)]
GENERATING = [arm for arm in RECOVERY_METHODS if not ARM_DEFAULTS[arm].needs_tasks]
BEAMS = [{"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


def mixture(layer: int = LAYER) -> MixtureOfPrompts:
    """Two experts of three prompts and a gate with a will of its own, large enough to change what is said."""
    generator = torch.Generator().manual_seed(0)
    gate = Gate(HIDDEN, 2, generator=generator)
    gate.scale_logits(3.0)
    return MixtureOfPrompts(3 * torch.randn(2, 3, HIDDEN, generator=generator), layer, gate)


def made(family: str = "llama") -> MopForCausalLM:
    return recovered(tiny_model(family), mixture())


def begun(model: LanguageModel, arm: str, base_sha256: str, **changes: Any) -> tuple[Any, AdapterConfig]:
    """An adapter as training would leave it, near enough: begun, and pushed away from doing nothing."""
    tasks = ("add", "sort", "tell")
    config = AdapterConfig(
        arm=arm, experts=3, prompts_per_expert=8, layer=0, hidden_size=HIDDEN, base_sha256=base_sha256, tasks=tasks
    )
    config = replace(config, layer=0 if ARM_DEFAULTS[arm].at_input else LAYER, **changes)
    states = HiddenStateDataset(model, random_documents(9), config.layer, batch_size=4)
    start = AdapterInit(gate_pretraining_steps=3, gate_logit_scale=3.0, prompt_log_weight=1.0, seed=0)
    adapter = RECOVERY_METHODS[arm].initialize(
        config, AdapterInputs(model, states, tasks, lambda name: weight_of(model.network.get_submodule(name))), start
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter, config


@functools.cache
def acting(arm: str) -> MopForCausalLM:
    """Not to be changed."""
    return recovered(tiny_model(), begun(tiny_model(), arm, "")[0])


@pytest.fixture(scope="module")
def model() -> MopForCausalLM:
    """Not to be changed."""
    return made()


def padded(rows: list[list[int]], *, side: str = "left", value: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and which are real."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(row)) for row in rows]
    left = side == "left"
    tokens = [fill + row if left else row + fill for row, fill in zip(rows, filled, strict=True)]
    mask = [[0] * len(fill) + [1] * len(row) for row, fill in zip(rows, filled, strict=True)]
    return torch.tensor(tokens), torch.tensor(mask if left else [row[::-1] for row in mask])


def batch_of(documents: Any, *, side: str) -> dict[str, Tensor]:
    rows = [list(document.tokens) for document in documents]
    asked = [document.context_tokens for document in documents]
    labels = [[-100] * count + row[count:] for row, count in zip(rows, asked, strict=True)]
    tokens, mask = padded(rows, side=side)
    return {"input_ids": tokens, "attention_mask": mask, "labels": padded(labels, side=side, value=-100)[0]}


@contextmanager
def gates_of(model: MopForCausalLM) -> Iterator[list[Tensor]]:
    """What the gate says, call after call."""
    said: list[Tensor] = []
    handle = model.adapter.gate.register_forward_hook(lambda _gate, _inputs, output: said.append(output.detach()))
    yield said
    handle.remove()


def written(model: Any, rows: list[list[int]], **settings: Any) -> list[list[int]]:
    tokens, mask = padded(rows)
    return model.generate(tokens, attention_mask=mask, **GREEDY | settings)[:, tokens.shape[1] :].tolist()


# --- generation


@torch.no_grad()
def by_definition(model: MopForCausalLM, context: list[int]) -> list[int]:
    """Greedy decoding as evaluation scores it: one row, no cache, all states anew for each token."""
    network, tokens = model.language_model, list(context)
    hidden = network.run_lower(torch.tensor([context]), LAYER)
    read = InstructionStates(hidden, torch.tensor([len(context)]), hidden.mean(1))
    for _ in range(NEW):
        with model.adapter.active(network, read):
            left = network.run_upper(network.run_lower(torch.tensor([tokens]), LAYER), LAYER)
        tokens.append(int(network.logits(left[0, -1:]).argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_what_evaluation_scores_with_and_without_cache(family: str) -> None:
    model = made(family)
    expected = [by_definition(model, context) for context in CONTEXTS]
    assert written(model, CONTEXTS) == expected
    assert written(model, CONTEXTS, use_cache=False) == expected
    assert written(model.network, CONTEXTS) != expected


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forwards_of_ones_own_give_the_same(family: str) -> None:
    """Without a cache the labels say what the instruction is; with one it is what the cache begins with."""
    model, context = made(family), CONTEXTS[0]
    tokens, cache, one = torch.tensor([context]), DynamicCache(config=model.network.config), torch.tensor([context])
    for expected in by_definition(model, context):
        labels = tokens.clone()
        labels[:, : len(context)] = -100
        assert int(model(input_ids=tokens, labels=labels).logits[0, -1].argmax()) == expected
        assert int(model(input_ids=one, past_key_values=cache).logits[0, -1].argmax()) == expected
        one = torch.tensor([[expected]])
        tokens = torch.cat([tokens, one], dim=1)


@torch.no_grad()
def test_loops_of_ones_own_may_begin_a_cache_with_padding(model: MopForCausalLM) -> None:
    alone = []
    for context in CONTEXTS:
        cache, one = DynamicCache(config=model.network.config), torch.tensor([context])
        first = model(input_ids=one, past_key_values=cache).logits[:, -1]
        second = model(input_ids=first.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
        alone.append(torch.cat([first, second]))
    (tokens, mask), cache = padded(CONTEXTS), DynamicCache(config=model.network.config)
    first = model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
    mask, one = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), first.argmax(-1, keepdim=True)
    second = model(input_ids=one, attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert_close(torch.stack([first, second], dim=1), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_cache_that_another_model_began_is_refused(model: MopForCausalLM) -> None:
    cache = model.network(input_ids=torch.tensor([CONTEXTS[0]]))[CACHE]
    with pytest.raises(DataError, match="was not begun by this model"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def generated(model: MopForCausalLM, rows: list[list[int]], **settings: Any) -> tuple[list[list[int]], Tensor]:
    """What is written, and the score of each token of it, in which a gate shows where the tokens stay the same."""
    tokens, mask = padded(rows)
    more = {"output_scores": True, "return_dict_in_generate": True}
    output = model.generate(tokens, attention_mask=mask, **GREEDY | more | settings)
    scores = model.compute_transition_scores(output.sequences, output.scores, output.get("beam_indices"))
    return output.sequences[:, tokens.shape[1] :].tolist(), scores


@pytest.mark.parametrize("settings", [{}, *BEAMS])
@pytest.mark.parametrize("arm", GENERATING)
def test_each_row_is_generated_as_if_alone(arm: str, settings: dict[str, Any]) -> None:
    """Its beams too keep its gate."""
    model = acting(arm)
    answers, scores = generated(model, CONTEXTS, **settings)
    alone = [generated(model, [context], **settings) for context in CONTEXTS]
    assert answers == [answer for some, _ in alone for answer in some]
    assert_close(scores, torch.cat([some for _, some in alone]), rtol=1e-4, atol=1e-4)
    assert answers != written(model.network, CONTEXTS, **settings)


@pytest.mark.parametrize("arm", GENERATING)
def test_samples_are_drawn_under_the_gate_of_their_row_and_by_the_seed(arm: str) -> None:
    """Sampled at a temperature of nearly 0, every sequence is the greedy one."""
    model, temperature = acting(arm), 1e-4
    answers, scores = generated(model, CONTEXTS)
    again, sampled = generated(model, CONTEXTS, do_sample=True, temperature=temperature, num_return_sequences=3)
    assert again == [answer for answer in answers for _ in range(3)]
    assert_close(sampled * temperature, scores.repeat_interleave(3, dim=0), rtol=1e-4, atol=1e-4)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(written(model, CONTEXTS, do_sample=True))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_static_cache_changes_nothing(model: MopForCausalLM) -> None:
    static = {"cache_implementation": "static", "disable_compile": True}
    assert written(model, CONTEXTS, **static) == written(model, CONTEXTS)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_gate_reads_each_prompt_once_and_every_call_anew(model: MopForCausalLM, use_cache: bool) -> None:
    with gates_of(model) as said:
        answers = [written(model, rows, use_cache=use_cache) for rows in (CONTEXTS, CONTEXTS[::-1], CONTEXTS)]
    assert len(said) == 3
    assert_close(said[0], said[1].flip(0))
    assert torch.equal(said[0], said[2])
    assert float(said[0].std(0).max()) > 0.1
    assert answers[0] == answers[1][::-1] == answers[2]
    alone = MopForCausalLM.forward(model, input_ids=torch.tensor([CONTEXTS[0]]))
    assert alone.logits.shape[1] == len(CONTEXTS[0])  # a forward after generate is a forward again


def test_padding_is_not_read(model: MopForCausalLM) -> None:
    with gates_of(model) as said:
        written(model, CONTEXTS)
        for context in CONTEXTS:
            written(model, [context])
    assert_close(said[0], torch.cat(said[1:]))


def test_a_generation_that_goes_on_from_a_cache_reads_the_whole_text_anew(model: MopForCausalLM) -> None:
    first = torch.tensor([CONTEXTS[0]])
    kept = model.generate(first, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([kept.sequences, random_tokens(1, 3)], dim=1)
    with gates_of(model) as said:
        model.generate(longer, **GREEDY | {CACHE: kept[CACHE]})
        written(model, longer.tolist())
    assert_close(*said)


def test_the_prompt_runs_through_every_block_once(model: MopForCausalLM) -> None:
    ran: Counter[int] = Counter()
    written(model, CONTEXTS, max_new_tokens=1)  # compiled now
    handles = [
        block.register_forward_hook(lambda *_call, index=index: ran.update([index]))
        for index, block in enumerate(model.language_model.blocks)
    ]
    written(model, CONTEXTS, max_new_tokens=3)
    for handle in handles:
        handle.remove()
    assert ran == dict.fromkeys(range(BLOCKS), 3)


def test_prompts_are_compiled_once_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = made(), Counter[str]()
    compile_them = MixtureOfPrompts.compile_for_inference
    monkeypatch.setattr(
        MixtureOfPrompts,
        "compile_for_inference",
        lambda self, network: (count.update(["compiled"]), compile_them(self, network))[1],
    )
    before = [written(model, CONTEXTS) for _ in range(2)]
    assert (count["compiled"], before[0]) == (1, before[1])
    with torch.no_grad():
        model.adapter.prompts.neg_()
    assert written(model, CONTEXTS) != before[0]
    assert count["compiled"] == 2
    model.train().eval()
    written(model, CONTEXTS)
    assert count["compiled"] == 3


def test_a_prompt_in_chunks_is_refused(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="prefill_chunk_size"):
        written(model, CONTEXTS, prefill_chunk_size=2)


DRAFTED = {
    "the prompt's own words": lambda: {"prompt_lookup_num_tokens": 3},
    "another model's": lambda: {"assistant_model": tiny_model(seed=1).network},
}


@pytest.mark.parametrize("draft", DRAFTED)
@pytest.mark.parametrize("arm", GENERATING)
def test_a_draft_that_follows_the_prompt_is_not_read(arm: str, draft: str) -> None:
    """What drafts the answer can make it faster, not another one."""
    model, prompt = acting(arm), CONTEXTS[0] + CONTEXTS[0]
    drafted = model.generate(torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())[:, len(prompt) :].tolist()
    assert drafted == written(model, [prompt])


@pytest.mark.parametrize("draft", DRAFTED)
def test_the_gate_says_the_same_where_an_answer_is_drafted(model: MopForCausalLM, draft: str) -> None:
    prompt = CONTEXTS[0] + CONTEXTS[0]
    with gates_of(model) as said:
        written(model, [prompt])
        written(model, [prompt], **DRAFTED[draft]())
        for given in ({}, {"inputs": None}):
            model.generate(**given, input_ids=torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())
        model.generate(None, input_ids=torch.tensor([prompt]), **GREEDY | DRAFTED[draft]())
    assert len(said) == 5
    for other in said[1:]:
        assert_close(other, said[0])


def test_no_hook_stays(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="row 1: no token before the response"):
        model(input_ids=random_tokens(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    written(model, CONTEXTS)
    assert not any(block._forward_pre_hooks for block in model.language_model.blocks)


# --- forward with labels


DOCUMENTS = random_documents(4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_training_and_evaluation(family: str, side: str) -> None:
    model = made(family)
    batch = HiddenStateDataset(model.language_model, DOCUMENTS, LAYER, batch_size=2).batch(range(len(DOCUMENTS)))
    with torch.no_grad(), model.adapter.active(model.language_model, batch.instructions):
        expected = score_responses(model.language_model, batch, LAYER).nll.mean()
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            assert_close(model(**batch_of(DOCUMENTS, side=side)).loss, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_scored_after_the_first_response_is_not_read(model: MopForCausalLM) -> None:
    """A second turn of the user depends on the first answer."""
    tokens = random_tokens(1, 9)
    labels = torch.full_like(tokens, -100)
    labels[:, 4:6] = tokens[:, 4:6]
    other = tokens.clone()
    other[:, 4:] = next_of(tokens[:, 4:])
    with gates_of(model) as said:
        model(input_ids=tokens, labels=labels)
        model(input_ids=other, labels=torch.where(labels == -100, -100, other))
        model(input_ids=tokens, instruction_mask=torch.arange(9)[None] < 4)
    assert torch.equal(said[0], said[1])
    assert_close(said[0], said[2])


def test_a_response_without_an_instruction_is_refused(model: MopForCausalLM) -> None:
    tokens = random_tokens(2, 5)
    with pytest.raises(DataError, match="row 0: no token before the response"):
        model(input_ids=tokens, labels=tokens)


def test_training_without_anything_that_says_where_the_response_begins_is_refused() -> None:
    model, batch = made().train(), batch_of(DOCUMENTS, side="left")
    labels = batch.pop("labels")
    with pytest.raises(DataError, match="would read the response too"):
        model(**batch)
    given = model(**batch, instruction_mask=batch["attention_mask"].bool() & (labels == -100))
    assert torch.equal(given.logits, model(**batch, labels=labels).logits)


def test_replicas_that_would_run_without_the_adapter_are_refused(model: MopForCausalLM) -> None:
    with pytest.raises(DataError, match="accelerate launch"):
        model._replicate_for_data_parallel()


def test_gradients_reach_all_of_the_adapter_and_nothing_else() -> None:
    for mode in (True, False):
        model = made().train(mode)
        model(**batch_of(DOCUMENTS, side="left")).loss.backward()
        assert {name for name, one in model.named_parameters() if one.grad is not None} == {
            f"adapter.{name}" for name, _ in model.adapter.named_parameters()
        }


# --- folders


def folders_of(arm: str, folder: Path, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
    model = tiny_model(family)
    base = saved(model, folder / "base")
    with artifacts.publish(folder / "adapter", {"kind": "adapter"}) as scratch:
        save_adapter(*begun(model, arm, weights_hash(base), **changes), scratch)
    return base, folder / "adapter"


@pytest.mark.parametrize("arm", GENERATING)
def test_every_arm_goes_from_its_folders_into_one_and_back(arm: str, tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*folders_of(arm, tmp_path))
    assert not model.training
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(again, MopForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "one"), MopConfig)
    assert again.config.adapter["arm"] == arm
    assert again.state_dict().keys() == model.state_dict().keys()
    batch = batch_of(DOCUMENTS, side="left")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        assert not torch.allclose(model.network(**batch).logits, expected, atol=1e-3)
    tokens, mask = padded(CONTEXTS)
    assert written(model, CONTEXTS) == written(again, CONTEXTS) == written(model, CONTEXTS, use_cache=False)
    assert torch.equal(
        copy.deepcopy(model).generate(tokens, attention_mask=mask, **GREEDY)[:, -NEW:].flatten(),
        torch.tensor(written(model, CONTEXTS)).flatten(),
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral"])
def test_tied_and_stacked_weights_come_back(family: str, tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*folders_of("mop", tmp_path, family))
    model.save_pretrained(tmp_path / "one")
    again = MopForCausalLM.from_pretrained(tmp_path / "one")
    assert written(model, CONTEXTS) == written(again, CONTEXTS)
    tied = model.network.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_an_arm_that_needs_the_task_says_so(tmp_path: Path) -> None:
    model = MopForCausalLM.from_pretrained(*folders_of("oracle", tmp_path))
    with pytest.raises(UsageError, match="needs the true task"):
        written(model, CONTEXTS)


def test_a_repair_beside_the_weights_goes_along(tmp_path: Path) -> None:
    base = saved(tiny_model(), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(HIDDEN, 2, generator=generator), torch.randn(2, 48, generator=generator)
    write_repairs(base / "repair.safetensors", {"model.layers.2.mlp.down_proj": LowRankFactors(up, down)})
    with artifacts.publish(tmp_path / "adapter", {"kind": "adapter"}) as scratch:
        save_adapter(*begun(tiny_model(), "mop", weights_hash(base)), scratch)
    model = MopForCausalLM.from_pretrained(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "one")
    again = MopForCausalLM.from_pretrained(tmp_path / "one")
    batch = batch_of(DOCUMENTS, side="right")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        (tmp_path / "one" / "repair.safetensors").unlink()
        assert not torch.allclose(MopForCausalLM.from_pretrained(tmp_path / "one")(**batch).logits, expected)
    around = MopForCausalLM.from_parts(model.language_model, model.adapter, config_from_disk(model.config.adapter))
    with pytest.raises(DataError, match="repair that would be lost"):
        around.save_pretrained(tmp_path / "two")


def test_a_device_map_of_the_whole_model_names_its_device() -> None:
    meta = torch.device("meta")
    assert [parse_device_map(device) for device in ("meta", meta, {"": "meta"}, {"": meta}, None)] == [meta] * 4 + [None]


def test_a_base_alone_is_no_recovered_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name its adapter"):
        MopForCausalLM.from_pretrained(saved(tiny_model(), tmp_path / "base"))


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_dtype_and_device_are_transformers_own(device_map: Any, tmp_path: Path) -> None:
    folders = folders_of("mop", tmp_path)
    model = MopForCausalLM.from_pretrained(*folders, dtype="bfloat16", device_map=device_map)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert len(written(model, CONTEXTS)[0]) == NEW


def test_what_says_where_a_hub_model_comes_from_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "one", {}
    MopForCausalLM.from_pretrained(*folders_of("norms", tmp_path)).save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **said: asked.update(said) or str(folder))
    hub = {"revision": "v2", "cache_dir": str(tmp_path), "local_files_only": True}
    MopForCausalLM.from_pretrained("org/model", **hub, token=None)
    assert {name: one for name, one in asked.items() if name != "allow_patterns"} == hub


@pytest.mark.parametrize("deep", [False, True])
def test_a_deep_adapter_is_loaded_in_half_the_precision_too(deep: bool, tmp_path: Path) -> None:
    folders, batch = folders_of("mop", tmp_path, per_layer_prompts=deep), batch_of(DOCUMENTS, side="left")
    half = MopForCausalLM.from_pretrained(*folders, dtype="bfloat16")
    whole = MopForCausalLM.from_pretrained(*folders)
    with torch.no_grad():
        assert_close(half(**batch).logits.float(), whole(**batch).logits, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("arm", GENERATING)
def test_in_evaluation_gradients_change_nothing(arm: str) -> None:
    """Whether they are wanted or not: no noise, and only the experts that act in generation."""
    adapter = begun(tiny_model(), arm, "")[0]
    if arm == "mop":
        adapter.weighting = replace(adapter.weighting, top_k=1)
    model, batch = recovered(tiny_model(), adapter), batch_of(DOCUMENTS, side="left")
    with torch.no_grad():
        expected = model(**batch).logits
    for _ in range(2):
        assert_close(model(**batch).logits.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", GENERATING)
def test_a_model_of_half_the_precision_comes_back_as_it_was(arm: str, tmp_path: Path) -> None:
    """Positions are as exact as in fp32, as transformers has it."""
    model = MopForCausalLM.from_pretrained(*folders_of(arm, tmp_path), dtype="bfloat16")
    assert {one.dtype for name, one in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    model.save_pretrained(tmp_path / "one")
    batch = batch_of(DOCUMENTS, side="left")
    whole = MopForCausalLM.from_pretrained(tmp_path / "one", dtype="float32")
    assert {one.dtype for one in whole.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(whole(**batch).logits, expected.float(), rtol=0.1, atol=0.5)
        for dtype in (None, "auto", torch.bfloat16):
            again = MopForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
            assert {one.dtype for one in again.parameters()} == {torch.bfloat16}
            assert torch.equal(again(**batch).logits, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attn_implementation": "sdpa"}, "attn_implementation: adapters need"),
        ({"device": "cpu"}, "no argument 'device'"),
        ({"quantization_config": {}}, "no argument 'quantization_config'"),
        ({"device_map": "auto"}, "device_map 'auto' is not one device"),
        ({"device_map": {"": "cpu", "lm_head": "disk"}}, "is not one device"),
        ({"config": PretrainedConfig()}, "config: a base and its adapter bring their own"),
    ],
)
def test_what_would_not_be_heeded_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, adapter = folders_of("norms", tmp_path)
    with pytest.raises(TypeError, match=said):
        MopForCausalLM.from_pretrained(base, adapter, **settings)


def test_what_transformers_hands_over_is_taken(tmp_path: Path) -> None:
    MopForCausalLM.from_pretrained(*folders_of("norms", tmp_path)).save_pretrained(tmp_path / "one")
    hub = {"cache_dir": str(tmp_path), "local_files_only": True, "token": None, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="bfloat16", **hub)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    word_tokenizer().save_pretrained(tmp_path / "one")
    piped = pipeline("text-generation", model=str(tmp_path / "one"), device="cpu", dtype=torch.float32)
    assert isinstance(piped.model, MopForCausalLM)


def test_a_pipeline_writes_what_generate_writes(model: MopForCausalLM) -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", "left"
    prompts = [tokenizer.decode(context) for context in CONTEXTS]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    told = pipe(prompts, batch_size=3, max_new_tokens=NEW, do_sample=False, return_full_text=False, eos_token_id=None)
    expected = written(model, CONTEXTS, eos_token_id=None)
    words = [tokenizer.decode(row, skip_special_tokens=True).split() for row in expected]
    assert [one[0]["generated_text"].split() for one in told] == words
