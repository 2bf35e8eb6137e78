"""What every file of attacks/ and defenses/ owes the harness; a new file is tested with no edit here."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import contract, plugins
from bench.contract.evaluation import supported_cases
from bench.contract.toy import threat, toy_model
from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier, keep_buffers
from bench.core.defense import Batch, Defense, Losses
from bench.planning import catalog

ROOT = Path(__file__).resolve().parents[2]


def _names(folder: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_"))


def _failed(results: list[contract.Result]) -> list[str]:
    return [f"{result.name}: {result.detail}" for result in results if not result.ok]


@pytest.mark.parametrize("name", _names("defenses"))
def test_every_defense_fulfills_the_contract(name: str) -> None:
    assert _failed(contract.check("defenses", name)) == []


@pytest.mark.parametrize("name", _names("attacks"))
def test_every_attack_fulfills_the_contract(name: str) -> None:
    if name in ("torchattacks", "advlib"):
        try:
            plugins.load("attacks", name)(threat("Linf"))
        except ImportError as missing:
            pytest.skip(str(missing))
    assert _failed(contract.check("attacks", name)) == []


@pytest.mark.parametrize("kind", ["defenses", "attacks"])
def test_the_catalog_sees_the_same_files(kind: catalog.Kind) -> None:
    assert set(_names(kind)) <= set(catalog.names(kind))


class _LeavesBatchNormMoved(Defense):
    """Attacks in train mode without saying so."""

    uses_threat = False

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        net(batch.x)
        return batch.x

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(adv), batch.y)}


class _LeavesTheBall(_LeavesBatchNormMoved):
    uses_threat = True

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        return (batch.x + 2 * self.threat.radius).clamp(0, 1)


class _FreezesTheHead(_LeavesBatchNormMoved):
    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        return batch.x

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        net.head.requires_grad_(False)
        return {"ce": F.cross_entropy(net(adv), batch.y)}


class _ForgetsTheBias(_FreezesTheHead):
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(adv) - net.head.bias, batch.y)}


class _SaysItSmoothsLabels(_FreezesTheHead):
    supports_recipe = ("label_smoothing",)


class _SmoothsLabelsInSilence(_FreezesTheHead):
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}


class _Explodes(_FreezesTheHead):
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(adv) / 0, batch.y)}


class _DrawsOnItsOwn(_FreezesTheHead):
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        generator = torch.Generator()
        generator.seed()
        return {"ce": F.cross_entropy(net(adv + 0.1 * torch.rand(adv.shape, generator=generator)), batch.y)}


class _HidesItsNoise(_FreezesTheHead):
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(adv), batch.y)}

    def deploy(self, net: nn.Module) -> Classifier:
        return Classifier(nn.Sequential(net, nn.Dropout().train()))


class _ForgetsItsCount(_FreezesTheHead):
    """Counts its steps in an attribute that a kill takes away."""

    steps = 0

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        self.steps += 1
        return {"ce": F.cross_entropy(net(adv), batch.y) * (1 + self.steps)}


class _LogsWhatItForgets(_HidesItsNoise):
    """Trains the same, but logs another number."""

    steps = 0

    def step(self, net: nn.Module, updater: Any, batch: Batch) -> Losses:
        self.steps += 1
        return super().step(net, updater, batch)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        return {"steps": torch.tensor(float(self.steps))}


class _LeavesGradients(_HidesItsNoise):
    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        with keep_buffers(net):
            net(batch.x).sum().backward()
        return batch.x


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_LeavesBatchNormMoved, "the inner maximization changes no weight, gradient or statistic"),
        (_LeavesGradients, "the inner maximization changes no weight, gradient or statistic"),
        (_LeavesTheBall, "adversarial images are inside ball and pixel box"),
        (_FreezesTheHead, "a step restores training mode and gradient flags"),
        (_ForgetsTheBias, "terms are finite scalars and every parameter learns"),
        (_SaysItSmoothsLabels, "supports exactly the recipe parts it declares"),
        (_SmoothsLabelsInSilence, "supports exactly the recipe parts it declares"),
        (_Explodes, "terms are finite scalars and every parameter learns"),
        (_DrawsOnItsOwn, "same seed, same bits"),
        (_HidesItsNoise, "deploys the predictor that it declares"),
        (_ForgetsItsCount, "continues bit for bit from a restored state"),
        (_LogsWhatItForgets, "continues bit for bit from a restored state"),
    ],
)
def test_a_broken_defense_is_found(broken: type[Defense], check: str) -> None:
    assert check in [result.name for result in contract.check_defense(broken) if not result.ok]


class _Touching(Attack):
    """Leaves the model in train mode, a gradient on it, and draws where it should not."""

    norms = ("Linf",)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
        return x, {}


class _Overshooting(_Touching):
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        return (x + 2 * self.threat.radius).clamp(0, 1), {}


class _Unseeded(_Touching):
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        generator = torch.Generator()
        generator.seed()
        return self.threat.project_to_image(x, x + torch.rand(x.shape, generator=generator) - 0.5), {}


class _Training(_Touching):
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        model.train()
        model(x)  # BatchNorm's running statistics move
        return x, {}


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_Touching, "leaves the model unchanged"),
        (_Training, "leaves the model unchanged"),
        (_Overshooting, "runs on a batch"),
        (_Unseeded, "same seed, same bits"),
    ],
)
def test_a_broken_attack_is_found(broken: type[Attack], check: str) -> None:
    assert f"{check} (Linf, deterministic)" in [r.name for r in contract.check_attack(broken) if not r.ok]


@pytest.mark.parametrize("name", ["autoattack", "certify", "pgd", "square"])
def test_a_random_attack_draws_by_the_seed_of_its_block(name: str) -> None:
    case = next(iter(supported_cases(plugins.load("attacks", name))))
    model = toy_model(case.kind)
    one, other = (case.attack().evaluate(model, case.x, case.y, Context(seed)) for seed in (7, 8))
    if one.x_adv is not None and other.x_adv is not None:
        assert not torch.equal(one.x_adv, other.x_adv)
    else:
        assert not torch.equal(one.columns["radius"], other.columns["radius"])
