"""The names of plug-ins with their settings, as tables show them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.planning import catalog
from bench.planning.labels import label


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "noisy"),
        ({"sigma": 0.5}, "noisy (sigma=0.5)"),
        ({"preset": "input"}, "noisy (preset=input)"),
        ({"preset": "input", "rows": 2}, "noisy (preset=input, rows=2)"),
        ({"preset": "input", "sigma": 0.5}, "noisy (probes=0, sigma=0.5, site=input, w_mse=0)"),
    ],
)
def test_a_preset_is_named_where_all_its_values_are_there(settings: dict[str, Any], expected: str) -> None:
    assert label("defenses", "noisy", catalog.get("defenses", "noisy").resolve(settings)) == expected
