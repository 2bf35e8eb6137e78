"""Stored adversarial images are checked and scored again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from harness import Bench, tiny, write_plugins
from safetensors.torch import load_file, save

from bench.atomic import write_hashed
from bench.jobs.recheck import verify_images
from bench.records.store import IMAGES, Store

pytest.importorskip("torch")
ROOT = Path("no-data-here")


def test_images_outside_the_ball_are_found_though_their_checksum_is_right(bench: Bench, tmp_path: Path) -> None:
    assert bench(*tiny("--executor", "debug", *write_plugins(tmp_path))).code == 0
    store = Store(Path("results"))
    job, record = next((job, record) for job, record in store.records() if IMAGES in record.files)
    assert verify_images(store, job.key, ROOT) == (False, "16 images")
    path = store.folder(job.key) / IMAGES
    images = load_file(path)["x_adv"]
    moved = write_hashed(path, save({"x_adv": (images + 0.5).clamp(0, 1)}))
    store.put(job, replace(record, files={**record.files, IMAGES: moved}))
    differs, note = verify_images(store, job.key, ROOT)
    assert differs
    assert "leave the Linf ball" in note
