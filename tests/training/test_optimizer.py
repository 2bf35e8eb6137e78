"""Schedules, clipping, decay groups, loss scaling and 16-bit passes, each against a value written out by hand."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.contract.toy import Toy
from bench.core.defense import Batch, Defense
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.training.optimizer import SCHEDULES, Optimization, autocast_forward, build_updater
from bench.training.recipe import Recipe
from defenses.awp import AWP
from defenses.free_at import FreeAT
from defenses.standard import Standard

NONE, THREAT = Threat("Linf", Epsilon(0)), Threat("Linf", Epsilon("0.05"))


PLAIN = {
    **{"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"},
    **{"epochs": 1, "batch_size": 8, "augment": False},
}


def made(model: nn.Module, steps: int = 4, defense: Defense | None = None, **changed: Any) -> Optimization:
    return build_updater(defense or Standard(NONE), model, Recipe.model_validate({**PLAIN, **changed}), steps)


def line() -> nn.Linear:
    """Weights (2, 3), no bias."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 3.0]]))
    return model


def loss(model: nn.Linear, *slope: float) -> dict[str, Tensor]:
    """A loss whose gradient in the weights is `slope`."""
    return {"ce": (model.weight * torch.tensor([slope])).sum()}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("step", [1, 1, 0.1, 0.01, 0.01]),
        ("cosine", [1, 0.8535533906, 0.5, 0.1464466094, 0]),
        ("one_cycle", [1e-3, 0.25 / 0.3, 0.5 / 0.7, 0.25 / 0.7, 1e-3]),
        ("cyclic", [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedules_at_quarters_of_training(schedule: str, expected: list[float]) -> None:
    assert set(SCHEDULES) == {"constant", "step", "cosine", "one_cycle", "cyclic"}
    model = line()
    updater, rates = made(model, schedule=schedule, lr=2.0), []
    for _ in range(4):
        rates.append(updater.optimizer.param_groups[0]["lr"] / 2)
        updater.descend(loss(model, 0, 0))
    rates.append(updater.optimizer.param_groups[0]["lr"] / 2)
    assert rates == pytest.approx(expected, abs=1e-9)


def test_the_rate_equals_that_of_torch_s_own_scheduler_bit_for_bit() -> None:
    model, twin = line(), line()
    updater = made(model, steps=7, schedule="cosine", lr=0.1)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: SCHEDULES["cosine"](min(step / 7, 1.0)))
    for _ in range(7):
        assert updater.optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        updater.descend(loss(model, 1, 2))
        other.step()
        scheduler.step()


def test_a_warm_up_of_the_rate_multiplies_the_schedule() -> None:
    model = line()
    updater, rates = made(model, lr_warmup=0.5, schedule="step"), []
    for _ in range(4):
        rates.append(updater.optimizer.param_groups[0]["lr"])
        updater.descend(loss(model, 0, 0))
    assert rates == pytest.approx([0, 0.5, 0.1, 0.01])


def test_clipping_scales_a_long_gradient_only_and_counts() -> None:
    model = line()
    updater = made(model, grad_clip=1.0)
    updater.descend(loss(model, 3, 4))  # length 5
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2 - 0.6, 3 - 0.8]]), rtol=0, atol=1e-5)
    updater.descend(loss(model, 0.3, 0.4))  # length 0.5
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.1, 1.8]]), rtol=0, atol=1e-5)
    assert (updater.clipped, updater.steps) == (1, 2)
    assert made(line()).clipped == 0


def norms() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


@pytest.mark.parametrize("where", ["all", "weights"])
def test_weight_decay_shrinks_the_selected_parameters(where: str) -> None:
    model = norms()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updater = made(model, weight_decay=0.5, lr=0.1, weight_decay_on=where)
    updater.descend({"zero": torch.stack([p.sum() for p in model.parameters()]).sum() * 0})
    weights = {"0.weight", "4.weight"}
    for name, parameter in model.named_parameters():
        factor = 0.95 if where == "all" or name in weights else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


@dataclass
class OwnDecay(Standard):
    """A bias with a decay and rate of its own."""

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        own = net[4].bias  # type: ignore[index]
        rest = [p for p in net.parameters() if p is not own]
        return [{"params": rest}, {"params": [own], "weight_decay": 0.2, "lr_scale": 0.5}]


def test_a_group_with_a_decay_of_its_own_keeps_it() -> None:
    model = norms()
    before = model[4].bias.detach().clone()
    updater = made(model, defense=OwnDecay(NONE), weight_decay=0.5, lr=0.1, weight_decay_on="weights")
    assert [group["weight_decay"] for group in updater.optimizer.param_groups] == [0.5, 0.0, 0.2]
    assert [group["lr"] for group in updater.optimizer.param_groups] == [0.1, 0.1, 0.05]
    assert sum(len(group["params"]) for group in updater.optimizer.param_groups) == len(list(model.parameters()))
    updater.descend({"zero": torch.stack([p.sum() for p in model.parameters()]).sum() * 0})
    torch.testing.assert_close(model[4].bias.detach(), (1 - 0.05 * 0.2) * before)


def test_a_step_whose_scaled_gradient_overflows_is_skipped_and_counted() -> None:
    model = line()
    updater = made(model, precision="fp16", grad_clip=1.0)
    updater.descend(loss(model, 1e35, 1e35))  # times the scale of 65536: infinite
    assert torch.equal(model.weight.detach(), torch.tensor([[2.0, 3.0]]))
    updater.descend(loss(model, 0.25, 0.5))
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.75, 2.5]]))
    assert (updater.skipped, updater.clipped, updater.steps) == (1, 0, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_passes_run_in_16_bits_and_all_else_stays_fp32(precision: str) -> None:
    torch.manual_seed(0)
    model, x = Toy().train(), torch.rand(10, 1, 8, 8)
    plain = model(x)
    seen = []
    model.conv.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with autocast_forward(model, precision):
        logits = model(x)
        logits.square().sum().backward()
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float16]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, plain)
    torch.testing.assert_close(logits, plain, rtol=0.05, atol=0.05)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert "forward" not in vars(model)
    assert model(x).dtype == torch.float32
    assert seen[-1] == torch.float32


def test_each_update_reaches_the_average_once_with_unperturbed_weights() -> None:
    for defense, updates in ((FreeAT(THREAT, replays=3), 3), (AWP(THREAT, gamma=0.1, warmup=0.0), 1)):
        model, heard = Toy().train(), list[Tensor]()
        updater = made(model, lr=0.1, defense=defense)
        updater.on_update = lambda model=model, heard=heard: heard.append(model.head.weight.detach().clone())
        y = torch.arange(8) % 5
        defense.step(model, updater, Batch(torch.rand(8, 1, 8, 8), y, y, 1, 0.5))
        updater.flush_to_average()
        updater.flush_to_average()
        assert len(heard) == updates
        assert torch.equal(heard[-1], model.head.weight)
        assert all(not torch.equal(one, other) for one, other in itertools.pairwise(heard))
