"""Ticks of the figures."""

import pytest

from mopcompress.report.plot_style import change_ticks, log_ticks


@pytest.mark.parametrize(("low", "high"), [(1.0, 1e6), (14.2, 28.9), (20.1, 21.4), (3.0, 3e14)])
def test_log_axes_have_a_few_ticks_in_range(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(-0.16, 0.03), (-1.2, 0.1), (-6.0, 0.2), (-0.2, 9.0), (-80.0, 3.0)])
def test_change_axes_have_zero_and_a_few_round_ticks(low: float, high: float) -> None:
    ticks = change_ticks(low, high)
    assert 0.0 in ticks
    assert 3 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)
