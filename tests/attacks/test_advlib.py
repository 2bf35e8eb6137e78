"""The adapter of adv-lib: distances against those that are known, and what the package would report as robust."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from nets import digits, fit, mlp
from torch import Tensor, nn

from attacks import advlib
from attacks.advlib import AdvLib
from bench.core.attack import Context, Outcome
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Norm, Threat

try:
    advlib._package()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)
DUAL: dict[Norm, float] = {"Linf": 1, "L2": 2, "L1": float("inf")}
CASES: list[tuple[str, Norm]] = [("fmn", "Linf"), ("fmn", "L2"), ("fmn", "L1"), ("ddn", "L2")]
COUNTING = ("fmn_l0", "sigma_zero")


def run(model: Classifier, x: Tensor, y: Tensor, method: str, norm: Norm, eps: str = "50", steps: int = 100) -> Outcome:
    attack = AdvLib(Threat(norm, Epsilon(eps)), method=method, steps=steps)  # type: ignore[arg-type]
    assert attack.unsupported_reason(model) is None
    return attack.evaluate(model, x, y, Context(0))


def linear(classes: int = 4) -> tuple[Classifier, Tensor, Tensor]:
    """A linear model of small weights, so that the box is far from its boundaries, and images that it gets right."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    x = 0.5 + 0.08 * torch.randn(40, 1, 6, 6)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        return Classifier(net.eval()), x, net(x).argmax(1)


def exact(model: Classifier, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """min over k of (z_y - z_k) / ||w_y - w_k||_dual, the distance of a linear model without a box."""
    weight, z = model.net[1].weight, model(x)
    to = torch.stack([
        torch.stack([(z[i, label] - z[i, k]) / (weight[label] - weight[k]).norm(p=DUAL[norm])
                     for k in range(len(weight)) if k != label]).min()
        for i, label in enumerate(y.tolist())
    ])  # fmt: skip
    return to.detach()


@pytest.mark.parametrize(("method", "norm"), CASES)
def test_the_distance_to_a_linear_boundary(method: str, norm: Norm) -> None:
    model, x, y = linear(2 if method == "ddn" else 4)  # of several classes, its cross-entropy follows a mean
    distance, least = run(model, x, y, method, norm, steps=300).columns["distance"], exact(model, x, y, norm)
    assert distance.isfinite().all()  # of fmn alone only those that rounding moves beyond the boundary
    assert (distance >= least * (1 - 1e-4)).all()
    assert (distance / least).median() < 1.1


@pytest.mark.parametrize("method", COUNTING)
def test_the_number_of_pixels_that_a_linear_model_needs(method: str) -> None:
    model, x, y = linear()
    weight, z, fewest = model.net[1].weight, model(x), torch.full((40,), 36)
    for i, label in enumerate(y.tolist()):
        for k in {0, 1, 2, 3} - {label}:
            gap = weight[k] - weight[label]
            gain = torch.where(gap > 0, gap * (1 - x[i].flatten()), -gap * x[i].flatten()).sort(descending=True).values
            fewest[i] = min(fewest[i], int((gain.cumsum(0) < z[i, label] - z[i, k]).sum()) + 1)
    pixels = run(model, x, y, method, "L1", steps=200).columns["pixels"]
    assert (pixels >= fewest).all()
    assert (pixels == fewest).float().mean() > 0.8


@pytest.mark.parametrize(("method", "norm"), [*CASES, *((method, "L2") for method in COUNTING)])
def test_accuracy_at_eps_is_that_of_the_distances(method: str, norm: Norm) -> None:
    _, _, x, y = digits()
    model = Classifier(fit(mlp()))
    wide = run(model, x[:60], y[:60], method, norm)
    distance, clean = wide.columns["distance"], wide.columns["clean"]
    assert torch.equal(distance.isnan(), ~clean)
    assert not wide.columns["correct"].any()  # at this eps every image of this net has an adversarial one
    torch.testing.assert_close(distance[clean], wide.columns["size"][clean])
    cut = float(distance[clean].median())
    tight = run(model, x[:60], y[:60], method, norm, str(cut * 1.00001))
    torch.testing.assert_close(tight.columns["distance"], distance, equal_nan=True)
    assert torch.equal(tight.columns["correct"], clean & (distance > cut))
    assert tight.x_adv is not None
    assert torch.equal(tight.x_adv[tight.columns["correct"]], x[:60][tight.columns["correct"]])
    assert ("pixels" in wide.columns) == (method in COUNTING)


def test_fmn_alone_ends_at_the_boundary_and_would_report_robust_images() -> None:
    """If a version of the package does not, the second start can go."""
    _, _, x, y = digits()
    model = Classifier(fit(mlp()))
    x, y = x[model.predict(x) == y], y[model.predict(x) == y]
    alone = AdvLib(Threat("L2", Epsilon("50")))._run(model, x, y)
    assert (model.predict(alone) == y).float().mean() > 0.2
    assert not run(model, x, y, "fmn", "L2").columns["correct"].any()


def test_images_of_one_class_have_no_second_start() -> None:
    model, x, y = linear()
    one = y == y[0]
    columns = run(model, x[one], y[one], "fmn", "L2").columns
    assert torch.equal(columns["distance"].isinf(), columns["correct"])


def test_one_value_that_breaks_every_image_is_found() -> None:
    """The package's L0 fails on such a batch."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[1].weight.zero_()[0, 0] = -100
        net[1].bias.copy_(torch.tensor([1.0, 0.0]))
    model, x = Classifier(net), torch.zeros(3, 1, 4, 4)
    y = torch.zeros(3, dtype=torch.long)
    assert run(model, x, y, "fmn_l0", "Linf", "1").columns["pixels"].tolist() == [1, 1, 1]


def test_a_norm_that_a_method_lacks_is_told() -> None:
    model, _, _ = linear()
    assert AdvLib(Threat("Linf", Epsilon("0.1")), method="ddn").unsupported_reason(model) == (
        "ddn: no Linf version; norms: L2"
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, "adv_lib is not installed: pip install --no-deps adv-lib"),
        ("import distutils_that_is_gone", "No module named 'distutils_that_is_gone'; install that module"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "import: RuntimeError: operator torchvision",
        ),
    ],
)
def test_what_the_package_lacks_is_told_in_one_line(
    source: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "adv_lib"]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setitem(sys.modules, "adv_lib", None)
    else:
        (tmp_path / "adv_lib").mkdir()
        (tmp_path / "adv_lib" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=told):
        AdvLib(Threat("L2", Epsilon("1")))
    assert getattr(sys.modules.get("visdom"), "__file__", "none") is not None  # what stands in for it is gone
