"""Checks on one evaluation of the toy model."""

from functools import cached_property

import torch

from bench.contract.toy import copy, images, modes, same, threat, toy_model
from bench.core.attack import Context, Evaluation, Outcome
from bench.core.threat import Norm
from bench.terminal import counted


class EvaluationChecks:
    """One evaluation of the toy model on images that are mostly classified correctly, and the checks on it."""

    def __init__(self, cls: type[Evaluation], norm: Norm, kind: str) -> None:
        self.cls, self.norm, self.kind = cls, norm, kind
        self.x, y = images()
        with torch.no_grad():
            guess = toy_model(kind).net.eval()(self.x).argmax(1)
        self.y = torch.where(torch.arange(len(y)) < 10, guess, y)

    def attack(self, scale: int = 1) -> Evaluation:
        """The evaluation, at the budget of the checks times `scale`."""
        return self.cls(threat(self.norm, scale), **self.cls.test_settings)

    def run(self, scale: int = 1) -> tuple[Outcome, str | None]:
        """The outcome, and a side effect on the model or the random generator, if there is one."""
        model = toy_model(self.kind)
        before, flags, generator = copy(model), modes(model), torch.get_rng_state()
        outcome = self.attack(scale).evaluate(model, self.x, self.y, Context(7))
        side_effects = {
            "a module's training mode or a parameter's requires_grad changed": modes(model) != flags,
            "gradients remain on parameters": any(p.grad is not None for p in model.parameters()),
            "the global random generator moved": not torch.equal(generator, torch.get_rng_state()),
        }
        found = [text for text, true in side_effects.items() if true]
        return outcome, same(before, model.state_dict()) or (found[0] if found else None)

    @cached_property
    def first(self) -> tuple[Outcome, str | None]:
        """The first run, shared by the checks."""
        return self.run()

    def runs(self) -> str | None:
        _ = self.first  # raises what the evaluation raises
        return None

    def has_no_side_effects(self) -> str | None:
        return self.first[1]

    def columns(self) -> str | None:
        columns, measured = self.first[0].columns, self.cls.metric
        if measured and ("correct" in columns or measured not in columns):
            return f"its metric is '{measured}': it must have that column, and none named 'correct'"
        if not measured and ("correct" not in columns or columns["correct"].dtype != torch.bool):
            return "a bool column 'correct' is missing"
        for name, values in columns.items():
            if values.shape[:1] != (len(self.x),):
                return f"column '{name}' has shape {tuple(values.shape)} for {counted(len(self.x), 'image')}"
        # a stochastic model may misclassify a clean image by chance
        deterministic = {"correct", "clean"} <= columns.keys() and "share" not in columns
        if deterministic and bool((columns["correct"] & ~columns["clean"]).any()):
            return "an image is correct under attack and not correct without"
        return None

    def is_reproducible(self) -> str | None:
        (one, _), (other, _) = self.first, self.run()
        images = {} if one.x_adv is None or other.x_adv is None else {"images": (one.x_adv, other.x_adv)}
        pairs = {**{f"column '{n}'": (v, other.columns[n]) for n, v in one.columns.items()}, **images}
        changed = [name for name, (a, b) in pairs.items() if not torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))]
        return f"{', '.join(changed)} differ between two runs" if changed else None

    def is_feasible(self) -> str | None:
        outcome, _ = self.first
        if outcome.x_adv is None:
            return "an attack must return adversarial images"
        threat(self.norm).check(self.x, outcome.x_adv)
        return None

    def zero_budget(self) -> str | None:
        outcome, _ = self.run(scale=0)
        same = torch.equal(outcome.columns["correct"], outcome.columns["clean"])
        unchanged = outcome.x_adv is not None and torch.equal(outcome.x_adv, self.x)
        return None if same and unchanged else "images or predictions differ from the clean ones"


def supported_cases(cls: type[Evaluation]) -> list[EvaluationChecks]:
    """Norms and kinds of model that the evaluation supports; one norm is enough where it ignores the threat."""
    norms: tuple[Norm, ...] = cls.norms if cls.uses_threat else ("Linf",)  # type: ignore[assignment]
    pairs = [(norm, kind) for norm in norms for kind in ("deterministic", "randomised", "smoothed")]
    checks = [EvaluationChecks(cls, norm, kind) for norm, kind in pairs]
    return [check for check in checks if check.attack().unsupported_reason(toy_model(check.kind)) is None]
