"""`bench doctor MODEL`: each fault, planted in an otherwise correct net, is named by its line only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from harness import Bench
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.doctor.diagnosis import Line, _gap, examine, other_inputs, rename_classes
from bench.planning.job_fields import Normalization


class Around(nn.Module):
    """A net between a change of its input and one of its output."""

    def __init__(
        self,
        net: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Stuck(nn.Sequential):
    """A net that cannot be put in eval mode."""

    def train(self, mode: bool = True) -> Stuck:
        return super().train(True)


def trained(change: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    return nets.fit(nets.mlp(), change)


def normed(**settings: bool) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64, **settings), nn.ReLU(), nn.Linear(64, 10)]


def conv() -> nn.Module:
    """A small net with BatchNorm, which sees the scale of its input."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


def whiten(x: Tensor) -> Tensor:
    """About the mean and the deviation of the digits, which no table of bench holds."""
    return (x - 0.3) / 0.37


def lift(x: Tensor) -> Tensor:
    return 2 * x - 1


def coloured(x: Tensor) -> Tensor:
    """As data sets of photographs are normalized."""
    return (x - 0.5) / 0.25


def mnist(x: Tensor) -> Tensor:
    """As many published nets normalize MNIST."""
    return (x - 0.1307) / 0.3081


def one_class(z: Tensor) -> Tensor:
    """The first class is always predicted."""
    return torch.cat([z.amax(1, keepdim=True) + 1, z[:, 1:]], 1)


def few_classes(classes: int, net: Callable[[nn.Module], nn.Module], name: str = "digits") -> dict[str, Line]:
    """Lines of a net on the digits below `classes`; it is trained on all, and its other outputs are left out."""
    _, _, x, y = nets.digits()
    facts = dataclasses.replace(nets.FACTS, name=name, classes=classes)
    model = net(trained(mnist) if name == "mnist" else trained())
    cut = Around(model, after=lambda z: z[:, :classes]).eval()
    return {line.check: line for line in examine(cut, x[y < classes], y[y < classes], facts, False)}


ORDER = torch.tensor([3, 5, 4, 1, 7, 9, 2, 6, 0, 8])  # no two are swapped: the inverse is correct for no class

