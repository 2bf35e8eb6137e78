"""The 15 corruptions against independent references and their limits, and the evaluation made of them."""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from factories import toy_job
from harness import Bench, tiny
from nets import NoisyInput, digits, fit, mlp
from PIL import Image
from torch import Tensor, nn

from attacks._corruptions import CORRUPTIONS, SIDE, Draws, Snow, _blur, _pixels, corrupt, disk, ice, plasma
from attacks.corruption import Corruption
from bench import plugins
from bench.core.attack import Columns, Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.rng import seed
from bench.core.smoothing import Smoothed
from bench.core.threat import Threat
from bench.data.images import Data, Images, load, to_float
from bench.jobs.block_cache import BlockCache
from bench.jobs.evaluate import evaluate
from bench.planning.job_fields import PluginChoice
from bench.records.store import Store
from bench.tables.summary import matrix

NO_THREAT = Threat("Linf", Epsilon(0))
DRAWN = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog"} | {
    "elastic_transform"
}
FALLING = {"glass_blur", "motion_blur", "frost", "elastic_transform"}  # somewhere, by their published constants
SEVERITIES = range(1, 6)


def natural(count: int, side: int = SIDE, channels: int = 3) -> Tensor:
    """Random images with the spectrum of photographs, 1 / f, and their contrast: standard deviation 1/4."""
    generator = torch.Generator().manual_seed(5)
    across = torch.fft.fftfreq(side)
    size = (across[:, None].square() + across.square()).sqrt().clamp_min(1 / side)
    noise = torch.fft.fft2(torch.randn(count, channels, side, side, generator=generator))
    gray = noise.mean(1, keepdim=True)  # most of the contrast is in brightness
    x = torch.fft.ifft2((gray + 0.3 * noise) / size).real
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    return (0.5 + 0.25 * x).clamp(0, 1)


def with_constants(x: Tensor, name: str, constants: Any, first: int = 0) -> Tensor:
    """A corruption at other constants than those of the table, before clipping."""
    scale = min(x.shape[2:]) / SIDE
    return CORRUPTIONS[name][0](x, constants, Draws(range(first, first + len(x)), x), scale)


def distances(x: Tensor, name: str) -> list[float]:
    """Root mean square distance from the clean images at each severity."""
    found = [corrupt(x, name, severity, [100 * severity + k for k in range(len(x))]) for severity in SEVERITIES]
    return [float((y - x).square().mean().sqrt()) for y in found]


def test_the_types_are_those_of_the_paper_in_code_and_settings() -> None:
    field = get_type_hints(Corruption)["types"]
    assert list(get_args(get_args(field)[0])) == Corruption(NO_THREAT).types == list(CORRUPTIONS)
    assert len(CORRUPTIONS) == 15
    assert all(len(constants) == 5 for _, constants in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 24, 40), (3, 64, 64)]
)
def test_images_of_any_size_stay_images(name: str, channels: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.rand(3, channels, height, width, dtype=dtype)
        x[0], x[1, :, : height // 2] = 0, 1
        before = x.clone()
        for severity in (1, 5):
            y = corrupt(x, name, severity, [1, 2, 3])
            assert (y.shape, y.dtype) == (x.shape, dtype)
            assert bool(y.isfinite().all())
            assert 0 <= float(y.min()) <= float(y.max()) <= 1
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_its_own_seed_alone(name: str) -> None:
    x = natural(5)
    whole, part = corrupt(x, name, 3, [11, 12, 13, 14, 15]), corrupt(x[2:4], name, 3, [13, 14])
    torch.testing.assert_close(whole[2:4], part, rtol=0, atol=1e-6)
    assert torch.equal(whole, corrupt(x, name, 3, [11, 12, 13, 14, 15]))
    same, other = corrupt(x[:1].repeat(2, 1, 1, 1), name, 3, [1, 2])
    assert bool((same - other).abs().max() > 1e-3) == (name in DRAWN)


@pytest.mark.parametrize("name", sorted({*CORRUPTIONS} - FALLING))
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1), (64, 3)])
def test_more_severe_images_are_farther_from_the_clean_ones(name: str, side: int, channels: int) -> None:
    found = distances(natural(60, side, channels), name)
    assert found == sorted(found)
    assert found[4] > 1.5 * found[0] > 0


