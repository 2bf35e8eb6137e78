"""What every plug-in owes the harness, checked on a toy network: used by `bench check NAME` and by the tests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.core.attack import Attack, Context, Evaluation, Outcome
from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, Terms
from bench.core.numbers import Number
from bench.core.randomised import InputNoise, Randomised
from bench.core.rng import scope
from bench.core.smoothing import Smoothed
from bench.core.threat import Norm, Threat
from bench.planning import catalog
from bench.training.optimise import passes_in

CLASSES, CHANNELS, SIZE = 5, 1, 8
LEARNING_RATE = 1e-3  # losses on moments blow up at the usual 0.05
BUDGET: dict[Norm, Number] = {"Linf": Number("8/255"), "L2": Number("0.3"), "L1": Number("1")}


class Result(NamedTuple):
    """One check: its name, whether it holds, and what was found where it does not."""

    name: str
    ok: bool
    detail: str = ""


class Toy(nn.Module):
    """A small network with a convolution, BatchNorm and a linear `head`; no parameter is dead (no bias before BN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(6 * (SIZE // 2) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b 5` of images `b 1 8 8`."""
        logits: Tensor = self.head(self.flat(self.pool(self.relu(self.norm(self.conv(x))))))
        return logits


def find_class(module: ModuleType, base: type[Any]) -> type[Any]:
    """The one public subclass of `base` that a module defines itself. Raises ValueError otherwise."""
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} must define exactly one {base.__name__}, found {len(found)}")
    return found[0]


def check_defense(cls: type[Defense]) -> list[Result]:
    """All checks of one defense, with its `smoke` settings. An exception in a check is its failure."""
    run = _Training(cls)
    with _one_thread():
        return [
            _result("documented and readable without torch", lambda: _readable(cls, "defenses")),
            _result("terms are finite scalars and every parameter learns", run.learns),
            _result("training mode and gradient flags survive a step", run.flags_survive),
            _result("the inner problem leaves weights, gradients and BatchNorm alone", run.inner_is_clean),
            _result("adversarial images lie in ball and box", run.inner_is_feasible),
            _result("same seed, same bits", run.repeats),
            _result("deploys what it declares", run.deploys),
            _result("its state makes a round trip", run.state_trip),
            _result("with its state put back it goes on bit for bit", run.goes_on),
            _result("takes part in what it says it honours, and says so", run.honours),
        ]


def check_attack(cls: type[Evaluation]) -> list[Result]:
    """All checks of one evaluation, with its `smoke` settings, for each norm and kind of model it supports."""
    with _one_thread():
        return _attack_results(cls)


def _attack_results(cls: type[Evaluation]) -> list[Result]:
    results = [_result("documented and readable without torch", lambda: _readable(cls, "attacks"))]
    runs: list[_Judgement] = []

    def some_case() -> str | None:
        runs.extend(_cases(cls))
        return None if runs else "supports() refuses every norm and model"

    results.append(_result("supports some norm and model", some_case))
    for run in runs:
        checks = {"leaves the model as it was": run.traceless, "columns are per-sample": run.columns}
        checks["same seed, same bits"] = run.repeats
        if issubclass(cls, Attack) or getattr(cls, "uses_budgets", False):
            checks |= {"images lie in ball and box": run.feasible, "eps 0 is clean accuracy": run.no_budget}
        results += [_result(f"{name} ({run.norm}, {run.kind})", check) for name, check in checks.items()]
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small lose time to threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _result(name: str, check: Callable[[], str | None]) -> Result:
    """Run a check, which returns None where it holds, else what is wrong."""
    try:
        wrong = check()
    except Exception as error:  # a plug-in under test may raise anything
        wrong = f"{type(error).__name__}: {error}"
    return Result(name, wrong is None, wrong or "")


def _readable(cls: type[Any], kind: catalog.Kind) -> str | None:
    plugin = catalog.get(kind, Path(inspect.getfile(cls)).stem)
    if not re.search(r"[=<>(\[]", plugin.formula):
        return f"the first docstring line must be the objective as a formula, found '{plugin.formula}'"
    if not re.search(r"arXiv|\b(19|20)\d\d\b", plugin.source):
        return "the second docstring paragraph must name the source, e.g. (Madry et al. 2018, arXiv 1706.06083)"
    bare = [field.name for field in plugin.fields if not field.doc]
    if bare:
        return f"setting '{bare[0]}' has no docstring line below it (meaning and unit)"
    plugin.resolve(plugin.constant("smoke", {}))
    for preset in plugin.constant("presets", {}):
        plugin.resolve({"preset": preset})
    return None


def _threat(norm: Norm, scale: int = 1) -> Threat:
    return Threat(norm, Number(BUDGET[norm] * scale))


def _images(count: int = 12) -> tuple[Tensor, Tensor]:
    with scope(1):
        x = torch.rand(count, CHANNELS, SIZE, SIZE)
        x[:, :, :2] = 0  # pixels at the edge of the box are where projections go wrong
        return x, torch.arange(count) % CLASSES


def _flags(net: nn.Module) -> list[tuple[str, bool]]:
    return [
        *((name, module.training) for name, module in net.named_modules()),
        *((name, parameter.requires_grad) for name, parameter in net.named_parameters()),
    ]


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    if one.keys() != other.keys():
        return f"tensors {sorted(one.keys() ^ other.keys())} come and go"
    changed = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return f"{', '.join(changed)} differ" if changed else None


class _Recorder:
    """A plain Updater that remembers which parameters got a gradient, by name."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
        self.moved: set[str] = set()
        self.terms: Terms = {}

    def descend(self, terms: Terms) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.moved |= {n for n, p in self.net.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        self.terms = terms
        self.optimizer.step()


class _Training:
    """Two steps of one defense on the toy network, and what must hold around them."""

    def __init__(self, cls: type[Defense]) -> None:
        self.cls = cls
        norm: Norm = getattr(cls, "norms", ("Linf",))[0]
        self.threat = _threat(norm)
        x, y = _images()
        self.batch = Batch(x, y, torch.arange(len(x)), epoch=1, progress=0.6)

    def fresh(self) -> tuple[Defense, nn.Module]:
        defense = self.cls(self.threat, **self.cls.smoke)
        return defense, defense.wrap(Toy()).train()

    def trained(self) -> tuple[Defense, nn.Module, _Recorder]:
        with scope(2):
            defense, net = self.fresh()
            recorder = _Recorder(net)
            for _ in range(2):
                defense.step(net, recorder, self.batch)
        return defense, net, recorder

    def learns(self) -> str | None:
        _, net, recorder = self.trained()
        for name, value in recorder.terms.items():
            if value.dim() != 0 or not bool(torch.isfinite(value)):
                return f"term '{name}' must be a finite scalar, found {value.detach()}"
        idle = sorted({name for name, _ in net.named_parameters()} - recorder.moved)
        return f"no gradient reaches {', '.join(idle)}" if idle else None

    def flags_survive(self) -> str | None:
        with scope(2):
            defense, net = self.fresh()
            for module in net.modules():
                module.train(not isinstance(module, nn.BatchNorm2d))  # a frozen BatchNorm must stay frozen
            before = _flags(net)
            defense.step(net, _Recorder(net), self.batch)
        return None if _flags(net) == before else "a module's training mode or a parameter's requires_grad changed"

    def inner_is_clean(self) -> str | None:
        with scope(2):
            defense, net = self.fresh()
            before = _copy(net)
            defense.inner(net, self.batch)
        if any(parameter.grad is not None for parameter in net.parameters()):
            return "inner leaves gradients on parameters"
        # in this mode, as published, each attack step moves the running statistics
        moving = {n for n, _ in net.named_buffers()} if getattr(defense, "attack_bn_mode", "") == "train" else set()
        after = net.state_dict()
        return _same(*({n: v for n, v in state.items() if n not in moving} for state in (before, after)))

    def inner_is_feasible(self) -> str | None:
        defense, net, _ = self.trained()
        with scope(3):
            adv = defense.inner(net, self.batch)
        if self.cls.uses_threat and isinstance(adv, Tensor):
            if adv.requires_grad:
                return "the images that inner gives must carry no graph"
            self.threat.check(self.batch.x, adv)
        return None

    def repeats(self) -> str | None:
        return _same(self.trained()[1].state_dict(), self.trained()[1].state_dict())

    def deploys(self) -> str | None:
        defense, net, _ = self.trained()
        model, x = defense.deploy(net.eval()), self.batch.x
        if not isinstance(model, Classifier):
            return f"deploy must give a Classifier, found {type(model).__name__}"
        kind = "smoothed" if model.smoothed else "randomised" if model.stochastic else "deterministic"
        if kind != self.cls.deploys:
            return f"deploys says {self.cls.deploys}, the model is {kind}"
        with torch.no_grad(), scope(4):
            logits, labels, again = model(x), model.predict(x), model(x)
        if tuple(logits.shape) != (len(x), CLASSES) or labels.shape != (len(x),):
            return f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} for {len(x)} images"
        if model.stochastic == torch.equal(logits, again):
            return f"two passes {'agree' if model.stochastic else 'differ'}, but stochastic is {model.stochastic}"
        return None

    def honours(self) -> str | None:
        """Label smoothing must reach the loss exactly where it is declared; declared 16-bit passes must train."""
        said = self.cls.honours
        unknown = sorted(set(said) - {"label_smoothing", "bf16", "fp16"})
        if unknown:
            return f"honours knows label_smoothing, bf16 and fp16, found '{unknown[0]}'"
        totals = [self._total(smoothing, "fp32") for smoothing in (0.0, 0.5)]
        if torch.equal(*totals) == ("label_smoothing" in said):
            return "label_smoothing must be in honours exactly where the loss passes batch.smoothing on"
        wide = [name for name in ("bf16", "fp16") if name in said]
        bad = [name for name in wide if not bool(torch.isfinite(self._total(0.0, name)))]
        return f"the loss of {bad[0]} passes is not finite" if bad else None

    def _total(self, smoothing: float, precision: str) -> Tensor:
        """The loss of one step."""
        with scope(2):
            defense, net = self.fresh()
            with passes_in(net, precision):
                terms = defense.step(net, _Recorder(net), replace(self.batch, smoothing=smoothing))
        return torch.stack(list(terms.values())).sum().detach()

    def state_trip(self) -> str | None:
        defense, _, _ = self.trained()
        state = {name: value.clone() for name, value in defense.state_dict().items()}
        fresh, _ = self.fresh()
        fresh.load_state_dict(state)
        return _same(state, fresh.state_dict())

    def goes_on(self) -> str | None:
        """What a step depends on beside weights and random streams must be in the state: training may be killed."""
        defense, net, _ = self.trained()
        with scope(2):
            fresh, other = self.fresh()
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict({name: value.clone() for name, value in defense.state_dict().items()})
        found = []
        for one, its in ((defense, net), (fresh, other)):
            with scope(6):
                terms = one.step(its, _Recorder(its), self.batch)
            told = {**terms, **one.metrics(its)}
            values = {f"'{name}' of the next step": value.detach().nan_to_num(-7.0) for name, value in told.items()}
            found.append({**_copy(its), **values})
        wrong = _same(*found)
        return wrong and f"{wrong}; state_dict must hold what a step depends on"


def _model(kind: str) -> tuple[Classifier, nn.Module]:
    """A toy model in eval mode and its BatchNorm layer, which is left in train mode as a trap."""
    with scope(5):
        net = Toy()
        net(torch.rand(64, CHANNELS, SIZE, SIZE))  # running statistics
    net.eval()
    if kind == "smoothed":
        return Smoothed(net, sigma=0.1, n_vote=20), net.norm
    if kind == "randomised":
        InputNoise(0.1).attach(net.conv)
        return Randomised(net, draws=5), net.norm
    return Classifier(net), net.norm


def _cases(cls: type[Evaluation]) -> list[_Judgement]:
    """Norms and kinds of model that the evaluation supports; one norm is enough where it ignores the threat."""
    norms: tuple[Norm, ...] = cls.norms if cls.uses_threat else ("Linf",)  # type: ignore[assignment]
    pairs = [(norm, kind) for norm in norms for kind in ("deterministic", "randomised", "smoothed")]
    return [_Judgement(cls, n, k) for n, k in pairs if cls(_threat(n), **cls.smoke).supports(_model(k)[0]) is None]


class _Judgement:
    """One evaluation of the toy model on images that it mostly gets right, and what must hold around it."""

    def __init__(self, cls: type[Evaluation], norm: Norm, kind: str) -> None:
        self.cls, self.norm, self.kind = cls, norm, kind
        self.x, y = _images()
        with torch.no_grad():
            guess = _model(kind)[0].net(self.x).argmax(1)
        self.y = torch.where(torch.arange(len(y)) < 10, guess, y)

    def run(self, scale: int = 1) -> tuple[Outcome, str | None]:
        """The outcome, and what the evaluation left behind in the model, if anything."""
        model, norm_layer = _model(self.kind)
        norm_layer.train()
        before, flags, generator = _copy(model), _flags(model), torch.get_rng_state()
        outcome = self.cls(_threat(self.norm, scale), **self.cls.smoke).evaluate(model, self.x, self.y, Context(7))
        traces = {
            "a module's training mode or a parameter's requires_grad changed": _flags(model) != flags,
            "gradients are left on parameters": any(p.grad is not None for p in model.parameters()),
            "the global random generator moved": not torch.equal(generator, torch.get_rng_state()),
        }
        found = [text for text, true in traces.items() if true]
        return outcome, _same(before, model.state_dict()) or (found[0] if found else None)

    @cached_property
    def first(self) -> tuple[Outcome, str | None]:
        return self.run()

    def traceless(self) -> str | None:
        return self.first[1]

    def columns(self) -> str | None:
        columns, measured = self.first[0].columns, self.cls.measures
        if measured and ("correct" in columns or measured not in columns):
            return f"it measures '{measured}': that column is owed, and none named 'correct'"
        if not measured and ("correct" not in columns or columns["correct"].dtype != torch.bool):
            return "a bool column 'correct' is missing"
        for name, values in columns.items():
            if values.shape[:1] != (len(self.x),):
                return f"column '{name}' has shape {tuple(values.shape)} for {len(self.x)} images"
        # against noise a clean image that was wrong once is no fact
        sure = "clean" in columns and "share" not in columns
        if sure and bool((columns["correct"] & ~columns["clean"]).any()):
            return "an image is robust that is wrong without an attack"
        return None

    def repeats(self) -> str | None:
        (one, _), (other, _) = self.first, self.run()
        images = {} if one.x_adv is None or other.x_adv is None else {"images": (one.x_adv, other.x_adv)}
        pairs = {**{f"column '{n}'": (v, other.columns[n]) for n, v in one.columns.items()}, **images}
        changed = [name for name, (a, b) in pairs.items() if not torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))]
        return f"{', '.join(changed)} differ between two runs" if changed else None

    def feasible(self) -> str | None:
        outcome, _ = self.first
        if outcome.x_adv is None:
            return "an attack must return its images"
        _threat(self.norm).check(self.x, outcome.x_adv)
        return None

    def no_budget(self) -> str | None:
        outcome, _ = self.run(scale=0)
        same = torch.equal(outcome.columns["correct"], outcome.columns["clean"])
        return None if same and outcome.x_adv is not None and torch.equal(outcome.x_adv, self.x) else "verdicts differ"