FAULTS: dict[str, tuple[Callable[[], nn.Module], str, str, str, str]] = {
    "0 to 255": (
        lambda: Around(trained(lambda x: (x * 255 - 76.5) / 94), lambda x: (x - 76.5) / 94),
        "input",
        "FAIL",
        "at x * 255",
        "x * 255 is correct and x is not; the model expects pixels from 0 to 255",
    ),
    "-1 to 1": (
        lambda: nets.fit(conv(), lift),
        "input",
        "FAIL",
        "at 2 x - 1",
        "2 x - 1 is correct and x is not; the model expects pixels from -1 to 1",
    ),
    "-1 to 1 twice": (
        lambda: Around(nets.fit(conv(), lift), lambda x: lift(lift(x))),
        "input",
        "FAIL",
        "at (x + 1) / 2",
        "(x + 1) / 2 is correct and x is not; pixels are taken to [-1,1] twice",
    ),
    "normalization missing": (
        lambda: nets.fit(conv(), whiten),
        "input",
        "FAIL",
        "at (x - mean) / std",
        "(x - mean) / std is correct and x is not; normalization is missing: do it inside the model or with "
        "--normalize 0.2965/0.3726",
    ),
    "255 times too bright": (
        lambda: Around(trained(), lambda x: (x * 255).clamp(0, 1)),
        "input",
        "FAIL",
        "at x / 255",
        "x / 255 is correct and x is not; the model is given pixels 255 times too bright: leave that out or use "
        "--normalize 0/255",
    ),
    "inverted": (lambda: trained(lambda x: 1 - x), "input", "FAIL", "at 1 - x", "the model expects inverted images"),
    "softmax": (
        lambda: Around(trained(), after=lambda z: z.softmax(1)),
        "logits",
        "FAIL",
        "probabilities: rows are in [0,1]",
        "return the logits before softmax",
    ),
    "log-softmax": (
        lambda: Around(trained(), after=lambda z: z.log_softmax(1)),
        "logits",
        "WARN",
        "log-probabilities",
        "return the logits before log_softmax",
    ),
    "sigmoid": (
        lambda: Around(trained(), after=torch.sigmoid),
        "logits",
        "WARN",
        "all in [0,1], rows do not sum to 1",
        "if they are outputs of a sigmoid",
    ),
    "no eval mode": (
        lambda: nets.fit(Stuck(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))),
        "eval mode",
        "FAIL",
        "in train mode after eval(), first 3",
        "let eval() reach every module",
    ),
    "dropout left on": (
        lambda: Around(trained(), lambda x: F.dropout(x, 0.3)),
        "randomness",
        "FAIL",
        "two passes differ by",
        "--randomized",
    ),
    "labels in another order": (
        lambda: Around(trained(), after=lambda z: z[:, ORDER]),
        "class order",
        "FAIL",
        "under the best renaming",
        "the model numbers its classes in another order",
    ),
    "statistics of the batch": (
        lambda: Around(trained(), lambda x: x - x.mean(0) + nets.digits()[0].mean(0)),
        "batch",
        "FAIL",
        "changed label",
        "images must be classified independently",
    ),
    "not finite": (
        lambda: Around(trained(), after=lambda z: torch.where(z.amax(1, keepdim=True) > 12, torch.nan, z)),
        "finite output",
        "FAIL",
        "of 200 images without finite logits",
        "NaN or infinity is never robustness",
    ),
    "too many classes": (
        lambda: Around(trained(), after=lambda z: F.pad(z, (0, 90))),
        "output shape",
        "FAIL",
        "(64, 100)",
        "digits has 10 classes: return one tensor of logits of shape (64, 10)",
    ),
    "a tuple": (
        lambda: Around(trained(), after=lambda z: (z, z)),
        "output shape",
        "FAIL",
        "a tuple",
        "return one tensor",
    ),
    "no gradient": (
        lambda: Around(trained(), lambda x: x.detach()),
        "gradient",
        "FAIL",
        "none: ",
        "let every operation be differentiable",
    ),
    "gradient of zero": (
        lambda: Around(trained(), lambda x: x + (x.round() - x).detach() - x + x.detach()),
        "gradient",
        "FAIL",
        "exactly zero at 100.0% of",
        "let every operation be differentiable",
    ),
    "gradient not finite": (
        lambda: Around(trained(), lambda x: x + 0 * (x - x.detach()).square().sum().sqrt()),
        "gradient",
        "FAIL",
        "not finite at 64 of 64 images",
        "attacks cannot follow NaN or infinity",
    ),
    "one class always": (
        lambda: Around(trained(), after=one_class),
        "accuracy",
        "FAIL",
        "on 200 images",
        "no better than chance",
    ),
    "not trained": (
        lambda: nets.mlp(),
        "accuracy",
        "FAIL",
        "on 200 images",
        "no better than chance under every input and class order tried",
    ),
}