def test_types_whose_distance_falls_are_more_severe_in_another_way() -> None:
    x = natural(60)
    found = {name: distances(x, name) for name in FALLING}
    assert all(values != sorted(values) for name, values in found.items() if name != "motion_blur")
    # the pixels of glass move twice from severity 4 on; between, its blur grows and hides a part of it
    one, two, three, four, five = found["glass_blur"]
    assert four > two > three
    assert four > 1.2 * two
    assert five > 1.2 * three
    assert one == pytest.approx(two, rel=0.05)
    # severity 4 of motion has a longer line than 3, and the same weights on it
    one, two, three, four, five = found["motion_blur"]
    assert one < two < three < five
    assert four == pytest.approx(three, rel=0.05)
    # less and less of a dark image, which clipping leaves alone, shows through frost
    told = [_correlation(x, corrupt(0.5 * x, "frost", severity, range(60))) for severity in SEVERITIES]
    assert told == sorted(told, reverse=True)
    # the local part of the elastic transform grows while its affine part shrinks
    settings = CORRUPTIONS["elastic_transform"][1]
    local = [with_constants(x, "elastic_transform", (*c[:2], 0.0)) - x for c in settings]
    sizes = [float(change.square().mean()) for change in local]
    assert sizes == sorted(sizes)
    affine = [with_constants(x, "elastic_transform", (0, 0, c[2])) - x for c in settings]
    sizes = [float(change.square().mean()) for change in affine]
    assert sizes == sorted(sizes, reverse=True)


def _correlation(x: Tensor, y: Tensor) -> float:
    pairs = zip(x.flatten(1).double(), y.flatten(1).double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_3_is_visible_and_leaves_the_image_recognizable(name: str) -> None:
    x = natural(40)
    assert 0.015 < distances(x, name)[2] < 0.3
    if name != "elastic_transform":  # which moves it
        assert _correlation(x, corrupt(x, name, 3, range(40))) > 0.7


NOTHING: dict[str, tuple[Any, float]] = {
    "gaussian_noise": (0.0, 0), "shot_noise": (1e9, 1e-3), "impulse_noise": (0.0, 0),
    "defocus_blur": ((0.3, 1e-3), 1e-6), "motion_blur": ((6, 1e-3), 1e-6), "zoom_blur": (0, 1e-6),
    "snow": (Snow(0.1, 0.2, 1, 9.0, 8, 3, 1.0), 0), "frost": ((1, 0.0), 0), "fog": ((0.0, 3), 1e-6),
    "brightness": (0.0, 1e-6), "contrast": (1.0, 1e-6), "elastic_transform": ((0, 0, 0.0), 1e-4),
    "pixelate": (1.0, 1e-6), "glass_blur": ((1e-3, 1, 0), 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1)])
def test_at_its_limit_a_corruption_changes_nothing(name: str, side: int, channels: int) -> None:
    x = natural(4, side, channels)
    constants, tolerance = NOTHING[name]
    torch.testing.assert_close(with_constants(x, name, constants), x, rtol=0, atol=tolerance)


