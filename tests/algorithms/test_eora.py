"""The low-rank repair against its definition, in float64, and in the one pass that compresses."""

import pytest
import torch
from compress.test_sequential import TOKENS, compression, input_of, linears
from tiny_models import hooks, tiny_model
from torch.testing import assert_close

from mopcompress.algorithms.eora import eora
from mopcompress.compress.plan import MethodConfig
from mopcompress.compress.sequential import compress_model
from mopcompress.errors import DataError, NumericalError

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(rows, columns, *, directions=None, seed=0):
    """A weight, its pruned form, and a Gram matrix of inputs that lie in so many directions (None: in all)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(rows, columns)
    span = normal(directions or columns, columns) * torch.logspace(0, -1.5, columns, dtype=torch.float64)
    inputs = normal(200, len(span)) @ span
    return weight, weight * (weight.abs() > 0.7), inputs.T @ inputs / 200


def error_of(missing, gram):
    return float(torch.trace(missing @ gram @ missing.T))


def by_definition(weight, compressed, gram, rank):
    """The paper's equation, with the symmetric root of the Gram matrix; the product B A."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(1e-12 * values.max())  # where it is singular, the paper divides by zero
    root = vectors @ values.sqrt().diag() @ vectors.T
    inverse = vectors @ values.rsqrt().diag() @ vectors.T
    left, sizes, right = torch.linalg.svd((weight - compressed) @ root, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank] @ inverse


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_product_is_that_of_the_definition(shape, rank):
    weight, compressed, gram = problem(*shape)
    up, down = eora(weight, compressed, gram, rank=rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert_close(up @ down, by_definition(weight, compressed, gram, rank), rtol=1e-8, atol=1e-8)


def test_one_direction_of_huge_inputs_does_not_drown_the_others():
    """As attention sinks have them: the repair of float32 matrices is as good as that of float64 ones."""
    weight, compressed, gram = problem(24, 40)
    direction = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sink = gram + 1e7 * torch.outer(direction, direction)
    left = {}
    for dtype in (torch.float32, torch.float64):
        up, down = eora(weight.to(dtype), compressed.to(dtype), sink.to(dtype), rank=6)
        assert up.dtype == down.dtype == dtype
        left[dtype] = error_of(weight - compressed - (up @ down).double(), gram)
    assert left[torch.float32] < 1.05 * left[torch.float64]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [None, 5])
def test_no_other_matrix_of_its_rank_does_better(shape, directions):
    weight, compressed, gram = problem(*shape, directions=directions)
    up, down = eora(weight, compressed, gram, rank=3)
    least = error_of(weight - compressed - up @ down, gram)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other_up = up + size * torch.randn(up.shape, generator=generator, dtype=torch.float64)
            other_down = down + size * torch.randn(down.shape, generator=generator, dtype=torch.float64)
            assert error_of(weight - compressed - other_up @ other_down, gram) >= least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [None, 5])
def test_the_error_left_is_the_energy_of_the_other_directions(shape, directions):
    weight, compressed, gram = problem(*shape, directions=directions)
    values, vectors = torch.linalg.eigh(gram)
    sizes = torch.linalg.svdvals((weight - compressed) @ vectors @ values.clamp_min(0).sqrt().diag())
    for rank in (0, 2, 7):
        up, down = eora(weight, compressed, gram, rank=rank)
        left = error_of(weight - compressed - up @ down, gram)
        assert left == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_full_rank_gives_the_weight_back(shape, dtype):
    weight, compressed, gram = (one.to(dtype) for one in problem(*shape))
    up, down = eora(weight, compressed, gram, rank=min(shape))
    assert_close(compressed + up @ down, weight, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_nothing_is_missing_nothing_is_added(shape):
    weight, compressed, gram = problem(*shape)
    up, down = eora(weight, weight, gram, rank=3)
    assert not up.any()
    assert not down.any()
    assert not (torch.matmul(*eora(weight, compressed, gram, rank=0))).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [1, 5])
def test_inputs_without_energy_make_no_numbers_that_are_not_finite(shape, directions):
    weight, compressed, gram = problem(*shape, directions=directions)
    gram[:, 2] = gram[2] = 0  # an input that never fires
    for rank in (directions, min(shape)):
        up, down = eora(weight, compressed, gram, rank=rank)
        assert bool(up.isfinite().all() and down.isfinite().all())
        before = error_of(weight - compressed, gram)
        assert (
            abs(error_of(weight - compressed - up @ down, gram)) < 1e-9 * before
        )  # what was seen has so few directions


