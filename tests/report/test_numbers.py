"""How numbers read."""

import math

import pytest

from launcher.report.numbers import clip, duration, number, short, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.78, "0.7800"),
        (1.0, "1.0000"),
        (0.0, "0.0000"),
        (-0.25, "-0.2500"),
        (2e-5, "2.000e-05"),
        (12.3456, "12.35"),
        (12345.0, "12,345"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_short() -> None:
    assert [short(value) for value in (0.78351, 0.5, 0, 149.7, 12345.6, math.nan)] == [
        "0.784",
        "0.500",
        "0",
        "150",
        "12,346",
        "not finite",
    ]


def test_duration() -> None:
    assert [duration(value) for value in (0.84, 59.6, 190, 3600 * 2 + 301, 3600 * 75)] == [
        "0.8 s",
        "1 min 00 s",
        "3 min 10 s",
        "2 h 05 min",
        "3 d 3 h",
    ]


def test_size() -> None:
    assert [size(value) for value in (0, 2048, 1_400_000_000, 80 * 2**30)] == ["0 B", "2 KiB", "1.3 GiB", "80.0 GiB"]


def test_clip() -> None:
    assert clip("abcdef", 6) == "abcdef"
    assert clip("abcdefg", 6) == "abcde…"
