import pytest
import torch
from compression_cases import (
    CALIBRATION_TOKENS,
    TIGHT,
    gram_of,
    linear_inputs,
    linears,
    method_configs,
    random_layer,
    repair_config,
)
from reference import damped, masked_least_squares
from tiny_models import hooks, tiny_model
from torch.testing import assert_close

from mopcompress.algorithms import METHODS
from mopcompress.algorithms.dense_targets import DenseActivations
from mopcompress.compress.plan import MethodConfig, PlannedMethod, apply_methods
from mopcompress.compress.sequential import compress_model
from mopcompress.errors import DataError
from mopcompress.models.targets import select_targets

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
def test_targets_and_ignore_select_linears(targets, ignore, expected):
    model, untouched = tiny_model(), tiny_model()
    rows = compress_model(model, CALIBRATION_TOKENS, method_configs("magnitude", targets=targets, ignore=ignore))
    assert [f"{row.block}.{row.name.rsplit('.')[-1]}" for row in rows] == expected
    changed = {
        name
        for name, weight in model.network.state_dict().items()
        if not torch.equal(weight, untouched.network.state_dict()[name])
    }
    assert changed == {f"{row.name}.weight" for row in rows}


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"], ["re:q_proj"], ["Linear", "model.layers.9"], ["re:.*9$"]])
def test_an_error_names_a_target_without_linears(targets):
    with pytest.raises(DataError, match="no linear of the decoder blocks matches") as caught:
        compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(targets=targets))
    assert repr(targets[-1]) in str(caught.value)


def test_an_error_about_a_target_names_the_nearest_linear():
    with pytest.raises(DataError, match=r"'model.layer.0.mlp.up_proj'; did you mean model\.layers\.0\.mlp\.up_proj"):
        compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(targets=["model.layer.0.mlp.up_proj"]))


def test_ignoring_all_linears_raises():
    with pytest.raises(DataError, match="no linear is left"):
        compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(ignore=["model.layers"]))


def test_a_linear_belongs_to_the_first_matching_target():
    names = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    target_index = select_targets(names, ["re:.*up$", "layers.1", "Linear"], ["layers.0.up"])
    assert target_index == {"layers.0.down": 2, "layers.1.up": 0, "layers.1.down": 1}
    assert list(target_index) == names[1:]


@torch.no_grad()
def test_several_methods_are_one_pass_of_each_linear():
    configs = [
        *method_configs("sparsegpt", ignore=["re:.*o_proj"]),
        *method_configs("gptq", targets=["re:.*[qo]_proj"]),
    ]
    configs[1].options["keep_zeros"] = True
    fast, slow = tiny_model(), tiny_model()
    fast.network.double()
    slow.network.double()
    compress_model(fast, CALIBRATION_TOKENS, configs)
    for name, linear in linears(slow).items():
        inputs = linear_inputs(slow, linear)
        for config in configs:
            if name in select_targets(list(linears(slow)), config.targets, config.ignore):
                gram = inputs.T @ inputs / len(inputs)
                linear.weight.copy_(METHODS[config.method].solve(linear.weight.clone(), gram, **config.options).weight)
    for name, linear in linears(fast).items():
        assert_close(linear.weight, linears(slow)[name].weight, rtol=1e-6, atol=1e-6)


def test_a_row_has_all_methods_and_the_final_count():
    configs = [*method_configs("sparsegpt"), *method_configs("gptq", targets=["re:.*q_proj"])]
    configs[1].options["keep_zeros"] = True
    model = tiny_model()
    rows = compress_model(model, CALIBRATION_TOKENS, configs)
    assert len(rows) == 28
    for row in rows:
        assert row.methods == (["sparsegpt", "gptq"] if "q_proj" in row.name else ["sparsegpt"])
        assert row.zeros == int((linears(model)[row.name].weight == 0).sum()) >= round(0.4 * row.weights)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_linear_can_have_its_own_sparsity(method):
    model = tiny_model()
    sparsities = {name: 0.1 + 0.02 * number for number, name in enumerate(linears(model))}
    for row in compress_model(model, CALIBRATION_TOKENS, method_configs(method, options={"sparsity": sparsities})):
        outs, ins = linears(model)[row.name].weight.shape
        sparsity = sparsities[row.name]
        assert row.zeros == (outs * round(sparsity * ins) if method == "wanda" else round(sparsity * outs * ins))


def test_every_target_can_have_its_own_sparsity():
    options = {"sparsity": (0.25, 0.5)}
    targets = ["re:.*mlp", "re:.*[qk]_proj"]
    for row in compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(options=options, targets=targets)):
        assert row.zeros == round((0.25 if "mlp" in row.name else 0.5) * row.weights)


def test_an_error_names_a_linear_without_a_sparsity():
    sparsities = {name: 0.5 for name in linears(tiny_model()) if name != "model.layers.2.mlp.up_proj"}
    with pytest.raises(DataError, match=r"no sparsity is given for model\.layers\.2\.mlp\.up_proj"):
        compress_model(tiny_model(), CALIBRATION_TOKENS, method_configs(options={"sparsity": sparsities}))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_refit_keeps_the_mask_and_lowers_the_error(method):
    model, plain, refitted = (tiny_model("llama") for _ in range(3))
    name = "model.layers.0.self_attn.q_proj"
    rows = [
        compress_model(network, CALIBRATION_TOKENS, method_configs(method, targets=[name], refit_steps=steps))
        for network, steps in ((plain, 0), (refitted, 20))
    ]
    assert rows[0][0].zeros == rows[1][0].zeros
    weights = [linears(network)[name].weight for network in (model, plain, refitted)]
    dense, pruned, fitted = weights
    assert torch.equal(pruned == 0, fitted == 0)
    inputs = linear_inputs(model, linears(model)[name]).flatten(0, -2)
    assert (inputs @ (dense - fitted).T).norm() < 0.95 * (inputs @ (dense - pruned).T).norm()


