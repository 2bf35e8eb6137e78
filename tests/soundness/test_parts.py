"""The parts of an audit one by one: counters, instrumented PGD, binarization heads, snapshots, and the catalog."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from honest_nets import EPS, Split
from torch import Tensor, nn

from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Norm, Threat
from bench.soundness import gradient_checks as gradients
from bench.soundness.attack_strength import _rise
from bench.soundness.audit import Audit, Run, Snapshot, scaled, whole_box
from bench.soundness.audit_model import MEASURES, audit
from bench.soundness.binarization_test import _Head, border, last_linear
from bench.soundness.catalog import CHECKS, LAYER_RUNS
from bench.soundness.checks import Check, NotMeasured
from bench.soundness.forward_checks import last_function
from bench.soundness.instrumented_pgd import InstrumentedPGD
from bench.soundness.test_time_optimization import autograd_calls, layer_runs


def _ways() -> dict[str, object]:
    def backward() -> None:
        (torch.ones(2, requires_grad=True) ** 2).sum().backward()

    def grad() -> None:
        x = torch.ones(2, requires_grad=True)
        torch.autograd.grad((x**2).sum(), x)

    square = lambda x: (x**2).sum()  # noqa: E731
    return {
        "backward": backward,
        "grad": grad,
        "func.grad": lambda: torch.func.grad(square)(torch.ones(2)),
        "func.vjp": lambda: torch.func.vjp(square, torch.ones(2))[1](torch.ones(())),
        "func.jacrev": lambda: torch.func.jacrev(square)(torch.ones(2)),
        "func.jvp": lambda: torch.func.jvp(square, (torch.ones(2),), (torch.ones(2),)),
        "functional.jacobian": lambda: torch.autograd.functional.jacobian(square, torch.ones(2)),
    }


@pytest.mark.parametrize("way", _ways())
def test_every_derivative_is_counted_and_functions_are_restored(way: str) -> None:
    before = torch.autograd.grad, torch.autograd.backward, torch.autograd._engine_run_backward
    with torch.enable_grad(), autograd_calls() as calls:
        _ways()[way]()  # type: ignore[operator]
    assert calls[0] >= 1
    assert before == (torch.autograd.grad, torch.autograd.backward, torch.autograd._engine_run_backward)


def test_a_reference_taken_earlier_is_counted_as_well() -> None:
    from torch.autograd import grad

    taken = torch.func.grad(lambda x: (x**2).sum())
    with autograd_calls() as calls:
        x = torch.ones(2, requires_grad=True)
        grad((x**2).sum(), x)
        assert calls[0] == 1
        taken(torch.ones(2))
        assert calls[0] == 2


def test_layers_are_counted_once_a_run(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    net = nets["batchnorm"]
    with torch.no_grad(), layer_runs(net) as runs:
        net(digits[1].x[:2])
        net(digits[1].x[:2])
    assert set(runs.values()) == {2}
    assert len(runs) == 5
    assert not any(module._forward_pre_hooks for module in net.modules())


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ torch.eye(16)[:, :3]


def _audit(model: Classifier) -> Audit:
    x, y = torch.rand(20, 1, 4, 4), torch.zeros(20, dtype=torch.int64)
    return Audit(model, x, y, [Threat("Linf", Epsilon("0.1"))], "quick", 0, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Functional, lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))])
def test_layers_that_no_hook_sees_are_not_checked(make: Callable[[], nn.Module]) -> None:
    assert [level for level, _ in _levels("C6", _audit(Classifier(make()))).values()] == ["not checked"]


class OwnDraws(Classifier):
    """Draws from a generator that no seed of the audit reaches."""

    stochastic = True
    draws = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand(len(x), 3, generator=self.draws)


def test_predictions_that_change_without_an_attack_are_no_trace_of_one() -> None:
    assert _levels("C17", _audit(OwnDraws(nn.Identity()))) == {None: ("ok", 0.0)}


@pytest.mark.parametrize("steps", [20, 100])  # in a long attack images leave once their iterate repeats; not here
def test_an_instrumented_attack_is_pgd_and_records_misclassified_points(
    nets: dict[str, nn.Module], digits: tuple[Split, Split], steps: int
) -> None:
    model, (x, y), threat = Classifier(nets["standard"]), digits[1], Threat("Linf", EPS)
    plain = PGD(threat, steps=steps, rel_step_size=0.1).evaluate(model, x, y, Context(1))
    instrumented = InstrumentedPGD(threat, steps=steps, rel_step_size=0.1).evaluate(model, x, y, Context(1))
    if steps == 20:  # later the others go on in a smaller batch, which rounds differently
        assert torch.equal(plain.x_adv, instrumented.x_adv)  # type: ignore[arg-type]
    assert torch.equal(plain.columns["correct"], instrumented.columns["correct"])
    met, clean = instrumented.columns["met"], instrumented.columns["clean"]
    assert torch.equal(met & clean, clean & ~instrumented.columns["correct"])
    assert 0 < int((met & clean).sum()) < int(clean.sum())
    with pytest.raises(ValueError, match="one restart"):
        InstrumentedPGD(threat, restarts=2).evaluate(model, x, y, Context(1))


def test_a_rising_loss_is_distinguished_from_a_converged_one(
    nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    model, (x, y), threat = Classifier(nets["adversarial"]), digits[1], Threat("Linf", EPS)
    share = {}
    for steps, rel in ((20, 0.05), (100, 0.1)):
        columns = InstrumentedPGD(threat, steps=steps, rel_step_size=rel).evaluate(model, x, y, Context(1)).columns
        share[steps] = float((columns["moved"][columns["correct"]] > 0.05).float().mean())
        assert bool((columns["moved"][columns["clean"]] <= 1 + 1e-6).all())
    assert share[20] > 0.9
    assert share[100] < 0.05


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_known_point_is_adversarial_and_no_other_is(
    norm: Norm, nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    x, net = digits[1].x, nets["adversarial"]
    threat = Threat(norm, Epsilon({"Linf": "0.1", "L2": "0.5", "L1": "2"}[norm]))
    layer = last_linear(net, x[:1])
    assert layer is net.head
    head = _Head(net, layer)
    torch.manual_seed(0)
    points = [threat.project_to_image(x, x + threat.sample(x)) for _ in range(32)]
    known_point = border(x, threat)
    threat.check(x, known_point)
    assert float((threat.norm_of(known_point - x) / threat.radius).median()) > 0.5
    torch.manual_seed(0)  # fit draws the same points
    holds = head.fit(x, threat)
    assert float(holds.float().mean()) > 0.9
    with torch.no_grad():
        assert bool((head(known_point).argmax(1) == 1)[holds].all())
        for point in (x, *points):
            assert bool((head(point).argmax(1) == 0)[holds].all())


def test_features_are_the_input_of_the_last_linear_layer(
    nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    net, x = nets["standard"], digits[1].x[:4]
    features = _Head(net, net.head).features(x)  # type: ignore[arg-type]
    assert torch.equal(net.head(features), net(x))  # type: ignore[operator]
    with pytest.raises(NotMeasured, match="no linear layer"):
        last_linear(nn.Flatten(), x)


def test_a_rise_is_measured_from_the_lowest_point_before_it() -> None:
    curve = [torch.arange(100) < hits for hits in (90, 60, 50, 53, 55, 20)]
    budgets = [Threat("Linf", Epsilon(f"{i}/8")) for i in range(1, 6)]
    found = _rise(CHECKS["C8"], curve, budgets)
    assert (found.value, found.level) == (pytest.approx(0.05), "ok")  # 5 of 100 images may be chance
    found = _rise(CHECKS["C8"], [correct.repeat(10) for correct in curve], budgets)
    assert (found.value, found.level) == (pytest.approx(0.05), "U")
    assert found.note == "accuracy +5.0% up to eps 0.5"
    falling = [torch.arange(100) < hits for hits in (90, 60, 60, 20)]
    assert (_rise(CHECKS["C8"], falling, budgets).value, _rise(CHECKS["C8"], falling, budgets).level) == (0, "ok")


def test_budgets_scale_exactly_and_the_box_fits_the_ball() -> None:
    x = torch.zeros(1, 3, 8, 8)
    assert scaled(Threat("Linf", Epsilon("8/255")), Fraction(4)).eps == Fraction(32, 255)
    assert scaled(Threat("Linf", Epsilon("0.3")), Fraction(4)).eps == 1
    assert scaled(Threat("L2", Epsilon("0.5")), Fraction(4)).eps == 2
    assert whole_box(Threat("Linf", Epsilon("8/255")), x).eps == 1
    assert 192**0.5 <= whole_box(Threat("L2", Epsilon("0.5")), x).radius <= 192**0.5 + 1
    assert whole_box(Threat("L1", Epsilon("2")), x).eps == 192


def test_a_snapshot_names_what_changed_and_restores_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    snapshot = Snapshot(net)
    assert snapshot.changes() == []
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    net[1].running_mean += 1  # type: ignore[operator]
    net[1].train()
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.zeros(2, 2)
    assert snapshot.changes() == [
        "weights changed",
        "buffers changed",
        "train or eval mode changed",
        "requires_grad changed",
        "gradients left on weights",
    ]
    snapshot.restore()
    assert snapshot.changes() == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[0].weight.grad is None


def test_a_norm_without_an_attack_is_not_checked(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    class NoNorm(PGD):
        norms = ()

    state = _state(nets["standard"], digits[1])
    with pytest.raises(NotMeasured, match="odd has no Linf version"):
        state.run("odd@0.1", NoNorm(Threat("Linf", EPS)))


def test_a_crash_is_not_robustness(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    class Crashes(PGD):
        def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
            raise RuntimeError("out of luck")

    state = _state(nets["standard"], digits[1])
    with pytest.raises(NotMeasured, match=r"odd@0\.1 failed: out of luck"):
        state.run("odd@0.1", Crashes(Threat("Linf", EPS)))
    assert "odd@0.1" not in state.columns()


def _state(net: nn.Module, data: Split) -> Audit:
    return Audit(Classifier(net), data.x, data.y, [Threat("Linf", EPS)], "quick", 0, None)


def _crafted(**correct: range) -> Audit:
    """An audit of 100 images whose attacks are done: `correct` by attack, as ranges of image numbers."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), torch.rand(100, 1, 8, 8)
    with torch.no_grad():
        state = Audit(Classifier(net), x, net(x).argmax(1), [Threat("Linf", EPS)], "quick", 0, None)
    for name, images in correct.items():
        mask = torch.zeros(100, dtype=torch.bool)
        mask[list(images)] = True
        if name == "noise":
            state.drawn["noise@0.1"] = mask
        else:
            met = torch.zeros(100, dtype=torch.bool)
            met[mask.nonzero()[-2:]] = name == "pgd_ce"  # the last two correct ones were misclassified on the path
            state._runs[f"{name.replace('_', '-')}@0.1"] = Run(mask, x, {"met": met})
    return state