def test_noise_has_the_moments_of_its_law() -> None:
    x = torch.full((200, 3, 32, 32), 0.5)
    count = x.numel()
    for severity, c in zip(SEVERITIES, CORRUPTIONS["gaussian_noise"][1], strict=True):
        change = corrupt(x, "gaussian_noise", severity, range(200)) - x
        assert float(change.std()) == pytest.approx(c, rel=0.01)
        assert abs(float(change.mean())) < 5 * c / math.sqrt(count)
    for severity, c in zip(SEVERITIES, CORRUPTIONS["shot_noise"][1], strict=True):
        y = corrupt(0.5 * x, "shot_noise", severity, range(200)).double()
        assert float(y.mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 / c / count))
        assert float(y.var()) == pytest.approx(0.25 / c, rel=0.02)
        assert float((c * y - (c * y).round()).abs().max()) < 1e-3  # whole numbers of photons
    for severity, c in zip(SEVERITIES, CORRUPTIONS["impulse_noise"][1], strict=True):
        y = corrupt(x, "impulse_noise", severity, range(200))
        assert set(y.unique().tolist()) == {0.0, 0.5, 1.0}
        for value in (0, 1):
            assert float((y == value).float().mean()) == pytest.approx(c / 2, rel=0.05)


def test_a_disk_in_focus_is_the_mean_over_its_pixels() -> None:
    plus = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).double() / 5
    torch.testing.assert_close(disk(1, 1e-3, 1.0)[1:-1, 1:-1], plus)
    square = disk(1.5, 1e-3, 1.0)[1:-1, 1:-1]
    torch.testing.assert_close(square, torch.full((3, 3), 1 / 9, dtype=torch.float64))
    g = np.exp(-np.array([1, 0, 1]) / (2 * 0.6**2))
    soft = np.outer(g, g) / g.sum() ** 2  # a point after the Gaussian of 3 x 3
    np.testing.assert_allclose(disk(0.5, 0.6, 1.0)[1:-1, 1:-1], soft, rtol=1e-12)
    x = natural(2).double()
    kernel = disk(1, 0.2, 1.0).numpy()
    expected = scipy.ndimage.convolve(x.numpy(), kernel[None, None], mode="mirror")
    np.testing.assert_allclose(corrupt(x, "defocus_blur", 4, [0, 1]).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("s", [0.25, 0.875, 1.0, 1.5, 2.0])
def test_a_kernel_at_another_size_has_the_width_of_that_size(s: float) -> None:
    for c in CORRUPTIONS["defocus_blur"][1]:
        kernel, own = disk(*c, s), disk(*c, 1.0)
        assert float(kernel.sum()) == pytest.approx(1)
        torch.testing.assert_close(kernel, kernel.T)
        torch.testing.assert_close(kernel, kernel.flip(0, 1))
        at, here = (torch.arange(len(k), dtype=torch.float64) - len(k) // 2 for k in (kernel, own))
        found, expected = float(kernel.sum(0) @ at**2), s**2 * float(own.sum(0) @ here**2)
        # the tent that resamples adds its own variance, less than that of a pixel of either grid
        assert expected - 1e-9 <= found <= expected + max(1, s) ** 2 / 4


def test_glass_takes_the_color_of_a_neighbor() -> None:
    x = natural(3).double()
    y = corrupt(x, "glass_blur", 1, [1, 2, 3])  # sigma is 0.05 there: no blur
    near = [
        _pixels(x, torch.full((3, 1, 1), down), torch.full((3, 1, 1), right)) for down in (0, -1) for right in (0, -1)
    ]
    taken = torch.stack([((y - other).abs() < 1e-9).all(1) for other in near])
    assert bool(taken.any(0).all())
    moved = torch.stack([taken[k] & (taken.sum(0) == 1) for k in range(4)]).float().mean((1, 2, 3))
    assert bool((moved > 0.18).all())  # a quarter each
    again = corrupt(x, "glass_blur", 4, [1, 2, 3])
    assert float((again - x).square().mean()) > 1.3 * float((y - x).square().mean())


@pytest.mark.parametrize("sigma", [0.25, 0.4, 1.92, 6.4])
def test_a_blur_is_scipys(sigma: float) -> None:
    x = natural(2, 28).double()
    expected = scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=3)
    np.testing.assert_allclose(_blur(x, sigma, 3).numpy(), expected, atol=1e-12)


def test_motion_is_half_a_gaussian_along_its_direction() -> None:
    x = torch.zeros(40, 1, 32, 32)
    x[:, :, 16, 16] = 1
    for severity, (radius, sigma) in zip(SEVERITIES, CORRUPTIONS["motion_blur"][1], strict=True):
        y = corrupt(x, "motion_blur", severity, range(40))[:, 0]
        weights = np.exp(-(np.arange(2 * radius + 1.0) ** 2) / (2 * sigma**2))
        for image in y:
            rows, columns = (16 - place for place in image.nonzero(as_tuple=True))
            assert bool((columns >= rows.abs()).all())  # between -45 and 45 degrees
            # of steps along a line, those that round to the same pixel fall together
            assert float(image.sum()) == pytest.approx(1, abs=1e-5)
            assert float(image.max()) >= weights[0] / weights.sum() - 1e-6
            reach = float((rows.double().square() + columns.double().square()).sqrt().max())
            assert reach <= 2 * radius + 1
    angles = torch.cat([(16 - p[0].nonzero().double()).mean(0)[None] for p in corrupt(x, "motion_blur", 5, range(40))])
    assert float(angles[:, 0].min()) < -1 < 1 < float(angles[:, 0].max())


def test_a_zoom_is_scipys_and_the_blur_their_mean() -> None:
    x = natural(2).double().numpy()
    for severity, last in zip(SEVERITIES, CORRUPTIONS["zoom_blur"][1], strict=True):
        images = [x]
        for k in range(last + 1):
            factor = 1 / (1 + k / 100)
            scale = (1, 1, factor, factor)
            offset = (0, 0, 15.5 * (1 - factor), 15.5 * (1 - factor))
            images.append(scipy.ndimage.affine_transform(x, scale, offset, order=1, mode="nearest"))
        found = corrupt(torch.from_numpy(x), "zoom_blur", severity, [0, 1])
        np.testing.assert_allclose(found.numpy(), np.mean(images, 0), atol=1e-9)
    assert CORRUPTIONS["zoom_blur"][1] == tuple(
        len(np.arange(1, top, 0.01)) - 1 for top in (1.06, 1.11, 1.16, 1.21, 1.26)
    )


def test_snow_whitens_and_falls_in_both_directions() -> None:
    x = torch.zeros(50, 3, 32, 32)
    for severity, c in zip(SEVERITIES, CORRUPTIONS["snow"][1], strict=True):
        y = corrupt(x, "snow", severity, range(50))
        torch.testing.assert_close(y, y.flip(2, 3))  # the layer and the layer turned by half
        torch.testing.assert_close(y[:, 0], y[:, 2])  # white
        assert float(y.min()) == pytest.approx(0.5 * (1 - c.keep), abs=1e-6) or severity > 3
        assert float((y.amax((1, 2, 3)) > 0.5 * (1 - c.keep) + 0.05).float().mean()) > 0.9  # flakes on most
    flakes = corrupt(x, "snow", 1, range(50))[:, 0] > 0.5 * 0.05 + 1e-4
    assert 0.02 < float(flakes.float().mean()) < 0.3  # one pixel in 160 above the threshold, a streak of each
    gray = torch.tensor([0.9, 0.1, 0.5]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    found = with_constants(gray, "snow", Snow(0, 0, 1, 1, 8, 3, 0.9))
    luminance = 0.299 * 0.9 + 0.587 * 0.1 + 0.114 * 0.5
    white = 1.5 * luminance + 0.5
    expected = torch.tensor([0.9 * v + 0.1 * max(v, white) for v in (0.9, 0.1, 0.5)])
    torch.testing.assert_close(found[0, :, 3, 3], expected)


def test_frost_is_ice_over_a_darker_image() -> None:
    x = natural(6)
    for channels in (1, 3):
        pane = ice(x[:, :channels], Draws(range(6), x))
        assert pane.shape == (6, channels, 32, 32)
        assert 0 <= float(pane.min()) < 0.4 < 0.8 < float(pane.max()) <= 1
        assert 0.4 < float(pane.mean()) < 0.75
    assert bool((pane[:, 2] >= pane[:, 0]).all())  # bluish
    for severity, (keep, cover) in zip(SEVERITIES, CORRUPTIONS["frost"][1], strict=True):
        expected = (keep * x + cover * pane).clamp(0, 1)
        torch.testing.assert_close(corrupt(x, "frost", severity, range(6)), expected)


def test_plasma_is_diamond_square() -> None:
    noise = torch.rand(2, 16, 16, dtype=torch.float64) * 2 - 1
    for decay in (1.75, 3.0):
        for image, found in zip(noise.numpy(), plasma(noise, decay).numpy(), strict=True):
            np.testing.assert_allclose(found, _diamond_square(image, decay), atol=1e-12)


def _diamond_square(noise: np.ndarray[Any, Any], decay: float) -> np.ndarray[Any, Any]:
    """Point by point, on a torus."""
    n, height, step, size = len(noise), {(0, 0): 0.0}, len(noise), 1.0
    while step > 1:
        h = step // 2
        centers = [(i, j) for i in range(h, n, step) for j in range(h, n, step)]
        edges = [(i, j) for i in range(0, n, h) for j in range(0, n, h) if (i + j) // h % 2]
        for points, around in (
            (centers, [(-h, -h), (-h, h), (h, -h), (h, h)]),
            (edges, [(-h, 0), (h, 0), (0, -h), (0, h)]),
        ):
            for i, j in points:
                mean = sum(height[(i + a) % n, (j + b) % n] for a, b in around) / 4
                height[i, j] = mean + size * noise[i, j]
        step, size = h, size / decay**2
    found = np.array([[height[i, j] for j in range(n)] for i in range(n)])
    return (found - found.min()) / (found.max() - found.min())  # type: ignore[no-any-return]


def test_fog_is_between_nothing_and_all_of_its_amount() -> None:
    x = torch.full((8, 3, 32, 32), 0.6)
    for severity, (amount, _) in zip(SEVERITIES, CORRUPTIONS["fog"][1], strict=True):
        y = corrupt(x, "fog", severity, range(8))
        low, high = 0.6 * 0.6 / (0.6 + amount), 0.6
        torch.testing.assert_close(y.amin((1, 2, 3)), torch.full((8,), low))
        torch.testing.assert_close(y.amax((1, 2, 3)), torch.full((8,), high))
        assert torch.equal(y[:, 0], y[:, 1])  # gray


def test_brightness_is_raised_in_hsv() -> None:
    x = natural(2, 8).double()
    x[0, :, 0, 0] = 0
    for severity, c in zip(SEVERITIES, CORRUPTIONS["brightness"][1], strict=True):
        y = corrupt(x, "brightness", severity, [0, 1])
        for before, after in zip(
            x.permute(0, 2, 3, 1).reshape(-1, 3), y.permute(0, 2, 3, 1).reshape(-1, 3), strict=True
        ):
            hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1))
            np.testing.assert_allclose(after, expected, atol=1e-9)
        gray = corrupt(x[:, :1], "brightness", severity, [0, 1])
        torch.testing.assert_close(gray, (x[:, :1] + c).clamp(0, 1))


def test_contrast_shrinks_every_channel_to_its_mean() -> None:
    x = natural(3).double()
    for severity, c in zip(SEVERITIES, CORRUPTIONS["contrast"][1], strict=True):
        y = corrupt(x, "contrast", severity, [0, 1, 2])
        torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)))
        torch.testing.assert_close(y.std((2, 3)), c * x.std((2, 3)))


