"""PEFT computes, on its own model, what the exported adapter computes here."""

import json
import warnings

import pytest
import torch
from factories import initialized_adapter
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import TOKENS as TOKEN_IDS
from tiny_models import config_of, network_of, random_documents, random_tokens, tiny_model, word_tokenizer
from torch.testing import assert_close
from transformers import CohereConfig

from mopcompress.algorithms.solution import LowRankFactors
from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset, InstructionStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.repair import add_repair
from mopcompress.recover.methods.prompt_kv import record_prompt_kv
from mopcompress.recover.peft_export import FORMATS, shift_keys, write_peft
from mopcompress.recover.registry import RECOVERY_METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
EXPORTED = ("input", "prefix")
FAMILIES = ("llama", "qwen3", "mistral", "gemma", "gpt_neox", "phi")
WINDOWS = {"mistral": {"sliding_window": 64}}  # PEFT's prompts fall out of a window, ours do not
TOKENS = random_tokens(3, 9)


def exported(arm, family, folder):
    """Return our adapter, its model, and PEFT's model of the same weights with the exported adapter."""
    changes = WINDOWS.get(family, {})
    model = tiny_model(family, **changes)
    states = HiddenStateDataset(model, random_documents(6), 0, batch_size=4)
    adapter, config = initialized_adapter(arm, model, states)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    folder.mkdir(exist_ok=True)
    write_peft(adapter, config, model, "somewhere", folder)
    theirs = PeftModel.from_pretrained(network_of(config_of(family, **changes), attention="sdpa"), folder)
    return model, adapter, theirs.eval()


def instructions(model, rows):
    hidden = torch.zeros(rows, 2, model.hidden_size)
    return InstructionStates(hidden=hidden, lengths=torch.full((rows,), 2), mean=hidden.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", EXPORTED)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_equal_those_of_peft(tmp_path, arm, family, padding):
    model, adapter, theirs = exported(arm, family, tmp_path)
    mask = torch.ones_like(TOKENS)
    mask[0, {"none": slice(0, 0), "left": slice(0, 4), "right": slice(5, 9)}[padding]] = 0
    with adapter.compile_for_inference(model)(instructions(model, 3)):
        ours = model.network(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
    logits = theirs(input_ids=TOKENS, attention_mask=mask).logits
    if arm == "input":
        logits = logits[:, -TOKENS.shape[1] :]
    real, bare = mask.bool(), model.network(input_ids=TOKENS, attention_mask=mask).logits
    assert_close(ours[real], logits[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[real], bare[real], atol=0.1)


@pytest.mark.parametrize("arm", EXPORTED)
def test_greedy_generation_equals_that_of_peft(tmp_path, arm):
    model, adapter, theirs = exported(arm, "llama", tmp_path)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)} | settings
    with adapter.compile_for_inference(model)(instructions(model, 3)):
        ours = model.network.generate(**inputs)
    assert torch.equal(ours, theirs.generate(**inputs))
    assert not torch.equal(ours, model.network.generate(**inputs))


def test_a_padded_prefix_generates_as_peft_does(tmp_path):
    """PEFT's prompts at the input ignore the positions of a left-padded batch, its prefixes do not."""
    model, adapter, theirs = exported("prefix", "llama", tmp_path)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with adapter.compile_for_inference(model)(instructions(model, 3)):
        ours = model.network.generate(input_ids=TOKENS, attention_mask=mask, **settings)
    assert torch.equal(ours, theirs.generate(input_ids=TOKENS, attention_mask=mask, **settings))


@pytest.mark.parametrize(("arm", "kind"), [("input", PromptTuningConfig), ("prefix", PrefixTuningConfig)])
def test_the_files_are_like_those_of_peft(tmp_path, arm, kind):
    _, _, theirs = exported(arm, "llama", tmp_path / "ours")
    tokens = theirs.peft_config["default"].num_virtual_tokens
    network = network_of(config_of("llama"), attention="sdpa")
    peft_model = get_peft_model(network, kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    with warnings.catch_warnings(action="ignore"):  # a random model has no name
        peft_model.save_pretrained(tmp_path / "theirs")
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    named = {"base_model_name_or_path"}
    assert settings[0].keys() <= settings[1].keys()
    assert {name: settings[1][name] for name in settings[0].keys() - named} == {
        name: settings[0][name] for name in settings[0].keys() - named
    }
    shapes = [
        {name: tensor.shape for name, tensor in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
        for folder in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_an_arm_that_peft_lacks_is_refused(tmp_path, tiny_llama):
    states = HiddenStateDataset(tiny_llama, random_documents(6), 0, batch_size=4)
    with pytest.raises(DataError, match="arm smop: PEFT has no such adapter, only input, prefix"):
        write_peft(*initialized_adapter("smop", tiny_llama, states), tiny_llama, "somewhere", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_repair_is_refused(tmp_path):
    model = tiny_model()
    adapter, config = initialized_adapter(
        "lora", model, HiddenStateDataset(model, random_documents(6), 0, batch_size=4)
    )
    linear = model.blocks[0].mlp.down_proj
    rows, columns = linear.weight.shape
    add_repair(linear, LowRankFactors(torch.zeros(rows, 1), torch.zeros(1, columns)))
    with pytest.raises(DataError, match="model somewhere has a low-rank repair"):
        write_peft(adapter, config, model, "somewhere", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_families_whose_prefix_positions_differ_are_refused(tmp_path, family):
    with pytest.raises(DataError, match="positions"):
        exported("prefix", family, tmp_path)


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}])
def test_shifted_keys_are_those_of_the_model_at_that_position(rope):
    """Yarn also scales keys, which must not happen twice."""
    model = tiny_model("llama", rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rope)
    states = model.run_lower(random_tokens(1, 5), 0)
    original, _ = record_prompt_kv(model, states, 0)
    shifted, _ = record_prompt_kv(model, states, 0, first_position=3)
    for layer, key in shift_keys(model, original, 3).items():
        assert_close(key, shifted[layer], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(key, original[layer], atol=1e-2)


def test_rotary_pairs_of_neighbours_are_refused():
    """Cohere rotates neighbouring dimensions, not halves."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    model = LanguageModel(network_of(CohereConfig(**TOKEN_IDS, **sizes, num_key_value_heads=2)), word_tokenizer())
    keys, _ = record_prompt_kv(model, model.run_lower(random_tokens(1, 5), 0), 0)
    with pytest.raises(DataError, match="CohereForCausalLM has positions that PEFT's prefixes cannot be moved to"):
        shift_keys(model, keys, 3)


def test_every_format_belongs_to_an_arm():
    assert FORMATS.keys() <= RECOVERY_METHODS.keys()