def lines(net: nn.Module, randomised: bool = False) -> dict[str, Line]:
    _, _, x, y = nets.digits()
    return {line.check: line for line in examine(net.eval(), x, y, nets.FACTS, randomised)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_by_its_line_and_no_other(fault: str) -> None:
    make, check, state, value, todo = FAULTS[fault]
    found = lines(make())
    assert found[check].state == state, found
    assert value in found[check].value
    assert todo in found[check].todo
    others = {name: line for name, line in found.items() if line.state == "FAIL" and name != check}
    assert not others
    if check == "input":  # the accuracy told below is not that of the images as they are
        assert found["accuracy"].value.endswith(f" given {value.removeprefix('at ')}")


@pytest.mark.parametrize(
    "net",
    [trained, lambda: nets.fit(nn.Sequential(*normed()))],
    ids=["mlp", "with BatchNorm"],
)
def test_an_honest_net_has_nothing_to_do(net: Callable[[], nn.Module]) -> None:
    found = lines(net())
    assert {line.state for line in found.values()} == {"OK"}
    assert all(line.todo == "" for line in found.values())
    assert list(found)[-1] == "accuracy"
    assert "given" not in found["accuracy"].value + found["class order"].value


@pytest.mark.parametrize(
    ("change", "best", "todo"),
    [
        (
            lambda x: x,
            "(x - mean) / std",
            "normalization is missing: do it inside the model or with --normalize 0.5/0.25",
        ),
        (lambda x: coloured(coloured(x)), "x * std + mean", "images are normalized twice: leave one out"),
    ],
    ids=["missing", "twice"],
)
def test_normalisation_is_that_of_the_data_set_where_it_has_one(
    change: Callable[[Tensor], Tensor], best: str, todo: str
) -> None:
    _, _, x, y = nets.digits()
    facts = dataclasses.replace(nets.FACTS, mean=(0.5,), std=(0.25,))
    net = Around(nets.fit(conv(), coloured), change).eval()
    found = {line.check: line for line in examine(net, x, y, facts, False)}["input"]
    assert found.state == "FAIL"
    assert found.todo.startswith(f"{best} is correct and x is not; {todo}")


def test_a_renaming_of_classes_is_found_on_images_it_is_not_judged_on() -> None:
    draws = torch.Generator().manual_seed(0)
    guess, labels = torch.randint(0, 50, (2, 200), generator=draws)
    assert float((rename_classes(guess, labels, 50) == labels).double().mean()) < 0.06
    assert torch.equal(rename_classes(ORDER[labels % 10], labels % 10, 10), labels % 10)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda classes, net: net, []),
        (lambda classes, net: Around(net, after=lambda z: z[:, :classes].flip(1)), ["class order"]),
        (lambda classes, _: Around(trained(lambda x: x - 0.5), lambda x: x / 255 - 0.5), ["input"]),
        (lambda classes, net: Around(net, after=lambda z: one_class(z[:, :classes])), ["accuracy"]),
    ],
    ids=["honest", "another order", "0 to 255", "one class always"],
)
def test_a_fault_is_found_with_few_classes(
    classes: int, change: Callable[[int, nn.Module], nn.Module], failing: list[str]
) -> None:
    found = few_classes(classes, lambda net: change(classes, net))
    assert [name for name, line in found.items() if line.state == "FAIL"] == failing
    assert failing or {line.state for line in found.values()} == {"OK"}


def test_an_offset_of_a_logit_is_a_warning() -> None:
    found = few_classes(2, lambda net: Around(net, after=lambda z: z[:, :2] + torch.tensor([9.0, 0.0])))
    assert found["predictions"].state == "WARN"
    assert "class 0 is predicted for" in found["predictions"].value
    assert "an offset of this class's logit" in found["predictions"].todo


def test_chance_is_the_share_of_the_class_that_is_always_predicted() -> None:
    _, _, x, y = nets.digits()
    chosen = torch.cat([(y == 0).nonzero()[:18, 0], (y == 1).nonzero()[:2, 0]])
    facts = dataclasses.replace(nets.FACTS, classes=2)
    model = Around(trained(), after=lambda z: one_class(z[:, :2])).eval()
    found = {line.check: line for line in examine(model, x[chosen], y[chosen], facts, False)}["accuracy"]
    assert (found.state, found.value) == ("FAIL", "0.900 on 20 images")


def test_missing_normalization_shows_in_the_loss_where_accuracy_hardly_moves() -> None:
    found = few_classes(4, lambda net: net, "mnist")["input"]
    assert found.state == "WARN"
    assert found.todo.startswith("cross-entropy is ")
    assert found.todo.endswith("normalization is missing: do it inside the model or with --normalize 0.1307/0.3081")
    # one image decides the loss of this one
    assert few_classes(2, lambda net: Around(net, mnist), "mnist")["input"].state == "OK"
    assert few_classes(4, lambda net: Around(net, mnist), "mnist")["input"].state == "OK"
    unsure = few_classes(4, lambda net: Around(net, after=lambda z: z / 20))["input"]
    assert unsure.state == "OK"


