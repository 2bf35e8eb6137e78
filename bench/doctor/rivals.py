"""Other ways to feed a model and to read its classes, which the doctor tries beside the one it was given."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.data.datasets import Facts


def inputs(x: Tensor, facts: Facts) -> dict[str, tuple[Tensor, str]]:
    """Inputs that a model may have been trained on, by formula, and what it means if one of them is right."""
    if all(m == 0 for m in facts.mean) and all(s == 1 for s in facts.std):
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))  # bench leaves these images in [0,1]; others normalize them
    else:
        mean, std = x.new_tensor(facts.mean), x.new_tensor(facts.std)
    mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
    text = "/".join(",".join(f"{v:.4g}" for v in part.flatten().tolist()) for part in (mean, std))
    fix = "do it inside the model" + (" or with --normalise {}")
    found = {
        "x * 255": (x * 255, "the model expects pixels from 0 to 255: " + fix.format("0/" + repr(1 / 255)[:12])),
        "2 x - 1": (2 * x - 1, "the model expects pixels from -1 to 1: " + fix.format("0.5/0.5")),
        "(x - mean) / std": ((x - mean) / std, "normalization is missing: " + fix.format(text)),
        "x * std + mean": (x * std + mean, "images are normalized twice: leave one out, such as by --normalise none"),
        "(x + 1) / 2": ((x + 1) / 2, "pixels are taken to [-1,1] twice: leave one out"),
        "1 - x": (1 - x, "the model expects inverted images"),
    }
    if facts.channels == 3:
        found["BGR"] = (x.flip(1), "the model expects its channels in the order blue, green, red")
    return found


def relabelled(guess: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Predictions renamed by the best one-to-one map of classes, found on the other half of the images.

    Kuhn's Hungarian method on the confusion matrix; judged on images it did not see, as n images always find a map.
    """
    from scipy.optimize import linear_sum_assignment

    renamed = torch.empty_like(guess)
    halves = torch.arange(len(labels)) % 2 == 0
    for seen in (halves, ~halves):
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        counts.index_put_((guess[seen], labels[seen]), torch.ones(int(seen.sum()), dtype=torch.float64), True)
        rows, columns = linear_sum_assignment(counts + 1e-3 * torch.eye(classes), maximize=True)
        named = torch.empty(classes, dtype=torch.int64)
        named[torch.from_numpy(rows)] = torch.from_numpy(columns)
        renamed[~seen] = named[guess[~seen]]
    return renamed
