import pytest
import torch
from reference import lowest_by_sorting

from mopcompress.algorithms.masks import check_pattern, groups_of_rows, lowest, lowest_count, lowest_overall, n_of_m
from mopcompress.errors import DataError, NumericalError

FRACTIONS = [0.0, 0.01, 0.29, 0.5, 0.505, 0.85, 0.999, 1.0]


def random_scores(rows: int, columns: int, *, tied: bool = False) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(rows * columns)
    if tied:
        return torch.randint(0, 4, (rows, columns), generator=seeded).float()
    return torch.rand(rows, columns, generator=seeded)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_exact(fraction, tied):
    scores = random_scores(7, 100, tied=tied)
    assert (lowest(scores, fraction).sum(1) == round(fraction * 100)).all()
    assert lowest_overall(scores, fraction).sum() == round(fraction * 700)
    assert lowest_count(scores, 123).sum() == 123


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_masks_are_those_of_a_stable_sort(fraction, tied):
    scores = random_scores(5, 30, tied=tied)
    by_row = [lowest_by_sorting(row, round(fraction * 30)) for row in scores.tolist()]
    assert lowest(scores, fraction).tolist() == by_row
    overall = lowest_by_sorting(scores.flatten().tolist(), round(fraction * 150))
    assert lowest_overall(scores, fraction).flatten().tolist() == overall


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (0, 4), (3, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_group_loses_its_n_lowest(n, m, tied):
    scores = random_scores(6, 24, tied=tied)
    mask = n_of_m(scores, n, m)
    for row, marks in zip(scores.tolist(), mask.tolist(), strict=True):
        for first in range(0, 24, m):
            assert marks[first : first + m] == lowest_by_sorting(row[first : first + m], n)


def test_among_equal_scores_the_earlier_column_goes():
    equal = torch.ones(2, 8)
    assert lowest(equal, 0.25).tolist() == [[True] * 2 + [False] * 6] * 2
    assert n_of_m(equal, 1, 4).tolist() == [[True, False, False, False] * 2] * 2
    assert lowest_overall(equal, 0.25).tolist() == [[True] * 4 + [False] * 4, [False] * 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_dtype_works(dtype):
    scores = random_scores(3, 50).to(dtype)
    assert lowest(scores, 0.5).tolist() == [lowest_by_sorting(row, 25) for row in scores.tolist()]


def test_an_infinite_score_is_never_among_the_lowest():
    assert lowest(torch.tensor([[torch.inf, 3.0, 1.0, 2.0]]), 0.75).tolist() == [[False, True, True, True]]


def test_scores_that_are_not_numbers_raise():
    with pytest.raises(NumericalError, match="not numbers"):
        lowest(torch.full((2, 4), torch.nan), 0.5)


def test_an_error_about_a_pattern_names_the_numbers():
    with pytest.raises(DataError, match=r"3x10 weight .* 2:4 .* 10 is no multiple of 4"):
        n_of_m(torch.rand(3, 10), 2, 4)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_an_impossible_fraction_raises(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        lowest(torch.rand(3, 10), fraction)


def test_a_pattern_with_another_sparsity_raises():
    check_pattern(0.5, (2, 4))
    check_pattern(0.33, (1, 3))
    check_pattern(0.7, None)
    with pytest.raises(DataError, match=r"2:4 pattern removes 0\.5 .* not 0\.7"):
        check_pattern(0.7, (2, 4))


def test_row_groups_must_fill_the_stack():
    weight = torch.rand(5, 2)
    assert groups_of_rows(weight, None) == [slice(0, 5)]
    assert groups_of_rows(weight, [3, 2]) == [slice(0, 3), slice(3, 5)]
    with pytest.raises(DataError, match=r"\[3, 3\] do not add up to the 5 rows"):
        groups_of_rows(weight, [3, 3])
