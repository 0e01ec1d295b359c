import pytest
import torch
from tiny_models import (
    BLOCKS,
    FAMILIES,
    HIDDEN,
    config_of,
    hooks,
    network_of,
    random_documents,
    random_tokens,
    tiny_model,
    word_tokenizer,
)
from torch.testing import assert_close
from transformers import AutoConfig

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.models.attention import record_kv
from mopcompress.models.language_model import BlockPlaceholder, LanguageModel
from mopcompress.recover.methods.mixture_of_prompts import MixtureOfPrompts

TOKENS = random_tokens(2, 9)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


def head(model, hidden):
    return model.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@torch.no_grad()
@pytest.mark.parametrize("layer", range(BLOCKS))
def test_lower_and_upper_blocks_are_the_model_to_the_bit(model, layer):
    whole = model.network(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(head(model, model.run_upper(model.run_lower(TOKENS, layer), layer)), whole)


@torch.no_grad()
@pytest.mark.parametrize("layer", range(1, BLOCKS))
def test_inputs_of_a_block_are_those_in_the_network(model, layer):
    states = model.network(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(model.run_lower(TOKENS, layer), states[layer])


@pytest.mark.parametrize("layer", range(BLOCKS))
def test_these_families_are_separable(model, layer):
    model.require_separable(layer)


@pytest.mark.parametrize("layer", range(1, BLOCKS))
def test_blocks_that_read_the_tokens_are_a_data_error(layer):
    model = tiny_model("gemma4")
    with pytest.raises(DataError, match=f"Gemma4ForCausalLM: blocks from {layer} up read more"):
        model.require_separable(layer)
    with pytest.raises(DataError, match="read more"):
        HiddenStateDataset(model, random_documents(3), layer, batch_size=2)


def test_widened_embeddings_are_a_data_error_at_block_0():
    model = tiny_model("opt", word_embed_proj_dim=HIDDEN // 2)
    with pytest.raises(DataError, match="embeddings of 16 numbers are widened to 32"):
        HiddenStateDataset(model, random_documents(3), 0, batch_size=2)
    model.require_separable(1)


@torch.no_grad()
def test_only_rotary_positions_can_begin_anywhere(model):
    """Only differences of positions count, so the whole text may be moved."""
    hidden = model.run_lower(TOKENS, 2)
    if model.network.config.model_type in {"gpt2", "opt"}:
        with pytest.raises(DataError, match="no rotary positions"):
            model.run_upper(hidden, 2, first_position=-3)
    else:
        moved = model.run_upper(hidden, 2, first_position=-3)
        assert_close(moved, model.run_upper(hidden, 2), rtol=1e-4, atol=1e-4)
        with record_kv() as moved_kv:
            model.run_upper(hidden, 2, first_position=-3)
        with record_kv() as unmoved_kv:
            model.run_upper(hidden, 2)
        assert not torch.allclose(moved_kv[2][0], unmoved_kv[2][0], atol=1e-2)


@torch.no_grad()
def test_block_after_block_is_the_forward_to_the_bit(model):
    output = model.network(input_ids=TOKENS, use_cache=False, output_hidden_states=True)
    hidden = None
    for layer in range(BLOCKS):
        hidden = model.run_block(TOKENS, hidden, layer)
        if layer + 1 < BLOCKS:
            assert torch.equal(hidden, output.hidden_states[layer + 1])
    assert torch.equal(head(model, hidden), output.logits)


@torch.no_grad()
def test_every_block_matters(model):
    """Otherwise the tests above would compare nothing."""
    hidden = model.run_lower(TOKENS, 1)
    for layer in range(1, BLOCKS):
        assert not torch.allclose(model.run_block(TOKENS, hidden, layer), hidden, atol=1e-2)


@torch.no_grad()
def test_placeholders_leave_the_network_unchanged(model):
    modules = {name: id(module) for name, module in model.network.named_modules()}
    weights = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    before, hook_count = model.network(input_ids=TOKENS).logits, hooks(model.network)
    model.logits(model.run_upper(model.run_block(TOKENS, model.run_lower(TOKENS, 2), 2), 3)[0])
    assert {name: id(module) for name, module in model.network.named_modules()} == modules
    assert all(torch.equal(weight, weights[name]) for name, weight in model.network.state_dict().items())
    assert hooks(model.network) == hook_count
    assert torch.equal(model.network(input_ids=TOKENS).logits, before)


def test_a_placeholder_has_attributes_but_no_weights():
    """Some decoders choose a mask by an attribute of the block."""
    block = torch.nn.Linear(2, 2)
    block.attention_type = "sliding_attention"
    placeholder = BlockPlaceholder(block, gives_tuple=False)
    assert placeholder.attention_type == "sliding_attention"
    assert not list(placeholder.parameters())
    with pytest.raises(AttributeError):
        _ = placeholder.nonsense


@torch.no_grad()
def test_right_padding_changes_nothing_before_it(model):
    short = TOKENS[:1, :5]
    padded = torch.cat([short, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    expected = model.run_upper(model.run_lower(short, 2), 2)
    assert_close(model.run_upper(model.run_lower(padded, 2), 2)[:, :5], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_head_runs_on_selected_positions(model):
    hidden = model.run_upper(model.run_lower(TOKENS, 2), 2)
    whole = model.network(input_ids=TOKENS).logits
    assert_close(model.logits(hidden[[1, 0], [3, 7]]), whole[[1, 0], [3, 7]], rtol=1e-5, atol=1e-5)


def test_the_network_is_frozen(model):
    assert not model.network.training
    assert not any(weight.requires_grad for weight in model.network.parameters())


def test_a_gradient_passes_through_the_upper_blocks(model):
    hidden = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.run_upper(hidden, 2).square().sum().backward()
    assert bool((hidden.grad != 0).any(-1).all())


def test_the_blocks_are_named_as_in_the_network(model):
    assert model.network.get_submodule(model.blocks_prefix()) is model.blocks
    assert len(model.blocks) == BLOCKS


def test_soft_capped_attention_is_a_data_error():
    network = network_of(config_of("gemma2", attn_logit_softcapping=50.0))
    with pytest.raises(DataError, match="softcap"):
        LanguageModel(network, word_tokenizer())


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bloom", {"hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}),
        ("gptj", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    ],
)
def test_unreachable_attention_is_an_error_only_for_prompts(kind, sizes):
    config = AutoConfig.for_model(kind, vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)
    model = LanguageModel(network_of(config, attention="eager"), word_tokenizer())
    with torch.no_grad():
        hidden = model.run_upper(model.run_lower(TOKENS, 1), 1)
        assert_close(model.logits(hidden[0]), model.network(input_ids=TOKENS).logits[0], **CLOSE)
    with pytest.raises(DataError, match="attention"):
        model.require_prompt_attention()
    with pytest.raises(DataError, match="attention"):
        MixtureOfPrompts(torch.zeros(1, 2, HIDDEN), 1, None).compile_for_inference(model)


def test_only_the_first_block_is_probed(tiny_llama):
    network = network_of(config_of("llama"))
    for block in network.model.layers[1:]:
        block.to("meta")
    network.lm_head.to("meta")
    model = LanguageModel(network, word_tokenizer())
    with torch.no_grad():
        assert torch.equal(model.run_block(TOKENS, None, 0), tiny_llama.run_block(TOKENS, None, 0))


def test_a_network_without_a_list_of_blocks_is_a_data_error():
    network = network_of(config_of("llama"))
    network.model.layers = torch.nn.Sequential(*network.model.layers)
    with pytest.raises(DataError, match="4 decoder blocks"):
        LanguageModel(network, word_tokenizer())
