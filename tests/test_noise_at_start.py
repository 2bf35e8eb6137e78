"""docs/findings/noise_at_start.md is what its script writes from the stored record, and the record's sizes fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from bench.records.store import Store


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "figures"))
    import noise_at_start

    yield noise_at_start
    for name in ("noise_at_start", "records"):
        sys.modules.pop(name, None)


def test_the_page_shows_the_record(script: Any) -> None:
    folder: Path = ROOT / "docs" / "findings"
    record = json.loads((folder / "noise_at_start.json").read_text(encoding="utf-8"))
    store = Store(ROOT / "results" / "earlier", read_only=True)
    assert script.page(record, store) == (folder / "noise_at_start.md").read_text(encoding="utf-8")
    assert {(row["spec"], row["seed"]) for row in record["rows"]} == {
        (spec, seed) for spec in ("mnist", "cifar10_jpeg") for seed in script.SEEDS
    }
