"""The state that all measured checks share: model, images, budgets, and the outcome of each attack, run once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.fgsm import FGSM
from bench.core.attack import Attack, Context
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import AttackLoss
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.soundness.checks import NotApplicable, NotMeasured
from bench.soundness.instrumented_pgd import InstrumentedPGD

BLOCK = 256  # images that pass through the model together
LOSSES: tuple[AttackLoss, ...] = ("ce", "cw")
ATTACKS = ("fgsm", *(f"pgd-{loss}" for loss in LOSSES))  # run at each budget
Effort = Literal["quick", "full"]


class Snapshot:
    """A copy of the weights, buffers, modes and gradients of `model`, which attacks must leave unchanged."""

    def __init__(self, model: nn.Module) -> None:
        weights, buffers = list(model.parameters()), list(model.buffers())
        self.tensors = {
            name: [(t, t.detach().clone()) for t in tensors]
            for name, tensors in (("weights", weights), ("buffers", buffers))
        }
        self.modes = [(module, module.training) for module in model.modules()]
        self.grads = [(p, p.requires_grad, None if p.grad is None else p.grad.detach().clone()) for p in weights]

    def changes(self) -> list[str]:
        """Descriptions of what differs from the snapshot."""
        found = [
            f"{name} changed"
            for name, pairs in self.tensors.items()
            if not all(_same(now, then) for now, then in pairs)
        ]
        if any(module.training != mode for module, mode in self.modes):
            found.append("train or eval mode changed")
        if any(p.requires_grad != flag for p, flag, _ in self.grads):
            found.append("requires_grad changed")
        if any((p.grad is None) != (then is None) for p, _, then in self.grads):
            found.append("gradients left on weights")
        elif not all(_same(p.grad, then) for p, _, then in self.grads if then is not None and p.grad is not None):
            found.append("gradients on weights changed")
        return found

    def restore(self) -> None:
        """Restore everything, bit for bit."""
        with torch.no_grad():
            for now, then in (*self.tensors["weights"], *self.tensors["buffers"]):
                now.copy_(then)
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag, grad in self.grads:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _same(now: Tensor, then: Tensor) -> bool:
    """Are both equal, NaN included?"""
    return torch.allclose(now.detach(), then, rtol=0, atol=0, equal_nan=True)


@dataclass
class Run:
    """One attack on all images of the audit: `correct` (on the clean and the adversarial image, bool of shape n), the
    adversarial images (the clean image where the attack made none) and the columns of the attack, shape n each."""

    correct: Tensor
    x_adv: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Unseen:
    """Training images (n c h w, [0,1]) and labels drawn for an audit, and the seed of the moves of its test images."""

    x: Tensor
    y: Tensor
    seed: int


@dataclass
class Audit:
    """One deployed model under audit. Images `x` (n c h w, [0,1]) and labels `y` on the device; nothing is changed.

    `unseen`: of an imported model, whose author may have stored test images.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    threats: list[Threat]
    level: Effort
    seed: int
    claimed: float | None
    unseen: Unseen | None = None

    def __post_init__(self) -> None:
        self.before = Snapshot(self.model)
        self.changes: list[str] = []  # of the model, by attacks
        self.failed: dict[str, str] = {}  # attacks that raised, and their message
        self.drawn: dict[str, Tensor] = {}  # images robust to the random search, by budget
        self._runs: dict[str, Run] = {}
        self.not_finite = torch.zeros((), dtype=torch.int64, device=self.x.device)  # passes inside `watch`
        self.logits = self.forward(self.x)
        self.clean = self.correct_on(self.x)

    @property
    def budgets(self) -> list[Threat]:
        """The threats above eps 0, smallest first."""
        return sorted((t for t in self.threats if t.radius > 0), key=lambda t: t.radius)

    @property
    def largest(self) -> Threat:
        """The largest budget. Raises NotMeasured where there is none above 0."""
        if not self.budgets:
            raise NotMeasured("no budget above eps 0")
        return self.budgets[-1]

    @property
    def steps(self) -> int:
        """Steps of the audit's own PGD, each a tenth of eps."""
        return 50 if self.level == "quick" else 100

    def require_deterministic(self) -> None:
        """Raise NotApplicable for a stochastic model."""
        if self.model.stochastic:
            raise NotApplicable("single passes of a stochastic model differ; EOT and fresh draws evaluate it")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context in which `not_finite` counts the images in [0,1] whose largest logit is NaN or Inf, in all passes."""

        def check(model: nn.Module, given: tuple[Any, ...], logits: Tensor) -> None:
            images = given[0].detach().flatten(1)
            inside = ((images >= 0) & (images <= 1)).all(1)
            self.not_finite += (inside & ~logits.detach().amax(1).isfinite()).sum()

        handle = self.model.register_forward_hook(check)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits of one pass in eval mode, block by block."""
        with frozen(self.model), scope(seed(self.seed, "forward")):
            return torch.cat([self.model(part) for part in x.split(BLOCK)])

    @torch.no_grad()
    def correct_on(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Whether the deployed rule classifies each of `x` correctly; `rows` are their indices among the images."""
        y = self.y if rows is None else self.y[rows]
        with frozen(self.model), scope(seed(self.seed, "score")):
            return torch.cat([self.model.predict(part) for part in x.split(BLOCK)]) == y

    def attacked(self, name: str, threat: Threat) -> Run:
        """The outcome of one of ATTACKS, run once: FGSM on cross-entropy, or PGD of one restart with the columns of
        InstrumentedPGD. Raises NotMeasured where the attack failed."""
        key = f"{name}@{threat.eps}"
        if key in self.failed:
            raise NotMeasured(f"{key} failed: {self.failed[key]}")
        if key not in self._runs:
            settings = {"steps": self.steps, "rel_step_size": 0.1, "loss": name.removeprefix("pgd-")}
            attack = FGSM(threat) if name == "fgsm" else InstrumentedPGD(threat, **settings)  # type: ignore[arg-type]
            self._runs[key] = self.run(key, attack)
        return self._runs[key]

    def run(self, name: str, attack: Attack, only: Tensor | None = None) -> Run:
        """Attack the correctly classified images (of these `only` where a mask is given; `correct` is False elsewhere).

        Raises NotMeasured where the attack raises: a crash is no robustness, and no verdict on the model either.
        """
        if attack.threat.norm not in attack.norms:
            raise NotMeasured(f"{name.partition('@')[0]} has no {attack.threat.norm} version")
        todo = self.clean if only is None else self.clean & only
        todo = torch.ones_like(todo) if self.model.stochastic and only is None else todo
        rows = todo.nonzero().squeeze(1)
        found = Run(torch.zeros_like(self.clean), self.x.clone())
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            try:
                self._attack(name, attack, part, start, found)
            except (RuntimeError, ValueError, TypeError) as error:
                self.failed[name] = first_line(error)
                raise NotMeasured(f"{name} failed: {self.failed[name]}") from None
        self.changes += [f"{change} by {name}" for change in self.before.changes()]
        if len(rows):
            found.correct[rows] = self.correct_on(found.x_adv[rows], rows)
        return found

    def columns(self) -> dict[str, Tensor]:
        """Which images are correct: clean, and for each budget above 0 under each attack that could be run."""
        found = {"clean": self.clean, **self.drawn}
        for threat in self.budgets:
            for name in ATTACKS:
                with suppress(NotMeasured):
                    found[f"{name}@{threat.eps}"] = self.attacked(name, threat).correct
        return found

    def _attack(self, name: str, attack: Attack, rows: Tensor, start: int, found: Run) -> None:
        x, y = self.x[rows], self.y[rows]
        with frozen(self.model), scope(seed(self.seed, name, start)):
            surrogate = Counted(self.model.surrogate())
            x_adv, columns = attack.perturb(surrogate, x, y, Context(seed(self.seed, name, start)))
        attack.threat.check(x, x_adv)
        found.x_adv[rows] = x_adv.detach()
        for column, values in columns.items():
            found.columns.setdefault(column, torch.zeros(len(self.x), dtype=values.dtype, device=values.device))
            found.columns[column][rows] = values


def require_numbers(*values: Tensor) -> None:
    """Raise NotMeasured where a value is NaN, of which every comparison is false."""
    if any(bool(each.isnan().any()) for each in values):
        raise NotMeasured("the model gives NaN (C3)")


def accuracy(correct: Tensor) -> float:
    """Share of True."""
    return int(correct.sum()) / len(correct)


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to 160 characters."""
    return str(error).partition("\n")[0][:160]


def scaled(threat: Threat, factor: Fraction) -> Threat:
    """The threat with eps times `factor`, at most the whole pixel range under Linf."""
    eps = Epsilon(Fraction(threat.eps) * factor)
    return Threat(threat.norm, min(eps, Epsilon(1)) if threat.norm == "Linf" else eps)


def whole_box(threat: Threat, x: Tensor) -> Threat:
    """The same norm with a ball around any image of `x` that holds every image in [0,1]."""
    pixels = x[0].numel()
    return Threat(threat.norm, Epsilon({"Linf": 1, "L2": math.isqrt(pixels - 1) + 1, "L1": pixels}[threat.norm]))
