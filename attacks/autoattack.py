"""x' = the first of APGD-CE, targeted APGD-DLR, targeted FAB and Square to break f at x

AutoAttack (Croce and Hein 2020, arXiv 2003.01690), from the package of its authors (pyautoattack): `standard` is
apgd-ce, apgd-t, fab-t, square; `plus` has more attacks and restarts; `rand` is APGD with the mean of 20 gradients.

Attacks, settings, order and seeds are those of the package, and its results are reproduced bit for bit. The loop over
attacks is ours, because the package's leaves a hook and a counter behind and writes a state file that cannot be
reloaded. With fewer than 10 classes the targets are all other classes. Targeted DLR divides by the fourth largest logit
and DLR by the third: with 3 classes DLR takes the place of targeted DLR, with 2 both are left out. A stochastic model
is attacked by `rand` whatever `version` is, with one correction: the package accepts a single misclassified noise draw
as success; here every image goes through all attacks, and of all candidates we keep the one that is misclassified in
most of further draws.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import predicted
from bench.core.pgd import margin
from bench.core.rng import scope, seed


@dataclass
class AutoAttack(Attack):
    """The standard ensemble. Column `stage`: number of the attack that broke the image, -1 for none.

    The first attack is 1; 0 is an image that is misclassified without an attack. For a stochastic model it is the
    attack whose image was selected.
    """

    block: ClassVar[int] = 500
    cost: ClassVar[str] = "1000F to 9000F"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ("block_size",)
    unnamed_settings: ClassVar[tuple[str, ...]] = ("batch_size",)
    needed_classes: ClassVar[dict[str, int]] = {"apgd-t": 4, "apgd-dlr": 3}
    needed_side: ClassVar[dict[str, int]] = {"L2": 5, "L1": 5}  # Square's first pattern has 5x5 tiles
    test_settings: ClassVar[dict[str, Any]] = {"version": "custom", "attacks_to_run": ["apgd-ce"], "eot": 1}

    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    """The ensemble; custom runs `attacks_to_run` with the package's settings of version plus."""
    attacks_to_run: list[Literal["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]] = field(
        default_factory=list
    )
    """Attacks of version custom, in order; empty for the other versions."""
    batch_size: Annotated[int, Gt(0)] = 100
    """Images attacked together; each batch starts from the same seed, as in the package."""
    eot: Annotated[int, Gt(0)] = 20
    """Gradients averaged at each step of APGD in version rand and for stochastic models."""
    block_size: Annotated[int, Gt(0)] = 500
    """Images in a block, the unit of seeds and shards; each attack processes the images of a block that are still
    robust, in batches."""

    def __post_init__(self) -> None:
        if (self.version == "custom") != bool(self.attacks_to_run):
            raise ValueError("attacks_to_run goes with version=custom, and version=custom needs attacks_to_run")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """For each image the result of the first attack that breaks it, else the image itself; and `stage`."""
        stochastic = bool(getattr(model, "stochastic", False))
        with torch.no_grad():
            state = ctx.saved or self._initial_state(x, classes=model(x[:1]).shape[1])
            suite = self._suite(model, x, int(state["classes"]), ctx.seed % 2**31, stochastic)
            if stochastic:
                self._attack_stochastic(suite, model, x, y, ctx, state)
            else:
                self._attack_in_turn(suite, model, x, y, ctx, state)
        return state["x_adv"], {"stage": state["stage"]}

    def _initial_state(self, x: Tensor, classes: int) -> Columns:
        """The state before the first attack. `next`: number of the attack and of the batch that come next; `best`:
        score of each image's best candidate (stochastic models)."""
        return {
            "classes": torch.tensor(classes),
            "x_adv": x.clone(),
            "stage": torch.full((len(x),), -1, dtype=torch.int8, device=x.device),
            "best": torch.full((len(x), 2), float("-inf"), device=x.device),
            "next": torch.tensor([1, 0]),
        }

    def _suite(self, model: nn.Module, x: Tensor, classes: int, seed: int, stochastic: bool) -> Any:
        """The package's ensemble without its log messages, for this number of classes: None in place of an attack that
        needs more of them. Raises ValueError if version custom names such an attack."""
        from pyautoattack import AutoAttack as Suite

        version = "rand" if stochastic and self.version != "custom" else self.version
        suite = Suite(
            model,
            attacks=list(self.attacks_to_run) or None,
            device=x.device,
            eps=self.threat.radius,
            norm=self.threat.norm,
            seed=seed,
            version=version,
        )
        suite.attacks_to_run = [self._fitting(name, classes) for name in suite.attacks_to_run]
        for attack in (suite.apgd_targeted, suite.fab):
            attack.n_target_classes = min(attack.n_target_classes, classes - 1)
        if stochastic or self.version == "rand":
            suite.apgd.eot_iter = suite.apgd_targeted.eot_iter = self.eot
        silent = logging.Logger("autoattack")  # not registered, so that no other logger is affected
        silent.disabled = True
        suite.apgd.logger = suite.apgd_targeted.logger = silent
        return suite

    def _fitting(self, name: str, classes: int) -> str | None:
        """The attack itself, or what takes its place with fewer classes than it needs."""
        if classes >= self.needed_classes.get(name, 2):
            return name
        if self.version == "custom":
            raise ValueError(f"AutoAttack's {name} needs {self.needed_classes[name]} classes, this model has {classes}")
        return "apgd-dlr" if name == "apgd-t" and classes == 3 else None

    def _attack_in_turn(self, suite: Any, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, state: Columns) -> None:
        """Each attack on the images that are still robust. The state is saved after every batch."""
        attacks, x_adv, stage = suite.attacks_to_run, state["x_adv"], state["stage"]
        for number, name in enumerate(attacks, start=1):
            if name is None:
                continue
            robust = ((stage < 0) | (stage >= number)).nonzero().squeeze(1)  # before this attack, also after a restart
            if len(robust) == 0:
                break
            for batch, rows in enumerate(robust.split(self.batch_size)):
                if [number, batch] < state["next"].tolist():
                    continue  # done before a restart
                candidates = _run(suite, name, x[rows], y[rows])
                broken = predicted(model(candidates)) != y[rows]
                x_adv[rows[broken]] = candidates[broken].to(x)
                stage[rows[broken]] = number
                ctx.save({**state, "next": torch.tensor([number, batch + 1])})
                done = number - 1 + min(1.0, (batch + 1) * self.batch_size / len(robust))
                note = f"{name}: {int((stage < 0).sum())} of {len(x)} still robust"
                ctx.report(int(100 * done), 100 * len(attacks), note)

    def _attack_stochastic(
        self, suite: Any, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, state: Columns
    ) -> None:
        """Each attack on every image of a stochastic model. For each image we keep the candidate that is misclassified
        in most fresh draws, of equal ones that with the larger mean margin."""
        attacks, x_adv, best = suite.attacks_to_run, state["x_adv"], state["best"]
        for number, name in enumerate(attacks, start=1):
            if name is None:
                continue
            for batch, rows in enumerate(torch.arange(len(x), device=x.device).split(self.batch_size)):
                if [number, batch] < state["next"].tolist():
                    continue  # done before a restart
                with scope(seed(ctx.seed, name, batch)):  # the same draws before and after a restart
                    for candidates in _candidates(suite, name, x[rows], y[rows]):
                        score = self._score(model, candidates, y[rows])
                        (wrong, margins), (best_wrong, best_margins) = score.T, best[rows].T
                        better = (wrong > best_wrong) | ((wrong == best_wrong) & (margins > best_margins))
                        x_adv[rows[better]] = candidates[better].to(x)
                        best[rows[better]], state["stage"][rows[better]] = score[better], number
                ctx.save({**state, "next": torch.tensor([number, batch + 1])})
            ctx.report(number, len(attacks), f"{name}: misclassified in {float(best[:, 0].mean()):.0%} of draws")

    def _score(self, model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
        """Share of fresh draws in which an image is misclassified (NaN is), and mean margin, shape b 2."""
        margins = torch.stack([margin(model(x_adv), y) for _ in range(self.eot)])
        return torch.stack([(~(margins <= 0)).float().mean(0), margins.mean(0).float()], dim=1)


def _run(suite: Any, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Adversarial images of one attack of the suite for one batch, configured as in the package's own loop."""
    match name:
        case "apgd-ce" | "apgd-dlr":
            attack = suite.apgd
            attack.loss = name.removeprefix("apgd-")
        case "apgd-t":
            attack = suite.apgd_targeted
        case "fab":
            attack = suite.fab
            attack.targeted = False
        case "fab-t":
            attack = suite.fab
            attack.targeted, attack.n_restarts = True, 1
        case _:
            attack = suite.square
    attack.seed = suite.get_seed()
    return attack.perturb(x, y)


def _candidates(suite: Any, name: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """Candidates of one attack on a stochastic model: for APGD the iterate of highest loss and the last misclassified
    one."""
    if name not in ("apgd-ce", "apgd-dlr"):
        return [_run(suite, name, x, y)]
    suite.apgd.loss = name.removeprefix("apgd-")
    suite.apgd.init_hyperparam(x)
    torch.manual_seed(suite.get_seed())
    highest_loss, _, _, last_misclassified = suite.apgd.attack_single_run(x, y)
    return [highest_loss, last_misclassified]
