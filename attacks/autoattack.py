"""x' = the first of APGD-CE, targeted APGD-DLR, targeted FAB and Square to break f at x

AutoAttack (Croce and Hein 2020, arXiv 2003.01690), from the package of its authors (pyautoattack): `standard` is
apgd-ce, apgd-t, fab-t, square; `plus` more attacks and restarts; `rand` APGD with the mean of 20 gradients.

Attacks, settings, order and seeds are those of the package and its verdicts are reproduced bit for bit, but the loop
over them is ours: its own leaves a trace hook, a counter and a state file that cannot be reloaded. With fewer than 10
classes the targets are all other classes. A stochastic model is attacked by `rand` whatever `version` says, without
its flaw of taking one lucky noisy pass for success: no image leaves early, and of all iterates gathered the one kept
is most often wrong over further draws.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.pgd import margin
from bench.core.rng import scope, seed


@dataclass
class AutoAttack(Attack):
    """The standard ensemble. Column `stage`: place in the list of the attack that broke the image, -1 for none.

    In `stage` the first attack is 1, and 0 stands for an image that is wrong without any. For a stochastic model it
    names the attack whose image was kept.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    block: ClassVar[int] = 500
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ("block_size",)
    test_settings: ClassVar[dict[str, Any]] = {"version": "custom", "attacks_to_run": ["apgd-ce"], "eot": 1}

    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    """The ensemble; custom runs `attacks_to_run` with the package's settings of version plus."""
    attacks_to_run: list[Literal["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]] = field(
        default_factory=list
    )
    """Attacks of version custom, in order; empty otherwise."""
    batch_size: Annotated[int, Gt(0)] = 100
    """Images attacked together; each batch starts from the same seed, as in the package."""
    eot: Annotated[int, Gt(0)] = 20
    """Gradients averaged at each step of APGD in version rand and for stochastic models."""
    block_size: Annotated[int, Gt(0)] = 500
    """Images of a block, the unit of seeds and shards; attacks go over all that stand of a block in batches."""

    def __post_init__(self) -> None:
        if (self.version == "custom") != bool(self.attacks_to_run):
            raise ValueError("attacks_to_run goes with version=custom, and version=custom needs attacks_to_run")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Images of the first attack that broke each, and `stage`; unbroken images come back unchanged."""
        stochastic = bool(getattr(model, "stochastic", False))
        with torch.no_grad():
            state = ctx.saved or self._nothing(x, model(x[:1]).shape[1])
            suite = self._suite(model, x, int(state["classes"]), ctx.seed % 2**31, stochastic)
            run = self._gather if stochastic else self._cascade
            run(suite, model, x, y, ctx, state)
        return state["x_adv"], {"stage": state["stage"]}

    def _nothing(self, x: Tensor, classes: int) -> Columns:
        """The state before the first attack: `next` is the place in the list and the batch that come next."""
        return {
            "classes": torch.tensor(classes),
            "x_adv": x.clone(),
            "stage": torch.full((len(x),), -1, dtype=torch.int8, device=x.device),
            "best": torch.full((len(x), 2), float("-inf"), device=x.device),
            "next": torch.tensor([1, 0]),
        }

    def _suite(self, model: nn.Module, x: Tensor, classes: int, number: int, stochastic: bool) -> Any:
        """The package's ensemble, silenced and fitted to the number of classes. Raises ValueError if there are few."""
        from pyautoattack import AutoAttack as Suite

        version = "rand" if stochastic and self.version != "custom" else self.version
        suite = Suite(
            model,
            attacks=list(self.attacks_to_run) or None,
            device=x.device,
            eps=self.threat.radius,
            norm=self.threat.norm,
            seed=number,
            version=version,
        )
        for name, needed in (("apgd-t", 4), ("fab-t", 4), ("apgd-dlr", 3)):
            if name in suite.attacks_to_run and classes < needed:
                raise ValueError(
                    f"AutoAttack's {name} needs at least {needed} classes, this model has {classes}; "
                    "use version=custom with attacks_to_run=[apgd-ce, fab, square]"
                )
        for part in (suite.apgd_targeted, suite.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        if stochastic or self.version == "rand":
            suite.apgd.eot_iter = suite.apgd_targeted.eot_iter = self.eot
        mute = logging.Logger("autoattack")  # registered nowhere, so no handler is touched
        mute.disabled = True
        suite.apgd.logger = suite.apgd_targeted.logger = mute
        return suite

    def _cascade(self, suite: Any, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, state: Columns) -> None:
        """Each attack in turn on what still stands; what stands after a batch is kept against a kill."""
        names, stage = suite.attacks_to_run, state["stage"]
        for number, name in enumerate(names, start=1):
            stood = ((stage < 0) | (stage >= number)).nonzero().squeeze(1)  # before this attack
            if len(stood) == 0:
                break
            for batch, rows in enumerate(stood.split(self.batch_size)):
                if [number, batch] < state["next"].tolist():
                    continue
                found = _run(suite, name, x[rows], y[rows])
                broken = model(found).argmax(1) != y[rows]
                state["x_adv"][rows[broken]] = found[broken].to(x)
                stage[rows[broken]] = number
                ctx.save({**state, "next": torch.tensor([number, batch + 1])})
                done = number - 1 + min(1.0, (batch + 1) * self.batch_size / len(stood))
                ctx.report(int(100 * done), 100 * len(names), f"{name}: {int((stage < 0).sum())} of {len(x)} stand")

    def _gather(self, suite: Any, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, state: Columns) -> None:
        """Every attack on every image; the candidate most often wrong over fresh draws is kept, ties by mean margin."""
        names, best = suite.attacks_to_run, state["best"]
        for number, name in enumerate(names, start=1):
            for batch, rows in enumerate(torch.arange(len(x), device=x.device).split(self.batch_size)):
                if [number, batch] < state["next"].tolist():
                    continue
                with scope(seed(ctx.seed, name, batch)):  # the same draws before and after a kill
                    for found in _candidates(suite, name, x[rows], y[rows]):
                        score = self._score(model, found, y[rows])
                        old = best[rows]
                        better = (score[:, 0] > old[:, 0]) | ((score[:, 0] == old[:, 0]) & (score[:, 1] > old[:, 1]))
                        kept = rows[better]
                        state["x_adv"][kept], best[kept] = found[better].to(x), score[better]
                        state["stage"][kept] = number
                ctx.save({**state, "next": torch.tensor([number, batch + 1])})
            ctx.report(number, len(names), f"{name}: wrong in {float(best[:, 0].mean()):.0%} of draws")

    def _score(self, model: nn.Module, found: Tensor, y: Tensor) -> Tensor:
        """Share of fresh draws that are wrong, and mean margin, shape b 2."""
        draws = torch.stack([margin(model(found), y) for _ in range(self.eot)])
        return torch.stack([(draws > 0).float().mean(0), draws.mean(0).float()], dim=1)


def _run(suite: Any, name: str, x: Tensor, y: Tensor) -> Tensor:
    """One attack of the suite on one batch, prepared as the package's own loop does."""
    if name in ("apgd-ce", "apgd-dlr"):
        suite.apgd.loss = name.removeprefix("apgd-")
    if name in ("fab", "fab-t"):
        suite.fab.targeted = name == "fab-t"
        suite.fab.n_restarts = 1 if name == "fab-t" else suite.fab.n_restarts
    others = {"apgd-t": suite.apgd_targeted, "fab": suite.fab, "fab-t": suite.fab, "square": suite.square}
    attack = others.get(name, suite.apgd)
    attack.seed = suite.get_seed()
    return attack.perturb(x, y)


def _candidates(suite: Any, name: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """What one attack offers against noise: for APGD the iterate of highest loss and the last one seen wrong."""
    if name not in ("apgd-ce", "apgd-dlr"):
        return [_run(suite, name, x, y)]
    suite.apgd.loss = name.removeprefix("apgd-")
    suite.apgd.init_hyperparam(x)
    torch.manual_seed(suite.get_seed())
    best, _, _, wrong = suite.apgd.attack_single_run(x, y)
    return [best, wrong]
