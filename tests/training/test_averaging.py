"""Averages of weights against closed forms in float64, and BatchNorm statistics against sums by hand."""

import pytest
import torch
from torch import nn

from bench.contract.toy import Toy
from bench.training.averaging import Average, recalibrate


def walk(model: nn.Linear, average: Average, values: list[float]) -> list[float]:
    """The average's first weight after each update that puts all weights at a value."""
    found = []
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
        found.append(float(average._mean[0][0, 0]))
    return found


def point(value: float = 1.0) -> nn.Linear:
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.fill_(value)
    return model


@pytest.mark.parametrize("decay", [0.995, 0.15])
def test_ema_of_three_steps_equals_the_closed_form(decay: float) -> None:
    model = point(1.0)
    t = [min(decay, (1 + n) / (10 + n)) for n in range(3)]
    first = t[0] * 1.0 + (1 - t[0]) * 2.0
    second = t[1] * first + (1 - t[1]) * -4.0
    third = t[2] * second + (1 - t[2]) * 8.0
    average = Average(model, "ema", total=3, decay=decay)
    assert walk(model, average, [2.0, -4.0, 8.0]) == pytest.approx([first, second, third], abs=1e-14)
    assert average.active == 3
    closed = t[2] * t[1] * t[0] + t[2] * t[1] * (1 - t[0]) * 2 + t[2] * (1 - t[1]) * -4 + (1 - t[2]) * 8
    assert third == pytest.approx(closed, abs=1e-14)


def test_ema_is_a_copy_in_the_first_fortieth_of_training() -> None:
    model = point()
    average = Average(model, "ema", total=80)
    assert walk(model, average, [2.0, 3.0, 13.0]) == pytest.approx([2.0, 3.0, 0.1 * 3 + 0.9 * 13], abs=1e-14)
    assert average.active == 1


def test_swa_is_the_equal_average_of_the_epochs_after_its_start() -> None:
    model, found = point(), []
    average = Average(model, "swa", total=100, start=0.5)
    for epoch, value in enumerate([4.0, 6.0, 8.0, 10.0, 15.0, 1.0], start=1):
        walk(model, average, [value])  # updates do not count
        average.end_epoch(epoch / 6)
        found.append(float(average._mean[0][0, 0]))
    assert found == pytest.approx([4, 6, 8, 10, 12.5, 26 / 3], abs=1e-14)
    assert average.active == 3


def test_swa_restarts_from_restored_weights() -> None:
    model = point()
    average = Average(model, "swa", total=10, start=0.0)
    for value in (2.0, 4.0):
        walk(model, average, [value])
        average.end_epoch(0.5)
    walk(model, average, [7.0])
    average.restart()
    average.end_epoch(1.0)
    average.install()
    assert (model.weight[0, 0].item(), average.active) == (7.0, 1)


def test_installed_restores_parameters_and_buffers() -> None:
    model = Toy().train()
    average = Average(model, "ema", total=1)
    initial = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.installed(model):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), initial, strict=True))
        recalibrate(model, [torch.rand(4, 1, 8, 8)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recalibrated_statistics_are_averages_over_batches_weighted_by_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double()
    model[0].eval()
    model[0].momentum = 0.3
    model(torch.rand(5, 2, 3, 3).double())  # what is to be forgotten
    batches = [torch.rand(n, 2, 3, 3).double() * n for n in (4, 4, 2)]
    modes = [m.training for m in model.modules()]
    recalibrate(model, batches)
    mean = sum(len(x) * x.mean((0, 2, 3)) for x in batches) / 10
    var = sum(len(x) * x.transpose(0, 1).flatten(1).var(1) for x in batches) / 10
    torch.testing.assert_close(model[0].running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, var, rtol=0, atol=1e-12)
    scaled = [(x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), False, True) + 1e-5).sqrt() for x in batches]
    seen = [model[2](z) for z in scaled]
    second = sum(len(z) * z.mean((0, 2, 3)) for z in seen) / 10
    torch.testing.assert_close(model[3].running_mean, second.detach(), rtol=0, atol=1e-12)
    assert [m.training for m in model.modules()] == modes
    assert (model[0].momentum, model[3].momentum) == (0.3, 0.1)


def test_a_last_batch_of_one_image_is_skipped() -> None:
    """At one position per channel it has no variance, and BatchNorm refuses it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 8), nn.BatchNorm2d(2))
    batches = list(torch.rand(9, 1, 8, 8).split(4))
    recalibrate(model, batches)
    found = model[1].running_mean.clone()
    recalibrate(model, batches[:2])
    torch.testing.assert_close(found, model[1].running_mean)
