"""What stops and marks a run, and what chooses an epoch: on nets and sequences made by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.threat import Threat
from bench.data.images import Data, Images, load
from bench.training.best_epoch import BestEpoch, validation_accuracy
from bench.training.divergence import CollapseDetector, not_finite


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits", root=Path("none"), device=torch.device("cpu"), test=8)


class Reader(nn.Module):
    """Answers by a table of the images it knows; `wrong` of them with the next class."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.x, self.y = data.train.x.float().flatten(1) / 255, data.train.y
        self.constant: int | None = None
        self.wrong = 0.0
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        y = self.y[torch.cdist(x.flatten(1), self.x).argmin(1)]
        if self.constant is not None:
            y = torch.full_like(y, self.constant)
        moved = torch.arange(len(y)) < self.wrong * len(y)
        return nn.functional.one_hot((y + moved) % 10, 10).float()


def test_a_net_that_predicts_one_class_is_stopped_after_three_epochs(digits: Data) -> None:
    net = Reader(digits).train()
    model, detector = Classifier(net), CollapseDetector(digits, 0)
    before, generator = net.norm.running_mean.clone(), torch.get_rng_state()
    assert detector.collapse(model, 1, 9) is None
    net.constant = 3
    assert [detector.collapse(model, epoch, 9) for epoch in (2, 3)] == [None, None]
    found = detector.collapse(model, 4, 9)
    assert "the net had learned, but predicted one class for all of 256 training images" in str(found)
    assert "epochs 2 to 4 of 9" in str(found)
    assert torch.equal(net.norm.running_mean, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.training


def test_a_net_that_has_not_learned_yet_is_not_stopped(digits: Data) -> None:
    """Adversarial training may stay at one answer for epochs and then take off."""
    net = Reader(digits)
    model, detector = Classifier(net), CollapseDetector(digits, 0)
    net.constant = 3
    assert [detector.collapse(model, epoch, 99) for epoch in range(1, 9)] == [None] * 8
    net.constant = None
    assert detector.collapse(model, 9, 99) is None
    net.constant = 3
    assert [detector.collapse(model, epoch, 99) for epoch in (10, 11)] == [None] * 2
    net.constant = None  # it comes back in time
    assert detector.collapse(model, 12, 99) is None


def test_a_trained_net_at_chance_is_not_deployed(digits: Data) -> None:
    net = Reader(digits)
    model, detector = Classifier(net), CollapseDetector(digits, 0)
    assert detector.chance_level(model, 1000) is None
    net.wrong = 0.8  # a fifth right is far from good, but no collapse
    assert detector.chance_level(model, 1000) is None
    net.wrong = 0.95
    assert "correct on 12 of 256 training images; their most frequent class" in str(detector.chance_level(model, 1000))
    net.wrong, net.constant = 0.0, int(detector._y.mode().values)
    assert f"correct on {detector.majority} of 256 training images, with one class for" in str(
        detector.chance_level(model, 1000)
    )
    assert detector.chance_level(model, 99) is None  # too early to tell


def test_a_noisy_net_has_not_collapsed(digits: Data) -> None:
    detector = CollapseDetector(digits, 0)
    assert detector.chance_level(Smoothed(Reader(digits), sigma=0.3), 1000) is None


def test_a_loss_or_weights_that_are_not_finite_stop_a_training() -> None:
    net = nn.Linear(2, 2)
    assert not_finite({"ce": 1.0}, net, 1, 2) is None
    assert str(not_finite({"ce": float("inf")}, net, 1, 2)) == "loss is not finite in epoch 1 of 2: {'ce': inf}"
    with torch.no_grad():
        net.bias[0] = float("nan")
    assert str(not_finite({"ce": 1.0}, net, 2, 2)) == "weights are not finite after epoch 2 of 2: {'ce': 1.0}"


def test_the_best_epoch_is_the_first_maximum_and_a_sudden_drop_is_recorded() -> None:
    choice, weight = BestEpoch(), torch.zeros(1)
    for epoch, accuracy in enumerate([0.3, 0.5, 0.5, 0.31, 0.29, 0.1], start=1):
        weight.fill_(epoch)
        choice.offer(epoch, accuracy, {"w": weight})
    assert choice.state["w"].item() == 2
    assert choice.metrics() == {
        "best_epoch": 2,
        "best_validation": 0.5,
        "last_validation": 0.1,
        "sudden_drop_epoch": 5,
    }


class Margin(nn.Module):
    """Two classes; the margin of class 1 is the sum of the pixels minus 2."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).sum(1) - 2
        return torch.stack([-z / 2, z / 2], 1)


def test_validation_accuracy_equals_the_closed_form_of_a_linear_net() -> None:
    torch.manual_seed(0)
    x = (torch.rand(600, 1, 2, 2) * 255).to(torch.uint8)
    exact = x.double() / 255
    margin = exact.flatten(1).sum(1) - 2
    y = (margin > 0).long()
    y[:60] = 1 - y[:60]  # a tenth has the wrong label
    images, model, eps = Images(x, y), Classifier(Margin()).train(), 0.1
    generator = torch.get_rng_state()
    clean = validation_accuracy(model, images, None, 0)
    robust = validation_accuracy(model, images, Threat("Linf", Epsilon(eps)), 0)
    assert clean == 540 / 600
    toward = torch.where(y[:, None] == 1, exact.flatten(1).sub(eps).clamp(0), exact.flatten(1).add(eps).clamp(max=1))
    worst = toward.sum(1) - 2
    assert robust == pytest.approx(((worst > 0).long() == y).double().mean().item(), abs=1e-9)
    assert robust < clean - 0.05
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
