import pytest
import torch
from algorithms.test_structured import least_squares
from compress.test_sequential import input_of, linears, weight_of
from tiny_models import FAMILIES, GROUPED, SHAPE, TOKENS, hooks, network_of, random_tokens, tiny_model, word_tokenizer
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig, GemmaConfig, Phi3Config, PhiConfig, Qwen2Config

from mopcompress.algorithms.structured import prune_input_groups
from mopcompress.compress.structured import StructuredConfig, prune_structured
from mopcompress.errors import DataError, NumericalError
from mopcompress.models.language_model import LanguageModel

WINDOWS = random_tokens(6, 20)
GROUPS = {"num_key_value_heads": 2}
MORE = {
    "qwen2": lambda: Qwen2Config(**TOKENS | SHAPE | GROUPS),
    "gemma": lambda: GemmaConfig(**TOKENS | SHAPE | GROUPED),
    "phi": lambda: PhiConfig(**TOKENS | SHAPE),
    "phi3": lambda: Phi3Config(**TOKENS | SHAPE | GROUPS),
}
CHANNELS = {"gpt2": "n_inner", "opt": "ffn_dim"}  # otherwise intermediate_size
WITH_CHANNELS = [*(family for family in FAMILIES if family != "mixtral"), *MORE]
WITH_HEADS = ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", *MORE]
QUARTER = StructuredConfig(mlp_sparsity=0.25)
HALF_THE_HEADS = StructuredConfig(mlp_sparsity=0.0, head_sparsity=0.5)


def model_of(family, **changes):
    if family == "bloom":  # has an attention of its own
        config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
        return LanguageModel(network_of(config, attention="eager"), word_tokenizer())
    if family not in MORE:
        return tiny_model(family, **changes)
    return LanguageModel(network_of(MORE[family]()), word_tokenizer())


def logits_of(network, tokens=WINDOWS):
    with torch.no_grad():
        return network(input_ids=tokens).logits


def readers(model, kind):
    """The last matrix of every MLP or attention, by name."""
    ends = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h") if kind == "channels" else ("o_proj", "self_attn.dense")
    return {name: linear for name, linear in linears(model).items() if name.endswith(ends)}


def narrow_slowly(model, kind, groups, remove):
    """In place, without making anything smaller: columns become zero, others are fitted by numpy, one after another.

    Every input is computed by running the whole network, as it is then, anew.
    """
    for reader in readers(model, kind).values():
        inputs, weight = input_of(model, reader), weight_of(reader)
        centred = inputs if reader.bias is None else inputs - inputs.mean(0)
        gram = centred.T @ centred / len(centred)
        kept = prune_input_groups(weight, gram, groups=groups, remove=remove).kept.tolist()
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = least_squares(weight, centred, kept)[0]
        if reader.bias is not None:
            reader.bias += (weight - fitted) @ inputs.mean(0)
        weight.copy_(fitted)


# --- what is computed


@pytest.mark.parametrize(
    ("family", "kind", "groups", "remove"),
    [
        ("llama", "channels", 48, 12),
        ("gpt2", "channels", 128, 32),
        ("phi", "channels", 48, 12),
        ("llama", "kv_groups", 2, 1),
        ("phi", "kv_groups", 4, 2),
    ],
)
def test_one_pass_is_the_slow_definition(family, kind, groups, remove):
    fast, slow = model_of(family), model_of(family)
    fast.network.double()
    slow.network.double()
    prune_structured(fast, WINDOWS, QUARTER if kind == "channels" else HALF_THE_HEADS)
    with torch.no_grad():
        narrow_slowly(slow, kind, groups, remove)
    assert_close(logits_of(fast.network), logits_of(slow.network), rtol=1e-5, atol=1e-6)
    for name, linear in readers(slow, kind).items():
        left = weight_of(linear)[:, (weight_of(linear) != 0).any(0)]
        assert_close(weight_of(readers(fast, kind)[name]), left, rtol=1e-5, atol=1e-6)


def test_the_error_that_is_told_is_the_measured_one():
    model, dense = tiny_model(), tiny_model()
    rows = prune_structured(model, WINDOWS, QUARTER).rows
    with torch.no_grad():
        inputs = input_of(dense, dense.blocks[0].mlp.down_proj)
        gated = input_of(model, model.blocks[0].mlp.down_proj)
        full = inputs @ dense.blocks[0].mlp.down_proj.weight.T
        lost = full - gated @ model.blocks[0].mlp.down_proj.weight.T
    assert rows[0].error == pytest.approx(float(lost.square().sum() / full.square().sum()), rel=1e-3)


