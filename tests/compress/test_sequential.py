import pytest
import torch
from tiny_models import FAMILIES, hooks, random_tokens, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from mopcompress.algorithms import METHODS
from mopcompress.compress.dense_pass import dense_activations
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import compress_model, linears_of
from mopcompress.errors import DataError, NumericalError
from mopcompress.models.targets import select_targets

TOKENS = random_tokens(6, 20)
OPTIONS = {
    "magnitude": {"sparsity": 0.4},
    "wanda": {"sparsity": 0.4},
    "sparsegpt": {"sparsity": 0.4, "block_size": 8},
    "alps": {"sparsity": 0.4},
    "gptq": {"bits": 3, "group_size": 8},
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compression(method="sparsegpt", **changes):
    return [MethodConfig(**{"method": method, "options": OPTIONS[method]} | changes)]


def linears(model):
    """All linears of the blocks by name, in the order in which they run (of these families)."""
    return {
        f"{model.blocks_prefix()}.{name}": linear
        for name, linear in model.blocks.named_modules()
        if isinstance(linear, nn.Linear | Conv1D)
    }


def weight_of(linear):
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


class InputReachedError(Exception):
    """Ends a forward."""


def input_of(model, linear):
    """What reaches a linear when the whole network, as it is now, reads all calibration tokens."""
    seen = []

    def stop(_module, inputs):
        seen.append(inputs[0])
        raise InputReachedError

    handle = linear.register_forward_pre_hook(stop)
    with pytest.raises(InputReachedError):
        model.network(input_ids=TOKENS)
    handle.remove()
    return seen[0].flatten(0, 1)


def compress_slowly(model, method):
    """Linear by linear, each alone, on inputs that are computed anew from the tokens."""
    with torch.no_grad():
        for linear in linears(model).values():
            inputs = input_of(model, linear)
            statistic = {
                "magnitude": None,
                "wanda": inputs.square().mean(0).sqrt(),
                "sparsegpt": inputs.T @ inputs / len(inputs),
                "alps": inputs.T @ inputs / len(inputs),
                "gptq": inputs.T @ inputs / len(inputs),
            }[method]
            solved = METHODS[method].solve(weight_of(linear).clone(), statistic, **OPTIONS[method])
            weight_of(linear).copy_(solved.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_pass_is_the_slow_definition(family, method):
    fast, slow = tiny_model(family), tiny_model(family)
    fast.network.double()
    slow.network.double()
    compress_model(fast, TOKENS, compression(method))
    compress_slowly(slow, method)
    for name, linear in linears(fast).items():
        expected = weight_of(linears(slow)[name])
        assert_close(weight_of(linear), expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(weight_of(linear) == 0, expected == 0)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_only_linears_of_blocks_change(family, method):
    model = tiny_model(family)
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    compress_model(model, TOKENS, compression(method))
    changed = {name for name, weight in model.network.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{name}.weight" for name in linears(model)}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact_and_counted_afterwards(family, method):
    model = tiny_model(family)
    rows = compress_model(model, TOKENS, compression(method))
    known = {name: one for index in range(len(model.blocks)) for one, name in linears_of(model, index).items()}
    assert sorted(row.name for row in rows) == sorted(known)
    for row in rows:
        linear = known[row.name]
        outs, ins = weight_of(linear).shape
        wanted = outs * round(0.4 * ins) if method == "wanda" else round(0.4 * outs * ins)
        assert row.zeros == wanted == int((linear.weight == 0).sum())
        assert (row.weights, row.blocks, row.escalations) == (outs * ins, 4, 0)
        assert f".{row.block}." in row.name


def test_a_pattern_holds_in_every_group():
    model = tiny_model()
    options = {"sparsity": 0.5, "pattern": (2, 4)}
    compress_model(model, TOKENS, compression(options=options))
    for linear in linears(model).values():
        assert bool(((linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all())


def test_quantised_weights_lie_on_a_grid():
    model = tiny_model()
    compress_model(model, TOKENS, compression("gptq"))
    for linear in linears(model).values():
        for group in linear.weight.unflatten(1, (-1, 8)).flatten(0, 1):
            assert len(group.unique()) <= 2**3


def test_sparsity_nothing_changes_nothing():
    model, untouched = tiny_model(), tiny_model()
    for method in ("magnitude", "wanda", "sparsegpt"):
        compress_model(model, TOKENS, compression(method, options={"sparsity": 0.0}))
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, untouched.network.state_dict()[name])


def test_progress_is_told_every_row_as_it_is_returned():
    told = []
    assert compress_model(tiny_model(), TOKENS, compression(), progress=told.append) == told
    assert len(told) == 28


# --- which linears


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], [], [f"{block}.{name}" for block in range(4) for name in LINEARS]),
        (["__ALL__"], [r"re:.*(mlp|[vo]_proj)"], [f"{b}.{n}" for b in range(4) for n in ("q_proj", "k_proj")]),
        ([r"re:.*\.q_proj$"], [], [f"{block}.q_proj" for block in range(4)]),
        ([r"re:.*q_proj\.weight$"], [], [f"{block}.q_proj" for block in range(4)]),
        (["model.layers.1.mlp.up_proj"], [], ["1.up_proj"]),
        (["model.layers.1.mlp.up_proj.weight"], [], ["1.up_proj"]),
        (["Linear"], ["re:.*(attn|up)", r"re:model\.layers\.[0-2]\."], ["3.gate_proj", "3.down_proj"]),
        (["Linear"], ["model.layers.3.mlp.up_proj", "re:.*[0-2]", "re:.*attn"], ["3.gate_proj", "3.down_proj"]),
        (["re:.*"], ["lm_head"], [f"{block}.{name}" for block in range(4) for name in LINEARS]),
        (
            ["model.layers.2", r"re:model\.layers\.0$"],
            ["model.layers.2.mlp"],
            [*(f"0.{name}" for name in LINEARS), *(f"2.{name}" for name in LINEARS[:4])],
        ),
        ([r"re:.*(?<!down_proj)$"], [r"re:.*layers\.[0-2]"], [f"3.{name}" for name in LINEARS[:-1]]),
    ],
)
def test_targets_and_ignore_choose_linears(targets, ignore, expected):
    model, untouched = tiny_model(), tiny_model()
    rows = compress_model(model, TOKENS, compression("magnitude", targets=targets, ignore=ignore))
    assert [f"{row.block}.{row.name.rsplit('.')[-1]}" for row in rows] == expected
    changed = {
        name
        for name, weight in model.network.state_dict().items()
        if not torch.equal(weight, untouched.network.state_dict()[name])
    }
    assert changed == {f"{row.name}.weight" for row in rows}


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"], ["re:q_proj"], ["Linear", "model.layers.9"], ["re:.*9$"]])
def test_a_target_that_means_no_linear_of_a_block_is_an_error_that_names_it(targets):
    with pytest.raises(DataError, match="no linear of the decoder blocks matches") as caught:
        compress_model(tiny_model(), TOKENS, compression(targets=targets))
    assert repr(targets[-1]) in str(caught.value)


def test_the_error_for_a_target_knows_the_nearest_name():
    with pytest.raises(DataError, match=r"'model.layer.0.mlp.up_proj'; did you mean model\.layers\.0\.mlp\.up_proj"):
        compress_model(tiny_model(), TOKENS, compression(targets=["model.layer.0.mlp.up_proj"]))


def test_when_all_is_ignored_nothing_is_left():
    with pytest.raises(DataError, match="no linear is left"):
        compress_model(tiny_model(), TOKENS, compression(ignore=["model.layers"]))


def test_a_linear_belongs_to_the_first_target_that_means_it():
    names = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    found = select_targets(names, ["re:.*up$", "layers.1", "Linear"], ["layers.0.up"])
    assert found == {"layers.0.down": 2, "layers.1.up": 0, "layers.1.down": 1}
    assert list(found) == names[1:]


# --- when it goes wrong


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_hook_is_left(family):
    model = tiny_model(family)
    before = hooks(model.network)
    compress_model(model, TOKENS, compression())
    assert hooks(model.network) == before


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gptq"])
def test_an_error_names_the_layer_and_leaves_no_hook(method):
    model = tiny_model()
    model.blocks[2].post_attention_layernorm.weight[5] = torch.inf
    before = hooks(model.network)
    with pytest.raises(NumericalError, match=r"^model\.layers\.2\.mlp\.gate_proj: .*input 5"):
        compress_model(model, TOKENS, compression(method))
    assert hooks(model.network) == before


def test_settings_that_do_not_fit_a_layer_name_it():
    pattern = compression(options={"sparsity": 0.6, "pattern": (3, 5)})
    with pytest.raises(DataError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*no multiple"):
        compress_model(tiny_model(), TOKENS, pattern)


class Routed(nn.Module):
    """Sends tokens to one of two linears by the sign of their first feature."""

    def __init__(self, size):
        super().__init__()
        self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(2))

    def forward(self, hidden):
        flat, result = hidden.flatten(0, -2), torch.empty_like(hidden).flatten(0, -2)
        for linear, taken in ((self.up, flat[:, 0] > 0), (self.down, flat[:, 0] <= 0)):
            if bool(taken.any()):
                result[taken] = linear(flat[taken])
        return result.view_as(hidden)


def test_a_linear_that_the_first_token_does_not_reach_is_compressed_all_the_same():
    model = tiny_model()
    model.blocks[1].mlp = Routed(32).requires_grad_(False)
    rows = compress_model(model, TOKENS, compression("wanda"))
    assert {row.name for row in rows} >= {"model.layers.1.mlp.up", "model.layers.1.mlp.down"}


def test_a_linear_that_no_token_reaches_is_an_error_that_names_it():
    model = tiny_model()
    model.blocks[1].mlp.spare = nn.Linear(32, 32)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.spare: no calibration token"):
        compress_model(model, TOKENS, compression())


# --- several compressions in one pass


@torch.no_grad()
def test_a_recipe_of_several_compressions_is_one_pass_of_each_linear_in_turn():
    steps = [*compression("sparsegpt", ignore=["re:.*o_proj"]), *compression("gptq", targets=["re:.*[qo]_proj"])]
    steps[1].options["keep_zeros"] = True
    fast, slow = tiny_model(), tiny_model()
    fast.network.double()
    slow.network.double()
    compress_model(fast, TOKENS, steps)
    for name, linear in linears(slow).items():
        inputs = input_of(slow, linear)
        for step in steps:
            if name in select_targets(list(linears(slow)), step.targets, step.ignore):
                gram = inputs.T @ inputs / len(inputs)
                linear.weight.copy_(METHODS[step.method].solve(linear.weight.clone(), gram, **step.options).weight)
    for name, linear in linears(fast).items():
        assert_close(linear.weight, linears(slow)[name].weight, rtol=1e-6, atol=1e-6)


def test_a_row_tells_what_was_done_and_counts_what_the_last_one_left():
    steps = [*compression("sparsegpt"), *compression("gptq", targets=["re:.*q_proj"])]
    steps[1].options["keep_zeros"] = True
    model = tiny_model()
    rows = compress_model(model, TOKENS, steps)
    assert len(rows) == 28
    for row in rows:
        assert row.methods == (["sparsegpt", "gptq"] if "q_proj" in row.name else ["sparsegpt"])
        assert row.zeros == int((linears(model)[row.name].weight == 0).sum()) >= round(0.4 * row.weights)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_linear_can_have_its_own_share(method):
    model = tiny_model()
    shares = {name: 0.1 + 0.02 * number for number, name in enumerate(linears(model))}
    for row in compress_model(model, TOKENS, compression(method, options={"sparsity": shares})):
        outs, ins = linears(model)[row.name].weight.shape
        share = shares[row.name]
        assert row.zeros == (outs * round(share * ins) if method == "wanda" else round(share * outs * ins))


def test_a_share_a_target():
    options = {"sparsity": (0.25, 0.5)}
    targets = ["re:.*mlp", "re:.*[qk]_proj"]
    for row in compress_model(tiny_model(), TOKENS, compression(options=options, targets=targets)):
        assert row.zeros == round((0.25 if "mlp" in row.name else 0.5) * row.weights)


def test_a_linear_without_a_share_is_named():
    shares = {name: 0.5 for name in linears(tiny_model()) if name != "model.layers.2.mlp.up_proj"}
    with pytest.raises(DataError, match=r"no sparsity is given for model\.layers\.2\.mlp\.up_proj"):
        compress_model(tiny_model(), TOKENS, compression(options={"sparsity": shares}))


# --- matching the dense model


@torch.no_grad()
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "gptq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_matched_linear_starts_from_the_least_squares_fit_of_dense_outputs(family, method):
    fast, slow, dense = (tiny_model(family) for _ in range(3))
    for model in (fast, slow, dense):
        model.network.double()
    compress_model(fast, TOKENS, compression(method, match_dense=0.7))
    for name, linear in linears(slow).items():
        weight, there, here = weight_of(linear), input_of(dense, linears(dense)[name]), input_of(slow, linear)
        # min over V of |W x_dense - V x|² + ridge |V - W|², as one least-squares problem with the ridge as more rows
        ridge = (0.1 * here.square().mean()) ** 0.5 * len(here) ** 0.5
        left = torch.cat([here, ridge * torch.eye(here.shape[1])])
        right = torch.cat([there @ weight.T, ridge * weight.T])
        best = torch.linalg.lstsq(left, right).solution.T
        target = weight + 0.7 * (best - weight)
        statistic = None if method == "magnitude" else here.T @ here / len(here)
        weight.copy_(METHODS[method].solve(target, statistic, **OPTIONS[method]).weight)
    for name, linear in linears(fast).items():
        expected = weight_of(linears(slow)[name])
        assert_close(weight_of(linear), expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("at_a_time", [1, 60, 1000])
def test_how_many_tokens_of_the_dense_model_run_at_a_time_does_not_matter(monkeypatch, at_a_time):
    whole, pieces = tiny_model("llama"), tiny_model("llama")
    for model in (whole, pieces):
        model.network.double()
    compress_model(whole, TOKENS, compression(match_dense=1.0))
    monkeypatch.setattr("mopcompress.compress.dense_pass._TOKENS", at_a_time)
    compress_model(pieces, TOKENS, compression(match_dense=1.0))
    for name, linear in linears(pieces).items():
        assert_close(linear.weight, linears(whole)[name].weight)


@torch.no_grad()
def test_outputs_are_noted_where_they_are_fewer():
    model = tiny_model("gpt2")  # its linears have biases
    up, down = model.blocks[0].mlp.c_fc, model.blocks[0].mlp.c_proj
    down.bias.normal_()
    _, sides = dense_activations(model, TOKENS, None, 0, [[up], [down]])
    inputs = input_of(model, down)
    assert not sides[up].are_outputs
    assert_close(sides[up].values, input_of(model, up))
    assert sides[down].are_outputs
    assert_close(sides[down].values, inputs @ down.weight, atol=1e-5, rtol=1e-5)


def test_before_anything_is_compressed_matching_changes_nothing():
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    models = [tiny_model(), tiny_model()]
    for model, share in zip(models, (0.0, 1.0), strict=True):
        compress_model(model, TOKENS, compression(targets=first, match_dense=share))
    for name in first:
        assert torch.equal(linears(models[0])[name].weight, linears(models[1])[name].weight)


@torch.no_grad()
def test_matching_brings_the_compressed_model_closer_to_the_dense_one():
    dense, tokens = tiny_model(), random_tokens(64, 20)
    wanted = dense.network(input_ids=tokens).logits
    errors = []
    for share in (0.0, 1.0):
        model = tiny_model()
        compress_model(model, tokens, compression(match_dense=share))
        errors.append(float((model.network(input_ids=tokens).logits - wanted).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_refit_keeps_the_mask_and_brings_the_outputs_closer(method):
    model, plain, refitted = (tiny_model("llama") for _ in range(3))
    name = "model.layers.0.self_attn.q_proj"
    rows = [
        compress_model(one, TOKENS, compression(method, targets=[name], refit_steps=steps))
        for one, steps in ((plain, 0), (refitted, 20))
    ]
    assert rows[0][0].zeros == rows[1][0].zeros
    dense, before, after = (linears(one)[name].weight for one in (model, plain, refitted))
    assert torch.equal(before == 0, after == 0)
    inputs = input_of(model, linears(model)[name]).flatten(0, -2)
    assert (inputs @ (dense - after).T).norm() < 0.95 * (inputs @ (dense - before).T).norm()


@pytest.mark.parametrize("match_samples", [0.01, 0.5])
def test_the_dense_model_sees_as_many_samples_as_it_is_asked_to(monkeypatch, match_samples):
    """What matching all samples of a shorter calibration gives, but for the Gram matrices and what enters."""
    seen = []

    def noted(model, tokens, hidden, index, groups):
        seen.append((len(tokens), None if hidden is None else len(hidden)))
        return dense_activations(model, tokens, hidden, index, groups)

    monkeypatch.setattr("mopcompress.compress.sequential.dense_sides", noted)
    models = [tiny_model() for _ in range(3)]
    tokens = random_tokens(5, 20)
    for model, share, part in zip(models, (0.0, 1.0, 1.0), (1.0, 1.0, match_samples), strict=True):
        compress_model(model, tokens, compression(match_dense=share, match_samples=part))
    some = 1 if match_samples == 0.01 else 3
    assert seen == [(5, None), *[(5, 5)] * 3, (some, None), *[(some, some)] * 3]
    own, whole, part = (linears(model)["model.layers.2.mlp.down_proj"].weight for model in models)
    assert not torch.equal(part, whole)
    assert not torch.equal(part, own)


@pytest.mark.parametrize("match_samples", [0.01, 1.0])
@pytest.mark.parametrize("at_a_time", [1, 1000])
def test_what_only_some_tokens_reach_keeps_its_own_outputs(monkeypatch, at_a_time, match_samples):
    monkeypatch.setattr("mopcompress.compress.dense_pass._TOKENS", at_a_time)
    routed = [tiny_model(), tiny_model()]
    for model, share in zip(routed, (0.0, 1.0), strict=True):
        torch.manual_seed(0)
        model.blocks[3].mlp = Routed(32).requires_grad_(False)
        names = ["model.layers.3.mlp.up", "model.layers.3.mlp.down"]
        compress_model(model, TOKENS, compression(targets=names, match_dense=share, match_samples=match_samples))
    for name in names:
        assert torch.equal(linears(routed[0])[name].weight, linears(routed[1])[name].weight)
