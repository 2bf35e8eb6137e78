"""Adversarial images of an evaluation beside the clean ones, with the predictions of the deployed model for both.

Needs the images that the evaluation stored, the data set, and for the predictions the weights. Nothing is downloaded,
no code of an imported model runs, and a sentence replaces what is missing or damaged.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed
from bench.data import datasets
from bench.data.images import Data, load, test_block
from bench.jobs.model_files import load_model, stored_images
from bench.planning.job import EvaluationJob, ModelJob, TrainJob
from bench.records.store import Store
from bench.report.images import Fetched, Picture, Wanted

DRAWS = 32  # noise draws over which the confidence of a stochastic model is averaged


class Strips:
    """Makes the strips of images of a report, from a results folder and a data folder."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store = store
        self._data = functools.cache(functools.partial(_data, root))
        self._models: dict[tuple[str, str], Classifier | None] = {}

    def fetch(self, wanted: list[Wanted]) -> Fetched:
        """All strips that can be made, by key, and a sentence for each one that cannot."""
        strips, notes = {}, []
        for one in wanted:
            try:
                strips[one.entry.key] = self._strip(one)
            except (ValueError, LookupError, OSError) as problem:
                notes.append(f"Without images: {problem}.")
        return Fetched(strips, notes)

    def _strip(self, one: Wanted) -> list[Picture]:
        """Raises LookupError or ValueError. Their messages name no folder, since the page that shows them is shared."""
        job, record = self.store.evaluation(one.entry.key), self.store.record(one.entry.key)
        trained = self.store.model_job(job.model_key)
        about, n = trained.data, job.n
        data = self._data(about.name, about.size, n)
        if record is None or data.test_hash != record.metrics.test_hash:
            raise ValueError(f"{about.name} here has other test images than those of the records")
        x_adv = stored_images(self.store, one.entry.key).float()
        samples = self.store.samples(one.entry.key, ("index", "correct"))
        x, y = test_block(data, 0, n)
        if x_adv.shape[1:] != x.shape[1:] or len(x_adv) > len(samples["index"]):
            raise ValueError(f"the stored images of {one.entry.key} have another shape than {about.name}")
        place = {index: row for row, index in enumerate(samples["index"][: len(x_adv)].tolist())}
        if not place.keys() >= {*one.indices}:
            raise ValueError(f"the stored images of {one.entry.key} are fewer than its record says")
        rows, index = [place[index] for index in one.indices], torch.tensor(one.indices)
        clean, attacked = x[index], x_adv[torch.tensor(rows)]
        names = [f"{data.class_names[int(k)]}" for k in y[index]]
        found = self._predictions(trained, data, job, torch.cat([clean, attacked]))
        shown = list(zip(found[: len(rows)], found[len(rows) :], strict=True)) if found else [None] * len(rows)
        return [
            Picture(int(index[k]), names[k], _to_array(clean[k]), _to_array(attacked[k]), fooled, shown[k])
            for k, fooled in enumerate((~samples["correct"].astype(bool)[rows]).tolist())
        ]

    def _predictions(self, trained: ModelJob, data: Data, job: EvaluationJob, x: Tensor) -> list[tuple[str, float]]:
        """Class and confidence of each image; empty if the weights are missing or the model cannot be built."""
        model = self._model(trained, data, job.weights)
        classes, shares = _predicted(model, x) if model else ([], torch.empty(0))
        return [
            ("abstains" if k < 0 else data.class_names[k], float("nan") if k < 0 else float(shares[at, k]))
            for at, k in enumerate(classes)
        ]

    def _model(self, trained: ModelJob, data: Data, weights: str) -> Classifier | None:
        """None if the weights are missing or the model cannot be built."""
        if not isinstance(trained, TrainJob):
            return None  # its network is a file of the user's; a report runs no code that a record names
        if (trained.key, weights) not in self._models:
            try:
                self._models = {(trained.key, weights): load_model(self.store, trained, data, weights)}
            except (ValueError, LookupError, OSError, TypeError, RuntimeError):
                self._models = {(trained.key, weights): None}
        return self._models[trained.key, weights]


@torch.no_grad()
def _predicted(model: Classifier, x: Tensor) -> tuple[list[int], Tensor]:
    """The prediction for each image (-1: the model abstains) and the softmax averaged over its noise draws."""
    draws = DRAWS if model.stochastic or model.smoothed else 1
    with frozen(model), scope(seed("report", "pictures")):
        shares = torch.stack([model(x).softmax(1) for _ in range(draws)]).mean(0)
        return [int(k) for k in model.predict(x)], shares


def _to_array(image: Tensor) -> np.ndarray[Any, Any]:
    """h w of a gray image, h w c of a colored one."""
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()


def _data(root: Path, name: str, size: int | None, n: int) -> Data:
    try:
        datasets.check(name, root, explicit=False, download=False)
        return load(name, root=root, device=torch.device("cpu"), size=size, train=1, test=n)
    except (OSError, LookupError, ValueError) as problem:
        raise LookupError(f"no clean images of {name} here; BENCH_DATA or --data-dir says where") from problem