class OneByOne(nn.Module):
    """Runs a net on each image by itself, which fails for an empty batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(one[None]) for one in x])


@pytest.mark.parametrize("wrong", [True, False])
def test_no_check_gives_the_model_an_empty_batch(wrong: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(LAYER_RUNS + 2, 1, 4, 4)
    y = (net(x).argmax(1) + wrong) % 3
    budget = [Threat("Linf", Epsilon(1))]  # under which the attacks misclassify every image
    found, columns = audit(
        Classifier(OneByOne(net)), x, y, budget, "quick", seed=0, claimed=None, report=lambda *progress: None
    )
    assert int(columns["clean"].sum()) == (0 if wrong else len(x))
    assert not columns["pgd-cw@1"].any()
    assert not [finding for finding in found if "failed" in finding.note]
    level = {finding.code: finding.level for finding in found}
    assert level["C6"] == "ok"  # a layer that runs once for each image is not repeated
    assert "one row of features" not in "".join(finding.note for finding in found)


def _levels(code: str, state: Audit) -> dict[str | None, tuple[str, float | None]]:
    found = CHECKS[code].findings(MEASURES[code], state)
    return {f.attack: (f.level, None if f.value is None else round(f.value, 4)) for f in found}


def test_one_failed_attack_is_flagged_and_a_failed_set_is_unsound() -> None:
    one = _crafted(fgsm=range(50), pgd_ce=range(60), pgd_cw=range(51), noise=range(49))
    assert _levels("C7", one) == {"pgd-ce": ("F", 0.1), "pgd-cw": ("ok", 0.01), None: ("ok", 0.01)}
    assert _levels("C12", one) == {"pgd-ce": ("F", 0.11), "pgd-cw": ("ok", 0.02), None: ("ok", 0.01)}
    both = _crafted(fgsm=range(50, 100), pgd_ce=range(70), pgd_cw=range(70), noise=range(48))
    assert _levels("C7", both)[None] == ("U", 0.2)
    assert _levels("C12", both)[None] == ("ok", -0.28)  # FGSM is in the set, and sees through the two others
    apart = _crafted(fgsm=range(30), pgd_ce=range(40), pgd_cw=range(20, 60), noise=range(1))
    assert _levels("C7", apart)[None] == ("ok", -0.1)
    assert _levels("C12", apart)[None] == ("U", 0.09)


def test_a_lost_adversarial_point_counts_for_the_set_if_no_attack_returned_one() -> None:
    lost = _crafted(fgsm=range(100), pgd_ce=range(60), pgd_cw=range(70))
    assert _levels("C11", lost) == {"pgd-ce": ("F", 2), "pgd-cw": ("ok", 0), None: ("F", 2)}
    found = _crafted(fgsm=range(100), pgd_ce=range(60), pgd_cw=range(59))
    assert _levels("C11", found)[None] == ("F", 1)


def test_the_catalogue_is_complete_and_free_of_torch() -> None:
    assert list(CHECKS) == [f"C{i}" for i in range(1, 31)]
    for check in CHECKS.values():
        for text in (check.title, check.measures, check.threshold, check.why, check.todo):
            assert len(text) > 3, check.code
    code = "import sys, bench.soundness.catalog; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.code)
def test_the_text_of_a_check_states_its_limits(check: Check) -> None:
    for limit in check.limits.values() if check.code != "C24" else ():  # steps times restarts
        assert not limit or f"{limit:g}" in check.threshold or f"{100 * limit:g} " in check.threshold


@pytest.mark.parametrize(
    ("n", "first", "second", "level"),
    [(32, 20, 19, "ok"), (200, 100, 99, "ok"), (1000, 500, 490, "F"), (1000, 500, 460, "U"), (0, 0, 0, "not checked")],
)
def test_a_difference_exceeds_a_limit_only_beyond_its_interval(n: int, first: int, second: int, level: str) -> None:
    a, b = ([i < hits for i in range(n)] for hits in (first, second))
    found = CHECKS["C13"].difference(a, b)
    assert found.level == level
    assert found.value == (pytest.approx((first - second) / n) if n else None)
    assert ("not beyond" in found.note) == (level == "ok")


@pytest.mark.parametrize("code", ["C7", "C8", "C10", "C12", "C13", "C14", "C15", "C26", "C30"])
def test_the_text_of_a_difference_names_its_interval(code: str) -> None:
    assert "95 % interval" in CHECKS[code].threshold


@pytest.mark.parametrize(
    ("code", "value", "attack", "level", "limit"),
    [
        ("C13", 0.002, None, "ok", 0.002),
        ("C13", 0.003, None, "F", 0.002),
        ("C13", 0.021, None, "U", 0.02),
        ("C13", 0.021, "square", "F", 0.002),
        ("C19", 0.95, None, "ok", 0.95),
        ("C19", 0.94, None, "U", 0.95),
        ("C13", float("nan"), None, "not checked", None),
    ],
)
def test_value_and_limits_give_the_level(
    code: str, value: float, attack: str | None, level: str, limit: float | None
) -> None:
    found = CHECKS[code].finding(value, attack=attack)
    assert (found.level, found.threshold) == (level, limit)


def test_a_gradient_is_zero_only_where_every_pixel_is() -> None:
    state = _crafted()
    with torch.no_grad():
        state.model.net[1].weight[:, :8] = 0.0  # type: ignore[index,union-attr]
        state.y = state.model(state.x).argmax(1)
    for loss in ("ce", "cw", "dlr"):
        assert not bool(gradients.input_gradients(state, loss).zero.any())  # type: ignore[arg-type]
    with torch.no_grad():
        state.model.net[1].weight.zero_()  # type: ignore[index,union-attr]
    assert bool(gradients.input_gradients(state, "ce").zero.all())


def test_outputs_of_softmax_are_told_from_logits() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    assert last_function(logits.softmax(1)) == "softmax"
    assert last_function(logits.log_softmax(1)) == "log_softmax"
    assert last_function(logits) == last_function(logits.sigmoid()) == ""
    assert last_function(logits - logits.mean(1, keepdim=True)) == ""
