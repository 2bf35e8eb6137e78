"""corruption_accuracy = mean over k in types, s in severities of 1[predict(c_k(x; s)) = y]

Common corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261): 15 types of noise, blur, weather and digital
artifacts at 5 severities each, with the constants of CIFAR-10-C, computed here from the test images at hand, so that
nothing is downloaded and any data set has them.

The mean over types and severities is what CIFAR-10-C is usually reported by; the paper's mCE divides each type's error
by that of AlexNet, which is not at hand for other data. The mean tells how a model does on images that nobody has
chosen against it. It is no part of robust accuracy, of the worst case or of ranks.

All models and training seeds see the same corrupted images: those of an image are drawn from `seed`, its place in the
test set, the type and the severity, on the CPU for every device. A stochastic model answers by its deployed rule.

Sizes: with s = side / 32, side the shorter one, every length in pixels is multiplied by s: radii and standard
deviations of blurs, the reach of glass and the size of snowflakes (both at least 1 pixel), the shifts of the elastic
transform. The disk of defocus, which is given pixel by pixel, is resampled linearly. Noise levels, fog, brightness,
contrast, zoom factors, the share of pixels kept and the JPEG quality are those of 32 pixels. At 8 pixels, blurs are so
small that they change little, and two severities of pixelate can be the same. On gray images frost is gray and the only
channel is the brightness; JPEG takes two channels, or four and more, one by one.

Different from the released code, so that published accuracies are no reference to the digit: frost lies over a
procedural texture (veins of ice, ridges of plasma fractals) in place of five photographs; zooms are about the center
without rounding the crop to whole pixels; images keep float precision, where the released ones are stored in 8 bits
(JPEG has them still). Glass gives a pixel the color of a neighbor, as the released code does, where an exchange of
NumPy views copies.

The distance from the clean image does not rise with severity everywhere, by the published constants: the affine part of
elastic_transform falls, the blur of glass_blur hides what it displaces, frost darkens what it covers, and severity 4 of
motion_blur has the sigma of 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from attacks._corruptions import corrupt
from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed


@dataclass
class Corruption(Evaluation):
    """Accuracy on corrupted images. Costs a prediction for each type and severity, and one of the clean image."""

    metric: ClassVar[str] = "corruption_accuracy"
    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "(len(types) len(severities) + 1) P = 76F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"severities": [5]}

    types: list[
        Literal[
            "gaussian_noise", "shot_noise", "impulse_noise",
            "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
            "snow", "frost", "fog",
            "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
        ]
    ] = field(
        default_factory=lambda: [
            "gaussian_noise", "shot_noise", "impulse_noise",
            "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
            "snow", "frost", "fog",
            "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
        ]
    )  # fmt: skip
    """Corruptions to apply, each alone."""
    severities: list[Annotated[int, Ge(1), Le(5)]] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Severities of each, from 1 to 5."""
    seed: int = 0
    """Seed of the corruptions, another than that of the training."""

    def __post_init__(self) -> None:
        for name, chosen in (("types", self.types), ("severities", self.severities)):
            if not chosen or len(set(chosen)) < len(chosen):  # type: ignore[arg-type]
                raise ValueError(f"corruption: {name} is {chosen}; expected a list without repetitions, not empty")

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns: `clean` (right without a corruption), `correct_<type>` (bool, b x severities), and
        `corruption_accuracy`, the mean of all of these for each image (float64)."""
        with frozen(model), torch.no_grad():
            columns = {"clean": ctx.correct(model, x, y)}
            for done, name in enumerate(self.types, start=1):
                column = f"correct_{name}"
                if column in ctx.saved:
                    columns[column] = ctx.saved[column]
                else:
                    right = [self._correct(model, x, y, name, severity, ctx) for severity in self.severities]
                    columns[column] = torch.stack(right, 1)
                    ctx.save(columns)
                ctx.report(done, len(self.types), f"{name} {columns[column].float().mean():.1%}")
        of_all = torch.cat([columns[f"correct_{name}"] for name in self.types], 1)
        return Outcome({**columns, "corruption_accuracy": of_all.double().mean(1)})

    def _correct(self, model: Classifier, x: Tensor, y: Tensor, name: str, severity: int, ctx: Context) -> Tensor:
        """Which images (bool, shape b) the deployed rule gets right under this corruption."""
        places = range(ctx.first, ctx.first + len(x))
        corrupted = corrupt(x, name, severity, [seed(self.seed, name, severity, place) for place in places])
        with scope(seed(ctx.seed, name, severity)):  # the noise of a stochastic model
            return model.predict(corrupted) == y