# --- linears that share their inputs


def planned(**settings):
    return PlannedMethod(MethodConfig(method="sparsegpt", **settings), {"layer": 0})


def test_the_escalations_of_all_methods_add_up():
    inputs = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))  # too few tokens for no damping
    method = planned(options={"sparsity": 0.5, "damping": 0.0})
    assert apply_methods({"layer": torch.ones(3, 40)}, inputs, None, [method, method])["layer"].escalations == 2


def test_a_refit_has_the_damping_of_its_method():
    weight, inputs = random_layer()
    method = planned(options={"sparsity": 0.5, "damping": 1.0}, refit_steps=100)
    refitted = apply_methods({"layer": weight}, inputs, None, [method])["layer"].weight
    assert_close(refitted, masked_least_squares(weight, damped(gram_of(inputs), 1.0), refitted == 0), **TIGHT)


def test_the_dense_target_preserves_zeros_for_a_method_that_does():
    weight, inputs = random_layer()
    weight[:, ::2] = 0
    dense = DenseActivations(inputs * 2, are_outputs=False)
    for keep_zeros in (True, False):
        method = planned(options={"sparsity": 0.0, "keep_zeros": keep_zeros}, match_dense=1.0)
        matched = apply_methods({"layer": weight}, inputs + inputs.roll(1, 0), dense, [method])["layer"].weight
        assert not torch.equal(matched, weight)
        assert bool((matched[weight == 0] == 0).all()) == keep_zeros


# --- repairs


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_repair_lowers_the_error_beside_compressed_weights(family):
    dense, plain, repaired = (tiny_model(family) for _ in range(3))
    compress_model(plain, CALIBRATION_TOKENS, method_configs())
    rows = compress_model(repaired, CALIBRATION_TOKENS, [*method_configs(), repair_config()])
    expected = dense.network(input_ids=CALIBRATION_TOKENS).logits
    error, repaired_error = (
        float((model.network(input_ids=CALIBRATION_TOKENS).logits - expected).square().mean())
        for model in (plain, repaired)
    )
    assert repaired_error < 0.75 * error
    assert all(list(row.methods) == ["sparsegpt", "eora"] for row in rows)
    assert sum(row.zeros for row in rows) == sum(round(0.4 * row.weights) for row in rows)
    assert repaired.network.state_dict().keys() == plain.network.state_dict().keys()


@pytest.mark.parametrize("match_dense", [0.0, 1.0])
def test_later_linears_are_calibrated_with_the_repair(match_dense):
    """Check the last linear of a block with its inputs in the finished model."""
    model, dense = tiny_model(), tiny_model()
    compress_model(model, CALIBRATION_TOKENS, [*method_configs("magnitude", match_dense=match_dense), repair_config(2)])
    name = "model.layers.3.mlp.down_proj"
    linear, dense_weight = linears(model)[name], linears(dense)[name].weight
    inputs = linear_inputs(model, linear)
    outputs = inputs @ dense_weight.T
    if match_dense:  # the dense model's outputs, with a ridge towards the linear's own
        dense_inputs = linear_inputs(dense, linears(dense)[name])
        gram = inputs.T @ inputs / len(inputs)
        ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
        cross = dense_inputs.T @ inputs / len(inputs)
        target = dense_weight + dense_weight @ (cross - gram) @ torch.linalg.inv(gram + ridge)
        outputs = inputs @ target.T
    lost = outputs - inputs @ linear.weight.T
    sizes = torch.linalg.svdvals(lost.double())
    remaining = lost - linear.repair(inputs)
    assert float(remaining.square().sum()) == pytest.approx(float(sizes[2:].square().sum()), rel=1e-3)


def test_a_repair_compensates_pruning_and_rounding_together():
    model, dense = tiny_model(), tiny_model()
    configs = [*method_configs("magnitude"), *method_configs("gptq"), repair_config(32, targets=["re:.*q_proj"])]
    compress_model(model, CALIBRATION_TOKENS, configs)
    repaired, original = (linears(network)["model.layers.0.self_attn.q_proj"] for network in (model, dense))
    assert not torch.equal(repaired.weight, original.weight)
    assert_close(repaired.weight + repaired.repair.up @ repaired.repair.down, original.weight)
    assert [name for name, linear in linears(model).items() if "repair" in linear._modules] == [
        f"model.layers.{index}.self_attn.q_proj" for index in range(4)
    ]


def test_a_repair_is_last_and_of_compressed_linears():
    model = tiny_model()
    rows = compress_model(model, CALIBRATION_TOKENS, [*method_configs(targets=["re:.*mlp"]), repair_config()])
    assert {row.name.split(".")[3] for row in rows} == {"mlp"}
    assert hooks(model.network) == len(rows)
    with pytest.raises(DataError, match="nothing to repair"):
        compress_model(
            tiny_model(),
            CALIBRATION_TOKENS,
            [*method_configs(targets=["re:.*mlp"]), repair_config(targets=["re:.*q_proj"])],
        )
    with pytest.raises(DataError, match="put it after all that compresses"):
        compress_model(tiny_model(), CALIBRATION_TOKENS, [repair_config(), *method_configs()])


def test_an_expert_that_no_token_reaches_has_no_repair():
    model = tiny_model("mixtral")
    rows = compress_model(model, CALIBRATION_TOKENS[:1, :2], [*method_configs("magnitude"), repair_config(1)])
    unreached = [row for row in rows if not row.methods]
    assert unreached
    assert all((row.repair_rank, row.repair_parameters) == (0, 0) for row in unreached)
    assert all(row.repair_rank == 1 for row in rows if row.methods)
