"""Exact budgets: ``8/255`` stays a fraction from the command line to the table.

``0.031`` and ``8/255`` are different threat models, while ``8/255`` and ``0.03137254901960784`` (the float nearest
to it) are the same one. Torch-free.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from pydantic_core import core_schema

_PLAIN = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_FLOAT32 = Fraction(2) ** -126, Fraction(2) ** 127  # attacks compute in this range
ROUNDING = 1e-6  # of float32 projection; more than this beyond ball or box is an error
_LARGEST_DENOMINATOR = 1020  # 4 * 255: half and quarter pixel levels are still recognized in a float


def reach(eps: float) -> float:
    """The largest size that counts as inside a budget: that of an image moved by eps and rounded to float32."""
    return eps * (1 + ROUNDING) + ROUNDING


class Epsilon(Fraction):
    """A non-negative exact number, read from ``0.03``, ``"8/255"`` or ``8e-3`` and printed back as it is known.

    Raises ValueError for anything else, in one line that says what is expected.
    """

    def __new__(cls, value: Any = 0, denominator: Any = None) -> Epsilon:
        if denominator is not None:
            return super().__new__(cls, value, denominator)
        return super().__new__(cls, _parse(value))

    def __str__(self) -> str:
        denominator = self.denominator
        for prime in (2, 5):
            while denominator % prime == 0:
                denominator //= prime
        if denominator == 1:  # a terminating decimal
            text = f"{float(self):.15g}"
            return text if Fraction(text) == self else f"{self.numerator}/{self.denominator}"
        if 255 % self.denominator == 0:
            return f"{self.numerator * 255 // self.denominator}/255"
        return f"{self.numerator}/{self.denominator}"

    def __repr__(self) -> str:
        return f"Epsilon('{self}')"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def _parse(value: Any) -> Fraction:
    if isinstance(value, Fraction):
        return value
    text = str(value).strip()
    if isinstance(value, bool):
        raise ValueError(_message(text))
    top, slash, bottom = text.partition("/")
    if not _PLAIN.fullmatch(top.strip()) or (slash and not _PLAIN.fullmatch(bottom.strip())):
        raise ValueError(_message(text))
    if slash and Fraction(bottom.strip()) == 0:
        raise ValueError(f"'{text}' divides by zero; expected a number such as 8/255")
    exact = Fraction(top.strip()) / (Fraction(bottom.strip()) if slash else 1)
    if exact < 0:
        raise ValueError(f"'{text}' is negative; expected a number >= 0 such as 8/255")
    if exact and not _FLOAT32[0] <= exact <= _FLOAT32[1]:
        kind = "infinite" if exact > 1 else "zero"
        raise ValueError(f"'{text}' is {kind} as a 32-bit float; expected a number such as 8/255")
    near = exact.limit_denominator(_LARGEST_DENOMINATOR)
    return near if float(near) == float(exact) else exact


def _message(text: str) -> str:
    return f"'{text}' is not a number; expected one such as 8/255, 0.03 or 8e-3"


def underflows(text: str) -> bool:
    """Whether the text is a number other than zero that is zero as a float, such as 1e-400."""
    digits = re.fullmatch(r"[+-]?([\d.]*\d[\d.]*)[eE]-\d+", text)
    return digits is not None and digits[1].strip("0.") != "" and float(text) == 0


def parse_eps(value: Any, norm: str) -> Epsilon:
    """The budget of a threat model: an Epsilon that is possible under `norm` for images in [0,1].

    Raises ValueError: an Linf budget above 1 is nearly always pixel units (8 meant 8/255).
    """
    eps = Epsilon(value)
    if norm == "Linf" and eps > 1:
        hint = f"; did you mean {eps}/255?" if eps <= 255 and eps.denominator == 1 else ""
        raise ValueError(f"eps {value} under Linf is larger than the pixel range [0,1]{hint}")
    return eps
