"""A memory of the test set is unsound, honest nets pass, and few images condemn nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fakes import Nets, Stored
from honest_nets import Split
from torch import nn

from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.soundness.audit import Audit, Unseen
from bench.soundness.catalog import CHECKS, JUDGED, LOST_ACCURACY, SHIFT, TURN
from bench.soundness.checks import Finding
from bench.soundness.memorization import _fall, move, robust_elsewhere, unseen

C30 = CHECKS["C30"]


def judged(model: nn.Module, digits: tuple[Split, Split], other: Split | None = None, n: int = 200) -> list[Finding]:
    train, test = other or digits[0], digits[1]
    state = Audit(
        Classifier(model.eval()), test.x[:n], test.y[:n], [Threat("Linf", Epsilon("0.1"))], "quick", 0, None,
        Unseen(train.x[:n], train.y[:n], 0),
    )  # fmt: skip
    return C30.findings(robust_elsewhere, state)


def unsound(findings: list[Finding]) -> list[str]:
    """What lower numbers were found, by the beginning of their notes."""
    return [f.note.partition(" images")[0] for f in findings if f.level == "U"]


# what it is made of -> the images that disclose it
MEMORIES: dict[str, tuple[Callable[[Nets, Split, Split], nn.Module], list[str]]] = {
    "nearest neighbor": (lambda nets, train, test: Stored(test), ["robust share of training"]),
    "before a weak net": (
        lambda nets, train, test: Stored(test, nets["standard"], 0.101),
        ["robust share of training", "robust share of moved test"],
    ),
    "of both, before a weak net": (
        lambda nets, train, test: Stored(
            Split(torch.cat([train.x, test.x]), torch.cat([train.y, test.y])), nets["standard"], 0.101
        ),
        ["robust share of moved test"],
    ),
    "before a constant": (
        lambda nets, train, test: Stored(test, Constant(), 0.101),
        ["accuracy on training", "accuracy on moved test"],
    ),
}


class Constant(nn.Module):
    """Class 0 for every image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x.flatten(1)[:, :10] + torch.eye(10)[0]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_is_disclosed_by_images_that_it_cannot_hold(
    kind: str, nets: Nets, digits: tuple[Split, Split]
) -> None:
    made, disclosed_by = MEMORIES[kind]
    assert set(disclosed_by) <= set(unsound(judged(made(nets, *digits), digits)))


@pytest.mark.parametrize("kind", ["standard", "adversarial", "batchnorm"])
def test_honest_nets_pass_also_with_wrong_labels_in_the_training_set(
    kind: str, nets: Nets, digits: tuple[Split, Split]
) -> None:
    train = digits[0]
    wrong = torch.where(torch.arange(len(train.y)) % 4 == 0, (train.y + 1) % 10, train.y)
    for other in (train, Split(train.x, wrong)):
        found = judged(nets[kind], digits, other)
        assert {finding.level for finding in found} == {"ok"}
        assert len(found) == 4
    assert any("at eps 0.05" in finding.note for finding in found)  # half of the budget


@pytest.mark.parametrize("n", [1, 3, 8, 32])
def test_one_image_condemns_nobody(n: int) -> None:
    here = torch.ones(n, dtype=torch.bool)
    there = here & (torch.arange(n) > 0)
    assert {_fall(C30, "share", here, there, paired=paired).level for paired in (True, False)} == {"ok"}


@pytest.mark.parametrize(
    ("here", "there", "level"), [(200, 190, "ok"), (200, 175, "ok"), (200, 160, "U"), (160, 200, "ok"), (100, 60, "U")]
)
def test_only_a_lower_share_beyond_the_limit_and_its_interval_counts(here: int, there: int, level: str) -> None:
    first, second = (torch.arange(200) < hits for hits in (here, there))
    for paired in (True, False):
        found = _fall(C30, "share", first, second, paired=paired)
        assert (found.level, found.value) == (level, pytest.approx((here - there) / 200))


def test_training_images_are_other_images_as_many_as_there_are() -> None:
    here = torch.arange(200) < 180
    found = _fall(C30, "share", here, torch.arange(50) < 30, paired=False)
    assert (found.level, found.value) == ("U", pytest.approx(0.9 - 0.6))
    few = _fall(C30, "share", here, torch.arange(5) < 3, paired=False)  # the same share of five images proves nothing
    assert (few.level, few.value) == ("ok", pytest.approx(0.9 - 0.6))
    assert "not beyond the limit by the 95 % interval" in few.note
    assert _fall(C30, "share", here, here[:0], paired=False).level == "not checked"


def test_the_same_images_are_compared_one_by_one_and_others_by_their_shares() -> None:
    here, there = torch.arange(100) < 60, torch.arange(100) < 40
    assert [_fall(C30, "share", here, there, paired=paired).level for paired in (True, False)] == ["U", "ok"]


def test_what_bench_trained_is_not_judged_and_a_net_that_is_always_wrong_cannot_be(
    nets: Nets, digits: tuple[Split, Split]
) -> None:
    test = digits[1]
    state = Audit(
        Classifier(nets["standard"]), test.x, test.y, [Threat("Linf", Epsilon("0.1"))], "quick", 0, None
    )  # fmt: skip
    assert [finding.level for finding in C30.findings(robust_elsewhere, state)] == ["n/a"]
    wrong = replace(state, y=(nets["standard"](test.x).argmax(1) + 1) % 10, unseen=Unseen(*digits[0], 0))
    assert [finding.level for finding in C30.findings(robust_elsewhere, wrong)] == ["not checked"]


def test_images_are_moved_by_the_stated_distance_and_angle() -> None:
    x = torch.zeros(64, 1, 57, 57)
    x[:, :, 28, 28] = x[:, :, 28, 48] = 1.0  # the center, and a point 20 pixels from it
    moved, side = move(x, 3), 57
    assert float(moved.min()) >= 0.0
    assert float(moved.max()) <= 1.0
    rows, columns = torch.meshgrid(torch.arange(57.0), torch.arange(57.0), indexing="ij")

    def mean(part: slice) -> torch.Tensor:
        mass = moved[:, 0, :, part]
        at = [(mass * where[:, part]).sum((1, 2)) / mass.sum((1, 2)) for where in (rows, columns)]
        return torch.stack(at, dim=1)

    center, point = mean(slice(15, 38)), mean(slice(38, 57))
    assert (center - 28).norm(dim=1) == pytest.approx(side * SHIFT, abs=0.15)
    assert bool((center.std(0) > 1).all())  # in all directions
    angle = torch.rad2deg(torch.atan2(*(point - center).T)).numpy()
    assert abs(angle).max() <= TURN + 0.5
    assert abs(angle).min() >= TURN / 2 - 0.5
    assert angle.min() < 0 < angle.max()
    assert torch.equal(moved, move(x, 3))
    assert not torch.equal(moved, move(x, 4))


def test_the_key_of_the_audit_draws_training_images() -> None:
    x = torch.arange(240, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    y = torch.arange(240)
    one, same, other = (unseen(x, y, "quick", key) for key in ("a", "a", "b"))
    assert len(one.x) == JUDGED["quick"] < len(x)
    assert len(set(one.y.tolist())) == len(one.y)
    assert torch.allclose(255 * one.x[:, 0, 0, 0], one.y.float())
    assert torch.equal(one.y, same.y)
    assert one.seed == same.seed != other.seed
    assert not torch.equal(one.y, other.y)


def test_accuracy_has_the_wide_limit() -> None:
    assert str(round(100 * LOST_ACCURACY)) in C30.threshold