def test_a_model_that_saw_nothing_is_no_error():
    weight, compressed, gram = problem(12, 20)
    up, down = eora(weight, compressed, torch.zeros_like(gram), rank=3)
    assert bool(up.isfinite().all() and down.isfinite().all())


def test_both_factors_are_of_one_size():
    up, down = eora(*problem(12, 20), rank=4)
    assert_close(up.norm(dim=0), down.norm(dim=1))


def test_what_cannot_be_a_gram_matrix_or_a_rank_is_an_error():
    weight, compressed, gram = problem(12, 20)
    with pytest.raises(NumericalError, match="not finite"):
        eora(weight, compressed, gram * torch.nan, rank=2)
    with pytest.raises(ValueError, match="rank 13 of a matrix of 12 x 20"):
        eora(weight, compressed, gram, rank=13)


# --- in the one pass


def repair(rank=4, **changes):
    return MethodConfig(**{"method": "eora", "options": {"rank": rank}} | changes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_repaired_model_is_closer_to_the_dense_one_and_its_weights_stay_compressed(family):
    dense, plain, repaired = (tiny_model(family) for _ in range(3))
    compress_model(plain, TOKENS, compression())
    rows = compress_model(repaired, TOKENS, [*compression(), repair()])
    wanted = dense.network(input_ids=TOKENS).logits
    far, near = (float((one.network(input_ids=TOKENS).logits - wanted).square().mean()) for one in (plain, repaired))
    assert near < 0.75 * far
    assert all(list(row.methods) == ["sparsegpt", "eora"] for row in rows)
    assert sum(row.zeros for row in rows) == sum(round(0.4 * row.weights) for row in rows)
    assert repaired.network.state_dict().keys() == plain.network.state_dict().keys()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_later_linears_are_calibrated_with_the_repair(share):
    """The last linear of a block, from what reaches it in the finished model."""
    model, dense = tiny_model(), tiny_model()
    compress_model(model, TOKENS, [*compression("magnitude", match_dense=share), repair(2)])
    name = "model.layers.3.mlp.down_proj"
    linear, before = linears(model)[name], linears(dense)[name].weight
    inputs = input_of(model, linear)
    wanted = inputs @ before.T
    if share:  # towards the dense model's outputs, with the ridge that keeps near the linear's own
        there = input_of(dense, linears(dense)[name])
        gram = inputs.T @ inputs / len(inputs)
        ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
        cross = there.T @ inputs / len(inputs)
        target = before + before @ (cross - gram) @ torch.linalg.inv(gram + ridge)
        wanted = inputs @ target.T
    lost = wanted - inputs @ linear.weight.T
    sizes = torch.linalg.svdvals(lost.double())
    left = lost - linear.repair(inputs)
    assert float(left.square().sum()) == pytest.approx(float(sizes[2:].square().sum()), rel=1e-3)


def test_a_repair_makes_up_for_pruning_and_rounding_together():
    model, dense = tiny_model(), tiny_model()
    steps = [*compression("magnitude"), *compression("gptq"), repair(32, targets=["re:.*q_proj"])]
    compress_model(model, TOKENS, steps)
    first, before = (linears(one)["model.layers.0.self_attn.q_proj"] for one in (model, dense))
    assert not torch.equal(first.weight, before.weight)
    assert_close(first.weight + first.repair.up @ first.repair.down, before.weight)
    assert [name for name, one in linears(model).items() if "repair" in one._modules] == [
        f"model.layers.{index}.self_attn.q_proj" for index in range(4)
    ]


def test_only_what_was_compressed_is_repaired_and_nothing_after_it():
    model = tiny_model()
    rows = compress_model(model, TOKENS, [*compression(targets=["re:.*mlp"]), repair()])
    assert {row.name.split(".")[3] for row in rows} == {"mlp"}
    assert hooks(model.network) == len(rows)
    with pytest.raises(DataError, match="nothing to repair"):
        compress_model(tiny_model(), TOKENS, [*compression(targets=["re:.*mlp"]), repair(targets=["re:.*q_proj"])])
    with pytest.raises(DataError, match="put it after all that compresses"):
        compress_model(tiny_model(), TOKENS, [repair(), *compression()])


def test_an_expert_that_no_token_reaches_has_no_repair():
    model = tiny_model("mixtral")
    rows = compress_model(model, TOKENS[:1, :2], [*compression("magnitude"), repair(1)])
    idle = [row for row in rows if not row.methods]
    assert idle
    assert all((row.repair_rank, row.repair_parameters) == (0, 0) for row in idle)
    assert all(row.repair_rank == 1 for row in rows if row.methods)
