import pytest
import torch
from tiny_models import hooks

from mopcompress.models.modules import forward_hooks


def test_hooks_see_inputs_and_outputs():
    linear, values = torch.nn.Linear(3, 2), torch.randn(5, 3)
    seen = []
    with (
        forward_hooks([linear], lambda module, inputs: seen.append((module, inputs[0])), pre=True),
        forward_hooks([linear], lambda module, inputs, output: seen.append((module, output))),
    ):
        result = linear(values)
    linear(values)
    assert [module for module, _ in seen] == [linear, linear]
    assert seen[0][1] is values
    assert seen[1][1] is result


def test_keyword_arguments_follow_the_inputs():
    linear, values = torch.nn.Linear(3, 2), torch.randn(5, 3)
    seen = []
    with forward_hooks(
        [linear], lambda _module, inputs, given: seen.append((inputs, given)), pre=True, with_kwargs=True
    ):
        linear(input=values)
    assert seen == [((), {"input": values})]


def test_hooks_go_when_the_block_fails():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))

    def fail():
        with forward_hooks(network, lambda *_call: None):
            assert hooks(network) == 2
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert hooks(network) == 0
