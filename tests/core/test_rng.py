"""Named random streams."""

from __future__ import annotations

import random

import numpy as np
import torch

from bench.core.rng import scope, seed


def _draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_scope_seeds_every_generator_by_its_value_and_restores_it() -> None:
    with scope(1):
        expected = [_draws(), _draws()]
    inside = []
    with scope(1):
        outside = [_draws()]
        for value in (3, 3, 4):
            with scope(value):
                inside.append(_draws())
        outside.append(_draws())
    assert outside == expected
    assert inside[0] == inside[1]
    assert all(one != other for one, other in zip(inside[0], inside[2], strict=True))


def test_each_part_of_a_name_gives_another_seed() -> None:
    assert len({seed(), seed(1), seed(1, "a"), seed(1, "b"), seed("1a"), seed(2, "a"), seed("a", 1)}) == 7
    assert seed(1, "a") == seed("1", "a") == 6148644138517888281  # the same in every version
