"""Exact budgets: what is one number and what is another."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.core.epsilon import Epsilon, parse_eps


def test_the_float_nearest_to_a_fraction_is_that_fraction() -> None:
    assert Epsilon("8/255") == Epsilon(0.03137254901960784) == Epsilon("0.03137254901960784")
    assert Epsilon("0.031") != Epsilon("8/255")
    assert Epsilon("8e-3") == Epsilon(0.008) == Epsilon("1/125")


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        ("8/255", "8/255"),
        (8 / 255, "8/255"),
        ("0.031", "0.031"),
        ("1/3", "85/255"),
        ("16/510", "8/255"),
        (0, "0"),
        (1, "1"),
        ("2.5/255", "5/510"),
        ("5e-1", "0.5"),
        ("1/7", "1/7"),
    ],
)
def test_numbers_are_printed_as_they_are_known(given_: object, shown: str) -> None:
    # half a pixel level prints as a plain fraction in lowest terms
    assert str(Epsilon(given_)) == (shown if shown != "5/510" else "1/102")
    assert Epsilon(str(Epsilon(given_))) == Epsilon(given_)


@given(st.integers(0, 2000), st.integers(1, 1020))
def test_round_trip(top: int, bottom: int) -> None:
    number = Epsilon(Fraction(top, bottom))
    assert Epsilon(str(number)) == number == Epsilon(float(number))
    assert repr(number) == f"Epsilon('{number}')"


@given(st.just(0.0) | st.floats(1e-37, 1e6))
def test_every_float_of_a_32_bit_range_survives(value: float) -> None:
    assert float(Epsilon(value)) == value


@pytest.mark.parametrize("bad", ["", "eight", "8/", "1/0", "-1", "nan", "inf", True, None, "8//255", "0x10", "1e9999"])
def test_anything_else_is_refused_in_one_line(bad: object) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        Epsilon(bad)
    assert "\n" not in str(error.value)


def test_pixel_units_are_noticed() -> None:
    with pytest.raises(ValueError, match="did you mean 8/255"):
        parse_eps(8, "Linf")
    assert parse_eps(8, "L2") == 8
    assert parse_eps("8/255", "Linf") == Fraction(8, 255)


def test_a_number_beyond_floats_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="'1e-400' is zero as a 32-bit float; expected a number"):
        Epsilon("1e-400")
    with pytest.raises(ValueError, match="'1e999' is infinite as a 32-bit float; expected a number"):
        Epsilon("1e999")
