import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import nn

from mopcompress.models.packed_linears import SparseLinear, use_sparse_linears


def linear_of(sparsity, *, bias, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(48, 20, bias=bias)
        linear.weight.data *= torch.rand(20, 48) >= sparsity
    return linear.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 0), (2, 1, 3)])
def test_a_sparse_linear_is_the_linear(sparsity, bias, batch):
    linear = linear_of(sparsity, bias=bias)
    inputs = torch.randn(*batch, 48, generator=torch.Generator().manual_seed(1))
    outputs = SparseLinear(linear)(inputs)
    assert outputs.shape == (*batch, 20)
    torch.testing.assert_close(outputs, linear(inputs))


def test_only_linears_with_enough_zeros_are_replaced():
    model = tiny_model()
    for name, linear in model.network.named_modules():
        if name.endswith("up_proj"):
            linear.weight.data[:, ::2] = 0.0  # half
        if name.endswith("down_proj"):
            linear.weight.data[1:] = 0.0
    expected = model.network(input_ids=random_tokens(2, 9)).logits
    assert use_sparse_linears(model.network, sparsity=0.5) == 8
    kinds = {name: type(module) for name, module in model.network.named_modules() if name.endswith("_proj")}
    assert {name.rpartition(".")[2] for name, kind in kinds.items() if kind is SparseLinear} == {"up_proj", "down_proj"}
    torch.testing.assert_close(model.network(input_ids=random_tokens(2, 9)).logits, expected)
    assert use_sparse_linears(model.network, sparsity=0.5) == 0


def test_a_threshold_above_every_sparsity_replaces_nothing():
    assert use_sparse_linears(tiny_model().network, sparsity=1.0) == 0
