"""Mixture of experts: stacked weights are compressed expert by expert, and an idle expert is unchanged."""

import pytest
import torch
from compression_cases import CALIBRATION_TOKENS, METHOD_OPTIONS, method_configs
from tiny_models import hooks, tiny_model
from torch import nn
from torch.testing import assert_close

from mopcompress.compress.sequential import compress_model, linears_of
from mopcompress.errors import DataError
from mopcompress.models.experts import expert_by_expert, unstack_experts


def stacks(model, index=0):
    [(name, (module, experts))] = unstack_experts(model.blocks[index]).items()
    return name, module, experts


@torch.no_grad()
def test_expert_by_expert_computes_the_same():
    model = tiny_model("mixtral")
    before = model.network(input_ids=CALIBRATION_TOKENS).logits
    called = []
    for block in model.blocks:
        stacked = unstack_experts(block)
        [(_, experts)] = stacked.values()
        experts[0].down_proj.register_forward_hook(lambda *_: called.append(1))
        with expert_by_expert(stacked):
            assert_close(model.network(input_ids=CALIBRATION_TOKENS).logits, before)
    assert len(called) == len(model.blocks)
    assert "forward" not in vars(stacks(model)[1])


def test_a_linear_of_an_expert_is_a_view_of_the_stack():
    _, module, experts = stacks(tiny_model("mixtral"))
    inner = module.gate_up_proj.shape[1] // 2
    with torch.no_grad():
        experts[1].up_proj.weight.fill_(7.0)
    assert bool((module.gate_up_proj[1, inner:] == 7).all())
    assert not bool((module.gate_up_proj[1, :inner] == 7).any())
    assert not bool((module.gate_up_proj[0] == 7).any())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_every_expert_has_its_exact_sparsity(method):
    model = tiny_model("mixtral")
    rows = {row.name: row for row in compress_model(model, CALIBRATION_TOKENS, method_configs(method))}
    assert not hooks(model.network)
    for index in range(len(model.blocks)):
        for linear, name in linears_of(model, index).items():
            zeros = int((linear.weight == 0).sum())
            assert rows[name].zeros == zeros, name
            if rows[name].methods and method != "wanda":  # wanda rounds in every row
                assert zeros == round(METHOD_OPTIONS[method]["sparsity"] * linear.weight.numel())


@torch.no_grad()
def test_an_expert_is_calibrated_on_its_own_tokens():
    ours = tiny_model("mixtral")
    name, module, experts = stacks(ours)
    inputs_of_expert = []
    experts[2].gate_proj.register_forward_pre_hook(lambda _linear, inputs: inputs_of_expert.append(inputs[0]))
    with expert_by_expert(unstack_experts(ours.blocks[0]) | {name: (module, experts)}):
        ours.run_block(CALIBRATION_TOKENS, None, 0)
    dense = tiny_model("mixtral")
    only = f"model.layers.0.{name}.2.gate_proj"
    compress_model(dense, CALIBRATION_TOKENS, method_configs("wanda", targets=[only]))
    [(_, (_, after))] = unstack_experts(dense.blocks[0]).items()
    weight, norms = experts[2].gate_proj.weight, inputs_of_expert[0].square().mean(0).sqrt()
    lowest = (weight.abs() * norms).argsort(dim=1, stable=True)[:, : round(0.4 * weight.shape[1])]
    assert torch.equal(after[2].gate_proj.weight, weight.scatter(1, lowest, 0.0))
    assert torch.equal(after[1].gate_proj.weight, experts[1].gate_proj.weight)


def test_an_idle_expert_is_reported_and_unchanged():
    model = tiny_model("mixtral")
    name, module, _ = stacks(model)
    router = model.blocks[0].get_submodule(name.rpartition(".")[0]).gate
    with torch.no_grad():
        router.weight[1:] = router.weight[0]  # equal scores: the first experts are taken
    before = module.gate_up_proj[-1].clone(), module.down_proj[-1].clone()
    rows = compress_model(model, CALIBRATION_TOKENS, method_configs("sparsegpt"))
    idle = [row for row in rows if row.block == 0 and not row.methods]
    last = len(module.down_proj) - 1
    assert {row.name for row in idle} >= {
        f"model.layers.0.{name}.{last}.{part}" for part in ("gate_proj", "up_proj", "down_proj")
    }
    assert all(row.zeros == 0 for row in idle)
    assert torch.equal(module.gate_up_proj[-1], before[0])
    assert torch.equal(module.down_proj[-1], before[1])


class Stacks(nn.Module):
    """Stacked experts of another layout: some stacks are missing, or they are transposed."""

    def __init__(self, *names, **layout):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(2, 4, 4)))
        self.__dict__.update(layout)


MIXTRAL = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


@pytest.mark.parametrize(
    "module",
    [
        Stacks("gate_up_proj"),
        Stacks("gate_up_proj", "down_proj"),
        Stacks("gate_up_proj", "down_proj", **MIXTRAL | {"is_transposed": True}),
        Stacks("gate_up_proj", "down_proj", "up_proj", **MIXTRAL),
    ],
)
def test_another_layout_of_stacks_is_a_data_error(module):
    with pytest.raises(DataError, match="layout that is not known here"):
        unstack_experts(nn.Sequential(module))


def test_stacks_of_the_layout_of_mixtral_are_taken_apart():
    [(_, experts)] = unstack_experts(nn.Sequential(Stacks("gate_up_proj", "down_proj", **MIXTRAL))).values()
    assert len(experts) == 2
