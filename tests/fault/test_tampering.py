"""S12: whoever changes a stored value and writes right checksums over it is found by judging the images again."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Bench, tiny, write_plugins

from bench.atomic import file_hash, write_json
from bench.records.store import IMAGES, RECORD, SAMPLES, Store, checksum

TAMPERED = 20
RESULTS = Path("results")

pytestmark = pytest.mark.fault
pytest.importorskip("torch")


def forge(store: Store, key: str, **values: Any) -> None:
    """Another record with the right checksum and the hashes of the files that lie there."""
    record: dict[str, Any] = {**json.loads((store.folder(key) / RECORD).read_text()), **values}
    record["files"] = {name: file_hash(store.folder(key) / name) for name in record["files"]}
    write_json(store.folder(key) / RECORD, {**record, "checksum": checksum(record)})


def tamper(store: Store, key: str, number: int, draw: random.Random) -> str:
    """One value: a verdict, an image, a weight or a metric; gives what."""
    from safetensors.torch import load_file, save_file

    folder = store.folder(key)
    if number % 4 < 2:
        columns = store.samples(key)
        columns["correct"][draw.randrange(16)] ^= True
        np.savez_compressed(folder / SAMPLES, **columns)
        forge(store, key)
        return "a verdict"
    if number % 4 == 2:
        images = load_file(folder / IMAGES)["x_adv"]
        place = draw.randrange(16)
        images[place] = (images[place] + 0.6) % 1.0
        save_file({"x_adv": images}, folder / IMAGES)
        forge(store, key)
        return "an image"
    forge(store, key, metrics={**json.loads((store.folder(key) / RECORD).read_text())["metrics"], "n": 15})
    return "a metric"


def test_s12_every_tampered_value_is_found(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins, "--executor", "debug", attack="wobble")).code == 0
    store, draw, missed = Store(RESULTS), random.Random(0), []
    key = next(job.key for job in store.jobs().values() if job.kind == "evaluate")
    honest = {path: path.read_bytes() for path in store.folder(key).iterdir()}
    verify = ("verify", "--full")
    outcome = verified(bench, plugins, *verify)
    assert outcome.code == 0, outcome.out
    assert "1 of 1 evaluation with images and weights scored again" in outcome.out
    for number in range(TAMPERED):
        what = tamper(store, key, number, draw)
        outcome = verified(bench, plugins, *verify)
        missed += [f"{what} ({number}): {outcome.out}"] * (outcome.code != 4)
        for path, content in honest.items():
            path.write_bytes(content)
    assert missed == []
    assert verified(bench, plugins, *verify).code == 0


def verified(bench: Bench, plugins: list[object], *words: object) -> Any:
    """Files of plug-ins reach a verification as they reach any other command."""
    return bench(*words, *plugins)


def test_what_is_not_in_this_copy_is_said_and_no_failure(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins, "--executor", "debug", attack="wobble")).code == 0
    (image,) = RESULTS.glob(f"*/{IMAGES}")
    image.unlink()
    outcome = verified(bench, plugins, "verify")
    assert outcome.code == 0
    assert f"1 x {IMAGES} not in this copy: not checked" in outcome.out
    assert "no images scored again of 0 evaluations" in outcome.out


def test_code_that_is_not_here_is_said_and_no_change(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins, "--executor", "debug", attack="wobble")).code == 0
    (key,) = (job.key for job in Store(RESULTS).jobs().values() if job.kind == "evaluate")
    summary = "1 of 1 evaluation with images and weights scored again"
    for name, kind in (("wobble", "attack"), ("plain", "defense")):
        place = plugins.index(tmp_path / f"{name}.py")
        outcome = verified(bench, plugins[: place - 1] + plugins[place + 1 :], "verify", "--full")
        assert (outcome.code, "WRONG" in outcome.out) == (0, False), outcome.out
        assert f"{key}: not scored again: no {kind} '{name}'." in outcome.out
        assert summary in outcome.out
    file = tmp_path / "wobble.py"
    file.write_text(file.read_text().replace("import os, signal, time", "import a_package_that_is_not_here, os"))
    monkeypatch.delitem(sys.modules, "bench_plugin_wobble")
    outcome = verified(bench, plugins, "verify", "--full")
    assert (outcome.code, "WRONG" in outcome.out) == (0, False), outcome.out
    assert f"{key}: not scored again: No module named 'a_package_that_is_not_here'" in outcome.out
    assert summary in outcome.out


def test_a_column_that_was_taken_away_is_a_change(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins, "--executor", "debug", attack="wobble")).code == 0
    store = Store(RESULTS)
    (key,) = (job.key for job in store.jobs().values() if job.kind == "evaluate")
    columns = {name: values for name, values in store.samples(key).items() if name != "label"}
    np.savez_compressed(store.folder(key) / SAMPLES, **columns)
    forge(store, key)
    outcome = verified(bench, plugins, "verify", "--full")
    assert outcome.code == 4
    assert f"WRONG  {key}: cannot be scored again: 'label'" in outcome.out
