"""Numbers as text."""

import math

import pytest

from mopcompress.report.number_format import MINUS, change, change_with_interval, duration, number, size_in_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (999.96, "1,000"),
        (9.99996, "10.00"),
        (7956.4, "7,956"),
        (1.23e9, "1,230,000,000"),
        (2e20, "2.000e+20"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (-0.5, MINUS + "0.500"),
        (-0.0, "0.000"),
    ],
)
def test_numbers_are_never_clipped(value: float, text: str) -> None:
    assert number(value) == text


def test_changes_are_changes_of_perplexity() -> None:
    plain = change_with_interval(math.log(0.88), math.log(0.85), math.log(0.91)).replace("\N{NO-BREAK SPACE}", " ")
    assert plain == f"{MINUS}12 % [{MINUS}15, {MINUS}9]"
    assert change_with_interval(math.log(0.98), math.log(0.96), math.log(0.997)).endswith(f", {MINUS}0.3]")
    assert change(0.0) == "0.0\N{NO-BREAK SPACE}%"
    assert change_with_interval(math.inf, math.nan, math.nan) == "n/a"
    assert change(math.log(1000)).startswith("+99,900")
    assert change(math.log(0.0003)).startswith(f"{MINUS}99.97")


def test_bytes_and_seconds_are_readable() -> None:
    spaced = [
        size_in_bytes(269_060_552.0),
        size_in_bytes(812.0),
        size_in_bytes(0.0),
        duration(3.21),
        duration(212.0),
        duration(3720.0),
    ]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in spaced] == [
        "269 MB",
        "812 B",
        "0 B",
        "3.2 s",
        "3 min 32 s",
        "1 h 02 min",
    ]
