"""The closed-form attack against EOT-PGD at equal numbers of passes, on trained models of a results folder.

python benchmarks/closed_form_vs_eot.py [--results DIR] [--data DIR] [--defenses smoothing rse pni noisy] [--n 200]
[--eps 0.1 0.2] [--forms STRUCTURE-LOSS-RIVALS ...] [--json FILE] prints one line per model, budget and attack.

Each closed form is followed by EOT-PGD (the gradient of the mean loss over S fresh draws, last iterate) on both losses,
with the smallest S that makes at least as many passes in the same number of steps; EOT with 32 draws is last. Images
are evaluated on draws that no attack used: `share` is the mean accuracy of 100 single draws, `rule` that of the
deployed prediction, `minus eot` the paired difference of the shares from the stronger EOT of equal passes, with its
standard error over images. `noisy`, which is deterministic, is attacked through its training noise, next to PGD with
the same number of passes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.closed_form import ClosedForm
from attacks.pgd import PGD
from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import AttackLoss, attack_loss, start_delta
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import load, test_block
from bench.jobs.model_files import load_model
from bench.planning.job import Job
from bench.records.store import Store, weights_file

FORMS = ("diag-margin-0", "adjoint-margin-1", "adjoint-log_win-1", "adjoint-margin-0", "jacobian-margin-1")
LOSSES: tuple[AttackLoss, ...] = ("ce", "cw")
DRAWS = 100
REFERENCE = 32  # draws of the EOT that ends each list


@dataclass
class EOT(Attack):
    """PGD on the mean loss of `draws` fresh draws a step; the last iterate."""

    draws: int = 1
    loss: AttackLoss = "ce"
    steps: int = 20
    rel_step_size: float = 0.1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        threat, objective = self.threat, attack_loss(self.loss, y)
        x_adv = threat.project_to_image(x, x + start_delta("uniform", x, threat))
        for _ in range(self.steps):
            x_adv.requires_grad_(True)
            total = torch.zeros_like(x)
            for _ in range(self.draws):
                (grad,) = torch.autograd.grad(objective(model(x_adv)).sum(), x_adv)
                total += grad
            x_adv = threat.project_to_image(
                x, x_adv.detach() + self.rel_step_size * threat.radius * threat.steepest_direction(total)
            )
        return x_adv, {}


def line(model: Classifier, attack: Attack, x: Tensor, y: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Passes and robust accuracy of an attack on all images, and for each image the share of correct fresh draws."""
    with frozen(model), scope(seed("closed_form_vs_eot", "attack")):
        counted, started = Counted(model.surrogate()), time.process_time()
        x_adv, _ = attack.perturb(counted, x, y, Context(0))
        seconds = time.process_time() - started
    attack.threat.check(x, x_adv)
    with torch.no_grad(), frozen(model), scope(seed("closed_form_vs_eot", "score")):
        rule = model.predict(x_adv) == y
        draws = DRAWS if model.stochastic else 1
        share = torch.stack([model(x_adv).argmax(1) == y for _ in range(draws)]).float().mean(0)
    passes = (counted.forwards + counted.backwards) / len(x)
    facts = {"passes": round(passes, 1), "attack_seconds": round(seconds, 2)}
    return {**facts, "share": round(float(share.mean()), 4), "rule": round(float(rule.float().mean()), 4)}, share


def rivals_of(model: Classifier, passes: float, threat: Threat, steps: int) -> dict[str, Attack]:
    """The attacks of at least as many passes an image as the closed form took."""
    if not model.stochastic:
        restarts = max(1, -(-int(passes) // (2 * steps + 1)))
        kinds: dict[str, dict[str, Any]] = {
            f"pgd-{loss} x{restarts}": {"loss": loss, "restarts": restarts, "steps": steps} for loss in LOSSES
        }
        return {name: PGD(threat, **settings) for name, settings in kinds.items()}
    draws = max(1, -(-int(passes) // (2 * steps)))
    return {f"eot-{loss} S={draws}": EOT(threat, draws=draws, loss=loss, steps=steps) for loss in LOSSES}


def compare(
    model: Classifier, x: Tensor, y: Tensor, threat: Threat, forms: list[str], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """All attacks on one model at one budget, each printed as soon as it is done."""
    lines: list[dict[str, Any]] = []
    known: dict[str, tuple[dict[str, Any], Tensor]] = {}

    def run(name: str, attack: Attack) -> tuple[dict[str, Any], Tensor]:
        if name not in known:
            known[name] = line(model, attack, x, y)
            tell(name, known[name][0])
        return known[name]

    def tell(name: str, facts: dict[str, Any]) -> None:
        lines.append({**about, "attack": name, **facts})
        print(json.dumps(lines[-1]), flush=True)

    for form in forms:
        structure, loss, count = form.split("-")
        attack = ClosedForm(threat, structure=structure, loss=loss, rivals=int(count))  # type: ignore[arg-type]
        facts, share = line(model, attack, x, y)
        others = rivals_of(model, facts["passes"], threat, attack.steps)
        theirs = min((run(name, other) for name, other in others.items()), key=lambda found: float(found[0]["share"]))
        gap = share - theirs[1]
        error = float(gap.std()) / len(gap) ** 0.5
        tell(
            f"closed_form {form}",
            {**facts, "minus_eot": round(float(gap.mean()), 4), "standard_error": round(error, 4)},
        )
    if model.stochastic:
        for loss in LOSSES:
            run(f"eot-{loss} S={REFERENCE}", EOT(threat, draws=REFERENCE, loss=loss))
    return lines


def trainings(store: Store, defenses: list[str]) -> list[Job]:
    """One finished MNIST training of each defense, with its weights."""
    found: dict[str, Job] = {}
    for key in sorted(path.name for path in store.root.iterdir() if (path / weights_file("last")).exists()):
        job = store.job(key)
        name, plain = job.defense.name, job.data.name == "mnist" and job.seed == 0
        if job.kind == "train" and plain and name in defenses and name not in found:
            found[name] = job
    return [found[name] for name in defenses if name in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--defenses", nargs="+", default=["smoothing", "rse", "pni", "noisy"])
    parser.add_argument("--keys", nargs="+", default=[], help="trainings by key, instead of one of each defense")
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--eps", nargs="+", default=["0.1", "0.2"])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store, lines = Store(options.results), []
    for job in [store.job(key) for key in options.keys] or trainings(store, options.defenses):
        data = load("mnist", root=options.data, device=torch.device("cpu"), test=options.n)
        model, (x, y) = load_model(store, job, data), test_block(data, 0, options.n)
        about = {"defense": job.defense.name, "key": job.key, "n": options.n}
        for eps in options.eps:
            forms = options.forms
            if job.defense.name == "noisy":
                forms = [*forms, "jacobian-training-0"]
            lines += compare(model, x, y, Threat("Linf", Epsilon(eps)), forms, {**about, "eps": eps})
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