def test_an_affine_map_moves_lines_to_lines_by_no_more_than_it_may() -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ramps = (torch.stack([columns, rows]) / 31).double()[None].repeat(20, 1, 1, 1)
    y = corrupt(ramps, "elastic_transform", 1, range(20))
    inner = slice(12, 21)
    for before, after in zip(ramps[:, :, inner, inner], y[:, :, inner, inner], strict=True):
        design = torch.stack([*before.flatten(1), torch.ones(81).double()], 1)
        solved = torch.linalg.lstsq(design, after.flatten(1).T).solution
        torch.testing.assert_close(design @ solved, after.flatten(1).T, rtol=0, atol=1e-6)
        assert not torch.allclose(after, before, atol=1e-3)
    # points 10 pixels off the middle move by up to 2.56 in each direction, the middle by no more
    middle = 31 * (y[:, :, 16, 16] - ramps[:, :, 16, 16]).abs()
    assert 0.5 < float(middle.max()) < 2.56 * 1.4


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_pixelate_is_pillows_box(side: int) -> None:
    x = natural(2, side, 1)
    for severity, c in zip(SEVERITIES, CORRUPTIONS["pixelate"][1], strict=True):
        for before, after in zip(x[:, 0], corrupt(x, "pixelate", severity, [0, 1])[:, 0], strict=True):
            small = Image.fromarray(before.numpy()).resize((int(side * c),) * 2, Image.Resampling.BOX)
            expected = np.asarray(small.resize((side, side), Image.Resampling.BOX))
            np.testing.assert_allclose(after, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels: int) -> None:
    x = (255 * natural(3, 32, channels)).round() / 255
    for severity, quality in zip(SEVERITIES, CORRUPTIONS["jpeg_compression"][1], strict=True):
        found = corrupt(x, "jpeg_compression", severity, [0, 1, 2])
        for before, after in zip(x, found, strict=True):
            pixels = (255 * before).byte().permute(1, 2, 0).squeeze(2).numpy()
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality)
            decoded = np.asarray(Image.open(file)).reshape(32, 32, channels) / 255
            np.testing.assert_allclose(after.permute(1, 2, 0), decoded, atol=1e-6)
    two = corrupt(x[:, :1].repeat(1, 2, 1, 1), "jpeg_compression", 3, [0, 1, 2])  # as two gray images
    assert torch.equal(two[:, 0], two[:, 1])
    assert torch.equal(two[:, :1], corrupt(x[:, :1], "jpeg_compression", 3, [0, 1, 2]))


