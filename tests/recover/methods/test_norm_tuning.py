"""Norm tuning: the norms that it trains."""

import pytest
import torch
from factories import adapter_config
from tiny_models import HIDDEN, tiny_model

from mopcompress.recover.adapter import trained_parameters
from mopcompress.recover.methods import norm_tuning


def count_trained(model):
    return trained_parameters(norm_tuning.build(model, adapter_config("norms", model, layer=2)))


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("llama", 2 * 2 * 32 + 32),
        ("qwen3", 2 * (2 * 32 + 2 * 8) + 32),  # queries and keys have norms too
        ("gpt2", 2 * 2 * 64 + 64),  # weights and biases
        ("bloom", 2 * 2 * 64 + 64),  # not the norm of its embeddings
        ("opt", 2 * 2 * 64 + 64),
    ],
)
def test_norms_from_the_layer_up_and_the_last_are_trained(family, count):
    assert count_trained(tiny_model(family)) == count


def test_norms_outside_of_the_decoder_are_not_trained():
    """Such as those of a tower for images."""
    model = tiny_model()
    count = count_trained(model)
    model.network.tower = torch.nn.LayerNorm(HIDDEN)
    assert count_trained(model) == count