def test_another_input_that_gives_nan_explains_nothing() -> None:
    found = lines(Around(trained(), lambda x: torch.where(x > 2, torch.nan, x)))
    assert {line.state for line in found.values()} == {"OK"}
    assert "0.000 at x * 255" in found["input"].value


def test_the_option_to_paste_takes_the_place_of_the_one_given() -> None:
    _, _, x, _ = nets.digits()
    bright = Normalization((0.0,), (1 / 255,))
    assert other_inputs(x, nets.FACTS, bright)["x / 255"][1].endswith("use --normalize none")
    assert other_inputs(x, nets.FACTS, bright)["2 x - 1"][1].endswith("with --normalize 0.5/0.001961")
    assert other_inputs(x, nets.FACTS)["x * 255"][1].endswith("with --normalize 0/0.003922")


def test_batch_norm_in_train_mode_is_named_wherever_it_shows() -> None:
    found = lines(nets.fit(Stuck(*normed())))
    assert found["eval mode"].state == found["batch"].state == "FAIL"
    assert "a batch of 1 raises ValueError: Expected more than 1 value per channel" in found["batch"].value
    found = lines(nets.fit(nn.Sequential(*normed(track_running_stats=False))))
    assert found["eval mode"].state == "FAIL"
    assert "1 BatchNorm layer without running statistics, first 2" in found["eval mode"].value


def test_a_declared_random_model_may_draw_and_must() -> None:
    noisy = lines(Around(trained(), lambda x: x + 0.2 * torch.randn_like(x)), randomised=True)
    assert noisy["randomness"].state == "OK"
    assert noisy["randomness"].value.endswith("as declared")
    assert lines(trained(), randomised=True)["randomness"].state == "WARN"


def test_a_forward_pass_that_fails_is_a_line() -> None:
    found = lines(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)))
    assert list(found) == ["output shape"]
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in found["output shape"].value


def test_the_command_prints_each_line_and_fails_with_4(bench: Bench) -> None:
    save_file(nets.weights(), "net.safetensors")
    chosen = ("--arch", "mlp", "--arch-set", "width=64", "--arch-set", "depth=1")
    good = bench("doctor", "net.safetensors", *chosen)
    assert (good.code, good.err) == (0, "")
    assert [line[:4] for line in good.out.splitlines()] == ["OK  "] * 13
    Path("soft.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))\n"
    )
    bad = bench("doctor", "soft.py:build", "--json")
    assert bad.code == 4
    found = {line["check"]: line for line in map(json.loads, bad.out.splitlines())}
    assert found["logits"]["state"] == "FAIL"
    assert found["output shape"] == {"check": "output shape", "state": "OK", "value": "(64, 10)", "todo": ""}
    assert not Path("results").exists()


def test_what_a_model_prints_goes_to_stderr_and_its_file_may_be_named_like_a_defense(bench: Bench) -> None:
    Path("trades.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n        print('forward')\n        return super().forward(x)\n"
        "def build():\n    print('built')\n    return Net(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    outcome = bench("doctor", "trades.py:build", "--json")
    assert outcome.code == 4  # it is not trained
    assert {"loading", "accuracy"} < {json.loads(line)["check"] for line in outcome.out.splitlines()}
    assert set(outcome.err.splitlines()) == {"built", "forward"}


def test_without_a_model_the_doctor_looks_at_the_machine(bench: Bench) -> None:
    outcome = bench("doctor")
    assert outcome.code == 0
    assert "OK    Python" in outcome.out
    lost = bench("doctor", "--dataset", "digits")
    assert lost.code == 2
    assert "go with a MODEL" in lost.err


def test_nan_is_no_class_and_no_small_gap() -> None:
    logits = torch.eye(3)
    assert _gap(logits, logits) == (0.0, 0)
    assert _gap(logits, logits.masked_fill(logits == 1, float("nan"))) == (float("inf"), 3)
    labels = torch.tensor([0, 1, 2]).repeat(8)
    guess = labels.clone()
    guess[::5] = -1
    assert rename_classes(guess, labels, 3).tolist() == guess.tolist()
