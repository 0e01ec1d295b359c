"""Low-rank paths begin along the loss's gradient."""

import math

import pytest
import torch
from tiny import random_documents
from torch import nn
from torch.testing import assert_close

from mopcompress.errors import NumericalError
from mopcompress.recover import gated_paths
from mopcompress.recover.adapter import AdapterConfig
from mopcompress.recover.alignment import Path, align
from mopcompress.recover.start import Material, Start
from mopcompress.recover.train import losses_of
from mopcompress.states import CachedStates

ROWS, COLUMNS = 6, 9


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Problem:
    """Batches of a regression by W + B A, in float64."""

    def __init__(self, rank, *, batches=3):
        generator = seeded(1)
        self.weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        self.batches = [
            (
                torch.randn(5, COLUMNS, generator=generator, dtype=torch.float64),
                torch.randn(5, ROWS, generator=generator, dtype=torch.float64),
            )
            for _ in range(batches)
        ]
        down = torch.randn(rank, COLUMNS, generator=generator, dtype=torch.float64)
        self.path = Path(nn.Parameter(down), nn.Parameter(torch.ones(ROWS, rank, dtype=torch.float64)))

    def losses(self):
        for inputs, outputs in self.batches:
            given = inputs @ (self.weight + self.path.up @ self.path.down).T
            yield nn.functional.mse_loss(given, outputs)

    def gradient(self):
        """Of W, as the equations have it: d mean((x Wᵀ - y)²) / dW, summed over batches."""
        return sum(
            2 * (inputs @ self.weight.T - outputs).T @ inputs / outputs.numel() for inputs, outputs in self.batches
        )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_it_is_one_round_of_subspace_iteration_with_the_gradient_of_the_weight(rank):
    problem = Problem(rank)
    gradient, drawn = problem.gradient(), problem.path.down.detach().clone()
    align([problem.path], problem.losses)
    left, _ = torch.linalg.qr(gradient @ drawn.T)
    right, _ = torch.linalg.qr(gradient.T @ left)
    assert_close(problem.path.down.detach(), right.T)
    assert torch.equal(problem.path.up, torch.zeros_like(problem.path.up))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_directions_are_orthonormal(rank):
    problem = Problem(rank)
    align([problem.path], problem.losses)
    assert_close(problem.path.down @ problem.path.down.T, torch.eye(rank, dtype=torch.float64))


def test_of_a_gradient_of_that_rank_the_whole_is_found():
    """One batch of two rows has a gradient of rank 2, whatever the random start."""
    problem = Problem(2, batches=1)
    problem.batches = [(inputs[:2], outputs[:2]) for inputs, outputs in problem.batches]
    gradient = problem.gradient()
    align([problem.path], problem.losses)
    down = problem.path.down.detach()
    assert_close(gradient @ down.T @ down, gradient)


def test_a_path_that_no_batch_reaches_keeps_its_directions():
    problem = Problem(1)
    idle = Path(nn.Parameter(torch.randn(1, 4, generator=seeded())), nn.Parameter(torch.ones(3, 1)))
    before = idle.down.detach().clone()
    align([problem.path, idle], problem.losses)
    assert torch.equal(idle.down, before)
    assert torch.equal(idle.up, torch.zeros(3, 1))


def test_a_gradient_that_is_not_finite_is_an_error():
    problem = Problem(1)
    with pytest.raises(NumericalError, match="no finite gradient"):
        align([problem.path], lambda: (math.nan * loss for loss in problem.losses()))


def test_the_paths_of_an_adapter_begin_where_their_first_gradient_is_large(tiny_llama):
    tasks = ("add", "sort", "tell")
    states = CachedStates(tiny_llama, random_documents(6, tasks=tasks), 2, batch_size=4)
    config = AdapterConfig(
        arm="mop+",
        experts=3,
        prompts_per_expert=2,
        layer=2,
        hidden_size=tiny_llama.hidden_size,
        base_sha256="",
        tasks=tasks,
    )
    start = Start(gate_pretraining_steps=2, gate_temper=1.0, log_opening=0.0, seed=0)
    adapter = gated_paths.begin(config, Material(tiny_llama, states, tasks), start)
    paths = list(adapter.paths.values())

    def first_gradient():
        loss = losses_of(adapter, tiny_llama, states, range(6))[0]
        gradients = torch.autograd.grad(loss, [path.up for path in paths])
        return torch.stack([gradient.norm() for gradient in gradients])

    aligned = first_gradient()
    with torch.no_grad():
        for path in paths:
            drawn = torch.randn(path.down.shape, generator=seeded(5))
            path.down.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    assert bool((aligned > first_gradient()).all())
