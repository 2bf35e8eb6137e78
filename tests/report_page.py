"""A small matrix, its report, and how tests read the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch
from factories import STEPS, evaluated, full, trained
from safetensors.torch import save_file

from bench.atomic import file_hash
from bench.planning.job import Job
from bench.records.store import Store
from bench.records.training_log import LOG
from bench.report.images import Fetch, Picture, no_images
from bench.report.page import render
from bench.results.rows import Row
from bench.soundness.verdicts import judged_rows


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.raw.get(self.inside, self.text).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def matrix(store: Store, method: str = "guard") -> None:
    """Two seeds of one defense at two budgets, another with a failed cell, a randomized one."""
    for seed in (0, 1):
        train = trained(store, method, seed)
        full(store, train, 400 + 20 * seed)
        evaluated(store, train, "steep", [1] * 100 + [0] * 900, STEPS, eps="0.2")
    other = trained(store, "standard", seconds=5.0)
    full(store, other, 30)
    evaluated(store, other, "onestep", state="error", n=1000)
    evaluated(store, trained(store, "hazy", deploys="randomised"), "steep", [1, 0], STEPS)


def html(store: Store, fetch: Fetch = no_images) -> str:
    """The text of the page."""
    return render(store, fetch)[0]


def all_judged(store: Store) -> list[Row]:
    return judged_rows(store, split=None)


HOSTILE = '<img src=x onerror=alert(1)> & "$x_1$"'


def log(store: Store, job: Job, *lines: dict[str, float]) -> None:
    text = "".join(json.dumps({"epoch": k, "seconds": 1.0, **line}) + "\n" for k, line in enumerate(lines, 1))
    (store.folder(job.key) / LOG).write_text(text)


def picture(size: int, fooled: bool = True, channels: int = 1) -> Picture:
    clean = np.full((size, size) if channels == 1 else (size, size, channels), 0.25)
    return Picture(7, HOSTILE, clean, clean + 0.05, fooled, (("3", 0.875), ("abstains", math.nan)))


def with_images(store: Store, train: Job, attack: str, hits: int, **other: Any) -> str:
    """An evaluation of 4 images whose record names stored images, which lie there."""
    key = evaluated(store, train, attack, [1] * hits + [0] * (4 - hits), **other)
    path = store.folder(key) / "adversarial.safetensors"
    save_file({"x_adv": torch.full((4, 1, 28, 28), 0.5)}, path)
    record = store.record(key)
    assert record is not None
    store.put(store.job(key), replace(record, files={**record.files, path.name: file_hash(path)}))
    return key