def test_jpeg_keeps_few_multiples_of_its_quantization_table() -> None:
    """The first entry of the standard's luminance table is 16, which quality 40 scales to 20."""
    x = 0.5 + 0.5 * (natural(4, 32, 1) - 0.5)  # away from black and white, where decoding is cut off
    y = 255 * corrupt(x, "jpeg_compression", 5, range(4)).double().numpy()[:, 0] - 128
    blocks = y.reshape(4, 4, 8, 4, 8).swapaxes(2, 3)
    constant = scipy.fft.dctn(blocks, axes=(-2, -1), norm="ortho")[..., 0, 0]
    assert np.abs(constant / 20 - np.round(constant / 20)).max() < 0.15  # rounding to 8 bits moves it by up to 4


def image_test_set(count: int) -> Data:
    return load("digits", root=Path(), device=torch.device("cpu"), test=count)


def answers(columns: Columns) -> dict[str, Tensor]:
    return {name: values for name, values in columns.items() if name.startswith(("clean", "corr"))}


def test_columns_are_the_predictions_on_corrupted_images() -> None:
    _, _, x, y = digits()
    x, y = x[:40], y[:40]
    model, told = Classifier(fit(mlp())), list[tuple[int, int]]()
    attack = Corruption(NO_THREAT, types=["fog", "shot_noise"], severities=[5, 2], seed=3)
    context = Context(9, lambda done, total, note: told.append((done, total)), first=100)
    found = attack.evaluate(model, x, y, context).columns
    assert list(found) == ["clean", "correct_fog", "correct_shot_noise", "corruption_accuracy"]
    for name in attack.types:
        for k, severity in enumerate((5, 2)):
            images = corrupt(x, name, severity, [seed(3, name, severity, 100 + place) for place in range(40)])
            assert torch.equal(found[f"correct_{name}"][:, k], model.predict(images) == y)
    both = torch.cat([found["correct_fog"], found["correct_shot_noise"]], 1).double()
    torch.testing.assert_close(found["corruption_accuracy"], both.mean(1))
    assert 0.3 < float(both.mean()) < float(found["clean"].float().mean())
    assert told == [(1, 2), (2, 2)]


