"""autoattack_fast against the package on one image at the edge: the share of independent starts that break it.

Verdicts on a few images cannot tell another law from luck; many starts of one image can. The eps of the image is
searched for so that about half of our starts break it; then fresh starts of both sides are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from nets import digits, fit, mlp
from torch import Tensor, nn

from attacks import _square
from attacks._apgd import apgd
from attacks._rows import Found, Rows
from attacks._square import square
from bench.core.classifier import frozen
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat

QUERIES = 600

pytestmark = pytest.mark.slow


def net() -> nn.Module:
    return fit(mlp(depth=3), lambda x: (x + 0.2 * torch.randn_like(x)).clamp(0, 1))


def starts(model: nn.Module, image: int, eps: float, count: int) -> Found:
    """The image `count` times; each has a stream of random numbers of its own."""
    _, _, x, y = digits()
    found = Found(model, x[image].repeat(count, 1, 1, 1), y[image].repeat(count), Threat("Linf", Epsilon(f"{eps:.9f}")))
    found.number = 1
    return found


def share(found: Found) -> float:
    return 1 - float(found.robust.float().mean())


def edge(rate: Callable[[float], float]) -> float:
    """The eps at which about half of the starts succeed: within some thousandths of it none or all do."""
    low, high = 0.0, 0.5
    for _ in range(26):
        middle = (low + high) / 2
        found = rate(middle)
        if 0.25 <= found <= 0.75:
            return middle
        low, high = (middle, high) if found < 0.5 else (low, middle)
    pytest.fail("no eps at which some starts break the image and some do not")


def agree(ours: float, theirs: float, count: int) -> None:
    """Two shares of `count` starts each within 3.3 standard deviations of their difference (1 in 1000 by luck)."""
    mean = (ours + theirs) / 2
    assert abs(ours - theirs) <= 3.3 * math.sqrt(2 * mean * (1 - mean) / count), (ours, theirs)
    assert 0.05 < mean < 0.95


@pytest.mark.parametrize("image", [4])  # of most others all starts or none break it, at any eps
def test_targeted_apgd_breaks_an_image_at_the_edge_as_often(image: int) -> None:
    from pyautoattack.autopgd_base import APGDAttack_targeted

    model, count = net(), 96

    def ours(eps: float, key: int) -> float:
        found = starts(model, image, eps, count)
        rows = Rows(torch.arange(count), torch.zeros(count, dtype=torch.long), target(found))
        apgd(found, rows, key)
        return share(found)

    def target(found: Found) -> Tensor:
        return model(found.x).sort(dim=1)[1][:, -2]

    with frozen(model):
        eps = edge(lambda eps: ours(eps, 0))
        found = starts(model, image, eps, count)
        peer = APGDAttack_targeted(model, eps=found.threat.radius, device="cpu")
        peer.init_hyperparam(found.x)
        peer.y_target = target(found)
        torch.manual_seed(0)
        theirs = 1 - float(peer.attack_single_run(found.x, found.y)[1].float().mean())
        agree(ours(eps, 1), theirs, count)


@pytest.mark.parametrize("image", [1])
def test_square_breaks_an_image_at_the_edge_as_often(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's images share their squares, so that each of its starts is a run of its own."""
    from pyautoattack.square import SquareAttack

    monkeypatch.setattr(_square, "QUERIES", QUERIES)
    model, count = net(), 32

    def ours(eps: float, key: int) -> float:
        found = starts(model, image, eps, count)
        square(found, torch.arange(count), key, 512, lambda done: None)
        return share(found)

    with frozen(model):
        eps = edge(lambda eps: ours(eps, 0))
        found = starts(model, image, eps, 1)
        broken = 0
        for seed in range(count):
            budget = {"eps": found.threat.radius, "n_queries": QUERIES, "resc_schedule": False}
            peer = SquareAttack(model, norm="Linf", seed=seed, device="cpu", **budget)
            with torch.no_grad():
                broken += int(model(peer.perturb(found.x, found.y)).argmax(1) != found.y)
        agree(ours(eps, 1), broken / count, count)