@pytest.mark.parametrize("score", ["error", "norm"])
def test_nothing_removed_is_the_same_model_to_the_bit(score):
    model, untouched = tiny_model(), tiny_model()
    done = prune_structured(model, WINDOWS, StructuredConfig(mlp_sparsity=0.0, score=score))
    assert (done.rows, done.sizes) == ([], {})
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, untouched.network.state_dict()[name])


@pytest.mark.parametrize(
    ("reader", "sizes", "shares"),
    [
        ("mlp.down_proj", {"intermediate_size": 48}, {"mlp_sparsity": 0.5}),
        (
            "self_attn.o_proj",
            {"num_attention_heads": 4, "num_key_value_heads": 2},
            {"mlp_sparsity": 0.0, "head_sparsity": 0.5},
        ),
    ],
)
def test_what_stands_twice_goes_at_no_loss(reader, sizes, shares):
    """Channels, or heads, of a smaller model stand there twice; of what they did each does a share."""
    original = tiny_model(**{name: size // 2 for name, size in sizes.items()})
    model = tiny_model(**sizes)
    for one in (original, model):
        one.network.double()
    weights = original.network.state_dict()
    model.network.load_state_dict({name: one.repeat(_times(one, model, name)) for name, one in weights.items()})
    with torch.no_grad():
        for block in model.blocks:
            weight = block.get_submodule(reader).weight
            weight[:, : weight.shape[1] // 2] *= 0.3
            weight[:, weight.shape[1] // 2 :] *= 0.7
    assert_close(logits_of(model.network), logits_of(original.network))
    prune_structured(model, WINDOWS, StructuredConfig(**shares, damping=1e-9))
    assert total(model) == total(original)
    assert_close(logits_of(model.network), logits_of(original.network), rtol=1e-5, atol=1e-5)


def _times(weight, model, name):
    wide = model.network.state_dict()[name].shape
    return tuple(new // old for new, old in zip(wide, weight.shape, strict=True))


# --- what is left


@pytest.mark.parametrize("family", WITH_CHANNELS)
def test_channels_are_counted_exactly_and_stock_transformers_computes_the_same(family, tmp_path):
    model, dense = model_of(family), model_of(family)
    done = prune_structured(model, WINDOWS, QUARTER)
    before = weight_of(next(iter(readers(dense, "channels").values()))).shape[1]
    after = before - before // 4
    assert done.sizes == {CHANNELS.get(family, "intermediate_size"): after}
    assert [(row.block, row.kind, row.before, row.after) for row in done.rows] == [
        (block, "channels", before, after) for block in range(4)
    ]
    for row in done.rows:
        assert weight_of(linears(model)[row.name]).shape == (32, after)
        assert row.weights == row.weights_before * after // before
    assert total(dense) - total(model) == sum(row.weights_before - row.weights for row in done.rows)
    check_stock(model, tmp_path)


@pytest.mark.parametrize("family", WITH_HEADS)
def test_heads_go_in_whole_groups_and_stock_transformers_computes_the_same(family, tmp_path):
    model, dense = model_of(family), model_of(family)
    heads, groups = dense.config.num_attention_heads, dense.config.num_key_value_heads
    done = prune_structured(model, WINDOWS, HALF_THE_HEADS)
    wanted = {"num_attention_heads": heads // 2, "num_key_value_heads": groups // 2, "head_dim": 8}
    assert done.sizes == wanted == {name: getattr(model.network.config, name) for name in wanted}
    assert [(row.kind, row.before, row.after) for row in done.rows] == [("kv_groups", groups, groups // 2)] * 4
    assert all(2 * row.weights == row.weights_before for row in done.rows)
    assert total(dense) - total(model) == sum(row.weights_before - row.weights for row in done.rows)
    check_stock(model, tmp_path)


def test_both_at_once_and_once_again(tmp_path):
    model = tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    both = StructuredConfig(mlp_sparsity=0.25, head_sparsity=0.5)
    assert [row.kind for row in prune_structured(model, WINDOWS, both).rows] == ["kv_groups", "channels"] * 4
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 27}
    assert prune_structured(model, WINDOWS, both).sizes == sizes
    check_stock(model, tmp_path)


def total(model):
    """Weights of all matrices in the blocks."""
    return sum(linear.weight.numel() for linear in linears(model).values())


def check_stock(model, folder):
    model.network.save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    # Gemma 2 comes with another attention, which adds up in another order
    exact = {"rtol": 0, "atol": 0} if stock.config._attn_implementation == "sdpa" else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(logits_of(stock), logits_of(model.network), **exact)
    for ours, theirs in zip(model.network.modules(), stock.modules(), strict=True):
        assert {n: v for n, v in vars(ours).items() if type(v) is int} == {
            n: v for n, v in vars(theirs).items() if type(v) is int
        }


def test_progress_is_told_every_row_as_it_is_returned():
    told = []
    assert prune_structured(tiny_model(), WINDOWS, QUARTER, progress=told.append).rows == told
    assert len(told) == 4


def test_prompts_can_be_trained_through_a_narrowed_model():
    model = tiny_model()
    prune_structured(model, WINDOWS, QUARTER)
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    model.run_upper(hidden, 1).sum().backward()
    assert hidden.grad is not None


# --- when it cannot be


@pytest.mark.parametrize(
    ("family", "narrowing", "reason"),
    [
        ("mixtral", QUARTER, "found 0 MLP parts"),
        ("gpt_neox", HALF_THE_HEADS, "found 0 attention parts"),
        ("gpt2", HALF_THE_HEADS, "found 0 attention parts"),
        ("opt", HALF_THE_HEADS, "configuration cannot say"),
        ("bloom", QUARTER, "configuration of BloomForCausalLM has no number of MLP channels"),
        ("bloom", HALF_THE_HEADS, "found 0 attention parts"),
    ],
)
def test_a_family_that_cannot_say_it_is_refused_and_untouched(family, narrowing, reason):
    model, untouched = model_of(family), model_of(family)
    with pytest.raises(DataError, match=reason):
        prune_structured(model, WINDOWS, narrowing)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, untouched.network.state_dict()[name])


def test_a_number_of_heads_that_stock_transformers_refuses_is_refused():
    model = tiny_model(num_key_value_heads=4)
    with pytest.raises(DataError, match=r"num_attention_heads 3.*not a multiple"):
        prune_structured(model, WINDOWS, StructuredConfig(mlp_sparsity=0.0, head_sparsity=0.25))


@pytest.mark.parametrize(
    ("narrowing", "reason"),
    [
        (StructuredConfig(mlp_sparsity=0.01), "0.01 of 48 channels is none"),
        (StructuredConfig(mlp_sparsity=0.99), "0.99 of 48 channels is all"),
        (StructuredConfig(mlp_sparsity=0.5, head_sparsity=0.2), "0.2 of 2 kv_groups is none"),
    ],
)
def test_a_share_that_is_none_or_all_is_refused(narrowing, reason):
    with pytest.raises(DataError, match=reason):
        prune_structured(tiny_model(), WINDOWS, narrowing)


def test_blocks_of_different_width_are_refused():
    model = tiny_model()
    model.blocks[2].mlp = tiny_model(intermediate_size=40).blocks[2].mlp
    with pytest.raises(DataError, match="between 40 and 48 channels"):
        prune_structured(model, WINDOWS, QUARTER)


def test_an_mlp_that_is_more_than_its_matrices_is_refused():
    """What each channel does here depends on how many there are, which no name or shape gives away."""
    model = tiny_model()
    for block in model.blocks:
        block.mlp.act_fn = Sloping()
    with pytest.raises(DataError, match="computes something else"):
        prune_structured(model, WINDOWS, QUARTER)


class Sloping(nn.Module):
    def forward(self, gate):
        return gate * torch.linspace(0.5, 1.5, gate.shape[-1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_hook_is_left(family):
    model = model_of(family)
    before = hooks(model.network)
    prune_structured(model, WINDOWS, QUARTER)
    assert hooks(model.network) == before


def test_an_error_names_the_matrix_and_leaves_no_hook():
    model = tiny_model()
    model.blocks[2].mlp.up_proj.weight[5] = torch.inf
    before = hooks(model.network)
    with pytest.raises(NumericalError, match=r"^model\.layers\.2\.mlp\.down_proj: .*input 5"):
        prune_structured(model, WINDOWS, QUARTER)
    assert hooks(model.network) == before
