"""Adversarial images of an evaluation beside the clean ones, and what the deployed model says of both.

It needs the images that the evaluation stored, the data set, and for labels and confidences the weights. Nothing is
downloaded, no code of an imported model is run, and what is absent or damaged is left out with a sentence.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.atomic import file_hash
from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed
from bench.data import datasets
from bench.data.images import Data, load, test_block
from bench.planning.job import EvaluationJob, ModelJob, TrainJob
from bench.records.store import IMAGES, Store
from bench.report.images import PER_MODEL, Fetched, Picture, Wanted

DRAWS = 32  # of a model that draws, for its confidence
HELD = 1  # so many of the images shown are ones that the attack did not fool, where there are any


class Pictures:
    """Fetches the strips of a report from a results folder and a data folder."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store = store
        self._data = functools.cache(functools.partial(_data, root))

    def fetch(self, wanted: list[Wanted]) -> Fetched:
        """All strips that can be made, by key, and a sentence for each reason why others cannot."""
        strips, notes = {}, []
        for one in wanted:
            try:
                strips[one.entry.key] = self._strip(one)
            except (ValueError, LookupError, OSError) as problem:
                notes.append(f"Without images: {problem}.")
        return Fetched(strips, notes)

    def _strip(self, one: Wanted) -> list[Picture]:
        """Raises LookupError or ValueError in words that name no folder: they stand in a page that is passed on."""
        job, record = self.store.evaluation(one.entry.key), self.store.record(one.entry.key)
        trained = self.store.model_job(job.model_key)
        about, n = trained.data, job.n
        data = self._data(about.name, about.size, n)
        if record is None or data.test_hash != record["metrics"].get("test_hash"):
            raise ValueError(f"{about.name} here has other test images than those of the records")
        path = self.store.folder(one.entry.key) / IMAGES
        if file_hash(path) != record["files"].get(IMAGES):
            raise ValueError(f"the stored images of {one.entry.key} do not match their record")
        x_adv = load_file(path)["x_adv"].float()
        samples = self.store.samples(one.entry.key, ("index", "correct", "clean"))
        x, y = test_block(data, 0, n)
        if x_adv.shape[1:] != x.shape[1:] or len(x_adv) > len(samples["index"]):
            raise ValueError(f"the stored images of {one.entry.key} have another shape than {about.name}")
        right = samples["correct"].astype(bool)[: len(x_adv)]
        rows = _choose(right, samples.get("clean"))
        places = torch.from_numpy(samples["index"][rows].astype(np.int64))
        clean, attacked = x[places], x_adv[torch.tensor(rows)]
        names = [f"{data.class_names[int(k)]}" for k in y[places]]
        says = self._says(trained, data, job, torch.cat([clean, attacked]))
        told = list(zip(says[: len(rows)], says[len(rows) :], strict=True)) if says else [None] * len(rows)
        return [
            Picture(int(places[k]), names[k], _shown(clean[k]), _shown(attacked[k]), not right[row], told[k])
            for k, row in enumerate(rows)
        ]

    def _says(self, trained: ModelJob, data: Data, job: EvaluationJob, x: Tensor) -> list[tuple[str, float]]:
        """Class and confidence of each image; nothing where the weights are absent or the model cannot be built."""
        from bench.jobs.worker import load_model

        if not isinstance(trained, TrainJob):
            return []  # its net is a file of the user's, and a report runs no code that a record names
        try:
            model = load_model(self.store, trained, data, job.weights)
        except (ValueError, LookupError, OSError, TypeError, RuntimeError):
            return []
        classes, shares = _decided(model, x)
        return [
            ("abstains" if k < 0 else data.class_names[k], float("nan") if k < 0 else float(shares[at, k]))
            for at, k in enumerate(classes)
        ]


@torch.no_grad()
def _decided(model: Classifier, x: Tensor) -> tuple[list[int], Tensor]:
    """The deployed decision on each image (-1: it abstains) and the mean softmax of its draws."""
    draws = DRAWS if model.stochastic or model.smoothed else 1
    with frozen(model), scope(seed("report", "pictures")):
        shares = torch.stack([model(x).softmax(1) for _ in range(draws)]).mean(0)
        return [int(k) for k in model.predict(x)], shares


def _choose(right: np.ndarray[Any, Any], clean: np.ndarray[Any, Any] | None) -> list[int]:
    """Places of the images shown: the first that the attack fooled, then the first that it did not."""
    before = np.ones(len(right), bool) if clean is None else clean[: len(right)].astype(bool)
    fooled, held = (list(np.flatnonzero(before & part)) for part in (~right, right))
    first = fooled[: PER_MODEL - min(HELD, len(held))]
    chosen = [*first, *held[: PER_MODEL - len(first)]]
    return [int(row) for row in chosen]


def _shown(image: Tensor) -> np.ndarray[Any, Any]:
    """h w of a gray image, h w c of a colored one."""
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


def _data(root: Path, name: str, size: int | None, n: int) -> Data:
    try:
        datasets.check(name, root, explicit=False, download=False)
        return load(name, root=root, device=torch.device("cpu"), size=size, train=1, test=n)
    except (OSError, LookupError, ValueError) as problem:
        raise LookupError(f"no clean images of {name} here; BENCH_DATA or --data-dir says where") from problem
