"""Shards put together are the evaluation made in one go, also where an attack had nothing to do in one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.records.record import Record

torch = pytest.importorskip("torch")

from factories import toy_job  # noqa: E402

from bench.atomic import file_hash  # noqa: E402
from bench.core.classifier import Classifier  # noqa: E402
from bench.data.images import Images, load  # noqa: E402
from bench.jobs.evaluate import evaluate  # noqa: E402
from bench.jobs.evaluation_job import assemble  # noqa: E402
from bench.records.store import SAMPLES, Store  # noqa: E402

N, WRONG = 16, 8  # images, and how many of the first ones the model gets wrong without an attack
ATTACKS = {
    "autoattack": ("stage", {"version": "custom", "attacks_to_run": ["apgd-ce"], "batch_size": 8, "block_size": 8}),
    "torchattacks": ("distance", {"method": "DeepFool", "kwargs": {"steps": 3}}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_shard_without_an_attacked_image_lacks_its_columns_and_fits_all_the_same(attack: str, tmp_path: Path) -> None:
    pytest.importorskip("torchattacks" if attack == "torchattacks" else "pyautoattack")
    column, settings = ATTACKS[attack]
    data = load("digits", root=tmp_path, device=torch.device("cpu"), test=N)
    torch.manual_seed(0)
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))).eval()
    with torch.no_grad():
        answers = model.predict(data.test.x.float() / 255)
    y = torch.where(torch.arange(N) < WRONG, (answers + 1) % 10, answers)
    data = replace(data, test=Images(data.test.x, y))
    threat = {"norm": "L2" if attack == "torchattacks" else "Linf", "eps": "0.1"}
    what: dict[str, Any] = {"attack": {"name": attack, "set": settings}, "threat": threat, "n": N, "seed": 0}
    store, keys = Store(tmp_path / "results"), []
    store.prepare()
    for images in ([0, WRONG], [WRONG, N]):
        shard = toy_job("shard", {**what, "images": images}, ("0" * 12,))
        columns, _, metrics = evaluate(shard, model, data, lambda values: None)
        assert (column in columns) == (images[0] == WRONG)
        store.add(shard)
        path = store.folder(shard.key) / SAMPLES
        np.savez(path, **{name: values.numpy() for name, values in columns.items()})
        store.put(shard, Record("done", metrics, files={SAMPLES: file_hash(path)}))
        keys.append(shard.key)
    found, _, _ = assemble(store, toy_job("evaluate", what, ("0" * 12,), tuple(keys)))
    assert len(found[column]) == N
    missing = found[column][:WRONG]
    assert bool(missing.isnan().all() if missing.is_floating_point() else (missing == 0).all())
    if attack == "autoattack":  # whose blocks are the shards: one run over all is the same
        whole, _, _ = evaluate(toy_job("evaluate", what), model, data, lambda values: None)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], values) for name, values in whole.items())