def test_all_models_and_training_seeds_see_the_same_images_at_other_places_others() -> None:
    _, _, x, y = digits()
    model = Classifier(fit(mlp()))

    def found(judge: Corruption, context: Context) -> Tensor:
        return torch.cat(
            [v for n, v in judge.evaluate(model, x, y, context).columns.items() if "_" in n and v.dim() == 2]
        )

    attack = Corruption(NO_THREAT, severities=[5])
    assert torch.equal(found(attack, Context(1)), found(attack, Context(2)))
    assert not torch.equal(found(attack, Context(1)), found(attack, Context(1, first=1)))
    assert not torch.equal(found(attack, Context(1)), found(replace(attack, seed=1), Context(1)))


@pytest.mark.parametrize("noisy", [False, True])
def test_blocks_shards_and_kills_change_nothing(noisy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stochastic model, the noise of a block is drawn together: whole blocks are as they were."""
    net = fit(mlp())
    model = Smoothed(net, 0.3, n_vote=20) if noisy else Classifier(net)
    data = image_test_set(40)
    what: dict[str, Any] = {
        "attack": {"name": "corruption", "set": {"severities": [3, 5]}},
        "threat": None, "n": 40, "seed": 0,
    }  # fmt: skip
    job = toy_job("evaluate", what)
    monkeypatch.setattr(Corruption, "block", 10)
    whole, images, metrics = evaluate(job, model, data, lambda values: None)
    assert images is None
    assert metrics.metric == "corruption_accuracy"
    assert whole["correct_fog"].shape == (40, 2)
    parts = [
        evaluate(toy_job("shard", {**what, "images": list(of)}, ("0" * 12,)), model, data, lambda values: None)[0]
        for of in ((0, 20), (20, 40))
    ]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)
    write, seen = BlockCache.write, 0

    class KilledError(Exception):
        pass

    def bomb(cache: BlockCache, *args: Any) -> None:
        nonlocal seen
        seen += 1
        write(cache, *args)
        if seen in (5, 16, 20):  # within the first block, after it, within the second
            raise KilledError

    monkeypatch.setattr(BlockCache, "write", bomb)
    for _ in range(3):
        with pytest.raises(KilledError):
            evaluate(job, model, data, lambda values: None, BlockCache(tmp_path, "me"))
    resumed, _, _ = evaluate(job, model, data, lambda values: None, BlockCache(tmp_path, "me"))
    assert seen == 4 * 16  # 15 types and the block, each once
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], values) for name, values in whole.items())
    if not noisy:
        monkeypatch.setattr(Corruption, "block", 40)
        once, _, _ = evaluate(job, model, data, lambda values: None)
        assert all(torch.equal(once[name], values) for name, values in whole.items())


class _Deployed(Smoothed):
    """Notes how often it was asked for its deployed prediction."""

    asked = 0

    def predict(self, x: Tensor) -> Tensor:
        self.asked += 1
        return super().predict(x)


def test_a_stochastic_model_answers_by_its_deployed_rule_and_nothing_is_left_behind() -> None:
    _, _, x, y = digits()
    x, y = x[:30], y[:30]
    model = _Deployed(fit(mlp()), 0.4, n_vote=20)
    model.train()
    state = torch.get_rng_state()
    attack = Corruption(NO_THREAT, types=["contrast", "snow"], severities=[1, 5])
    one, other, third = (attack.evaluate(model, x, y, Context(k)).columns for k in (1, 1, 2))
    assert model.asked == 3 * 5
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    # the vote of so much noise abstains, which is an error: less accurate than the net without noise
    plain = attack.evaluate(Classifier(model.net), x, y, Context(1)).columns["corruption_accuracy"]
    assert float(one["corruption_accuracy"].mean()) < float(plain.mean())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"types": []}, "types is"), ({"severities": []}, "severities is"),
        ({"severities": [1, 1]}, "severities is"), ({"types": ["fog", "fog"]}, "types is"),
        ({"severities": [6]}, "less than or equal to 5"), ({"severities": [0]}, "greater than or equal to 1"),
        ({"types": ["mist"]}, "Input should be 'gaussian_noise'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plugins.make("attacks", PluginChoice("corruption", settings), None)


@pytest.mark.parametrize("setting", ["severities=[6]", "types=[mist]", "severities=[]"])
def test_the_command_line_refuses_them_in_one_line(bench: Bench, setting: str) -> None:
    words = ("plan", "--dataset", "digits", "--defense", "standard", "--attack", "corruption", "--eps", "0.1")
    outcome = bench(*words, "--check", "--set", f"corruption.{setting}")
    assert outcome.code == 2
    assert setting.partition("=")[0] in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_run_has_a_column_of_its_own_and_the_worst_case_is_without_it(bench: Bench) -> None:
    words = tiny("--eps", "0.1", defense="standard", attack="clean,fgsm,corruption")
    outcome = bench(*words, "--set", "corruption.severities=[1,5]", "--executor", "debug", "--results-dir", "results")
    assert outcome.code == 0, outcome.err
    assert "corruption_accuracy" not in outcome.out  # said once, in the table
    store = Store(Path("results"))
    assert "under corruption (severities=[1, 5])" in matrix(store, store.keys()).header
    (key,) = (k for k, j in store.jobs().items() if j.kind == "evaluate" and j.attack.name == "corruption")
    samples = store.samples(key)
    assert samples["correct_frost"].shape == (16, 2)
    assert samples["corruption_accuracy"].mean() == pytest.approx(
        np.mean([samples[f"correct_{name}"] for name in CORRUPTIONS])
    )
    alone = bench(*tiny("--eps", "0.1", defense="standard", attack="corruption"), "--executor", "debug")
    assert alone.code == 0, alone.err
    assert "standard: corruption: mean corruption_accuracy" in alone.out  # no row to have the column


def test_a_model_from_a_file_is_evaluated(bench: Bench) -> None:
    Path("net.py").write_text(
        "import torch\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    words = ("eval", "net.py:model", "--dataset", "digits", "--attack", "corruption", "--n", 8, "--device", "cpu")
    outcome = bench(*words, "--set", "corruption.severities=[5]", "--results-dir", "results", "--checks", "off")
    assert outcome.code == 0, outcome.err
    assert "corruption (severities=[5]): mean corruption_accuracy" in outcome.out


def test_a_noisy_net_is_judged_by_all_its_draws() -> None:
    """A net whose own noise is large answers differently each time; here once for every type and severity."""
    _, _, x, y = digits()
    attack = Corruption(NO_THREAT, types=["brightness"], severities=[1])
    noisy: nn.Module = NoisyInput(fit(mlp()), 1.0)
    one, two = (attack.evaluate(Classifier(noisy), x, y, Context(k)).columns for k in (1, 2))
    assert not torch.equal(one["correct_brightness"], two["correct_brightness"])
    assert to_float(torch.zeros(1, dtype=torch.uint8)).item() == 0
    assert isinstance(image_test_set(4).test, Images)
