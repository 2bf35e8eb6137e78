"""Base classes of evaluations and attacks. `Attack.evaluate` checks feasibility and scores; an attack only perturbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, Counted, frozen
from bench.core.method import Method, described
from bench.core.rng import scope, seed
from bench.core.stochastic import draw_columns

Columns = dict[str, Tensor]


class Unsupported(Exception):
    """The attack does not apply to the model, which only its images show; the table gives the reason."""


class Outcome(NamedTuple):
    """Results per image: named columns of length b, and the adversarial images if the evaluation makes any."""

    columns: Columns
    x_adv: Tensor | None = None


@dataclass
class Context:
    """What an evaluation may use beside model and images.

    - `seed`: seed of this block of image indices, so that batch size, sharding and a restart do not change results.
    - `report(done, total, note)`: progress for the live view.
    - `saved`: what an earlier attempt saved last for this block (empty at first).
    - `save(tensors)`: saves partial work; a long attack calls it whenever a part is complete.
    - `others`: name and adversarial images of other evaluations on the same images, for attacks with `needs_images`.
    - `clean_seed`: seed for the clean images, equal for all attacks, so that all evaluate the clean images under the
      same noise draws (default: `seed`).
    - `first`: the place of the block's first image in the test set.
    """

    seed: int
    report: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)
    saved: dict[str, Tensor] = field(default_factory=dict)
    save: Callable[[dict[str, Tensor]], None] = field(default=lambda tensors: None)
    others: tuple[tuple[str, Tensor], ...] = ()
    clean_seed: int | None = None
    first: int = 0

    def correct(self, model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        """Images that the deployed model classifies correctly, bool of shape b; the same noise draws at every call."""
        drawn = self.seed if self.clean_seed is None else self.clean_seed
        with torch.no_grad(), scope(seed(drawn, "clean")):
            return model.predict(x) == y


@dataclass
class Evaluation(Method):
    """Base of everything that evaluates a deployed model. A subclass is one file in `attacks/`; its fields are its
    settings, `self.threat` is the threat model of the row.

    Methods:

    - `unsupported_reason(model)`: why the evaluation does not apply to a model, or None.
    - `evaluate(model, x, y, ctx)`: the columns of results, required.

    Class constants, besides those of `Method` (`cost` counts the clean prediction and the scoring too):

    - `access`: what it uses of the model, "gradients" or "scores" (logits only).
    - `norms`: norms that it supports.
    - `kind`: "bounded" by eps, or "minimal" (searches for the smallest perturbation).
    - `needs_smoothed`: applies only to models that can certify.
    - `needs_draws`: applies only to stochastic models; `needs_determinism`: only to others.
    - `needs_images`: works on adversarial images that the attack named by its setting `source` made for other rows.
    - `uses_budgets`: one job covers all budgets, which the planner passes as its setting `budgets`.
    - `uses_noise_model`: uses the model's noise distribution in closed form, so that averaging over draws (`eot`) does
      not replace it.
    - `block`: images evaluated together, the unit of seeds, checkpoints and shards; a setting `block_size` overrides
      it.
    - `needed_classes`: by a value of a setting (such as a loss), how many classes it needs if more than two.
    - `needed_side`: by norm, how many pixels the sides of an image need.
    - `unnamed_settings`: settings that names in tables leave out, since they change speed and random seeds only.
    - `proves`: an image counts as correct only with a proof that no perturbation within the budget changes its
      prediction. The accuracy is a lower bound of robust accuracy, and no part of the worst case.
    - `metric`: for an evaluation that does not measure robustness, the column whose mean is reported. It then has no
      column `correct`, and is no part of accuracies, worst case or rank. One whose name ends in `_accuracy` is a share
      in [0,1] and has a column of its own in tables.
    """

    access: ClassVar[Literal["gradients", "scores"]] = "gradients"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    kind: ClassVar[Literal["bounded", "minimal"]] = "bounded"
    needs_smoothed: ClassVar[bool] = False
    needs_draws: ClassVar[bool] = False
    needs_determinism: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    uses_budgets: ClassVar[bool] = False
    uses_noise_model: ClassVar[bool] = False
    block: ClassVar[int] = 500
    needed_classes: ClassVar[dict[str, int]] = {}
    needed_side: ClassVar[dict[str, int]] = {}
    unnamed_settings: ClassVar[tuple[str, ...]] = ()
    proves: ClassVar[bool] = False
    metric: ClassVar[str] = ""

    def unsupported_reason(self, model: Classifier) -> str | None:
        """Why the evaluation does not apply to this model, or None if it does; the table shows the reason."""
        if self.threat.norm not in self.norms:
            return f"no {self.threat.norm} version; norms: {', '.join(self.norms)}"
        if self.needs_smoothed and not model.smoothed:
            return "needs a smoothed classifier"
        if self.needs_draws and not model.stochastic:
            return "needs a stochastic model; this one is deterministic"
        if self.needs_determinism and model.stochastic:
            return "needs a deterministic model; this one is stochastic"
        return None

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Evaluate the model on images `x` (b c h w, in [0,1]) with labels `y` (b).

        Returns at least the bool column `correct`, or the column named by the constant `metric`. Raises Unsupported
        where the evaluation does not apply after all.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate")


@dataclass
class Attack(Evaluation):
    """An evaluation that perturbs images. A subclass defines `perturb`; this class checks and scores."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Adversarial images for `x` (b c h w) against the frozen surrogate `model`; further columns of length b."""
        raise NotImplementedError(f"{type(self).__name__} must define perturb")

    @final
    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Perturb on the surrogate, check ball and box in float64, score with the deployed prediction rule.

        Columns: `correct` (correct on the clean and on the adversarial image), `clean`, `size` (norm of the
        perturbation), `forwards` and `backwards` (passes per image, mean over the block), and those of `perturb`. For a
        stochastic model `correct` is the deployed prediction on the adversarial image alone, because one wrong
        prediction on the clean image proves nothing, and the columns of `draw_columns` are added.
        """
        with frozen(model), scope(seed(ctx.seed, "attack")):
            clean = ctx.correct(model, x, y)
            # misclassified clean images need no attack, unless prediction is random
            todo = torch.ones_like(clean) if model.stochastic else clean
            x_adv, extra = x.clone(), {}
            surrogate = Counted(model.surrogate())
            inner = _resumable(ctx, surrogate, todo)
            attacked = self.threat.radius > 0 and bool(todo.any())
            if attacked:
                perturbed = self.perturb(surrogate, x[todo], y[todo], inner)
                x_adv[todo], columns = _checked(perturbed, x[todo])
                extra = {name: _spread(values, todo) for name, values in columns.items()}
            size = self.threat.check(x, x_adv).float()
            correct = clean.clone()  # at eps 0 the clean accuracy, for a stochastic model too
            if attacked:
                with torch.no_grad(), scope(seed(ctx.seed, "score")):
                    correct_adv = model.predict(x_adv) == y
                correct = correct_adv if model.stochastic else correct & correct_adv
            if model.stochastic:
                extra |= draw_columns(model, x_adv, y, ctx.seed)
        columns = {"correct": correct, "clean": clean, "size": size, **surrogate.columns(x), **extra}
        return Outcome(columns, x_adv)


def _checked(perturbed: tuple[Tensor, Columns], x: Tensor) -> tuple[Tensor, Columns]:
    """What `perturb` returned for images `x`, detached. Raises TypeError or ValueError for anything else."""
    pair = perturbed if isinstance(perturbed, tuple) and len(perturbed) == 2 else (perturbed, None)
    if not isinstance(pair[0], Tensor) or not isinstance(pair[1], dict):
        found = f"({', '.join(map(described, perturbed))})" if isinstance(perturbed, tuple) else described(perturbed)
        raise TypeError(f"perturb must return (images, columns), such as `return x_adv, {{}}`, found {found}")
    if pair[0].shape != x.shape:
        raise ValueError(f"perturb returned images of shape {tuple(pair[0].shape)} for {tuple(x.shape)}")
    for name, values in pair[1].items():
        if not isinstance(values, Tensor) or values.shape[:1] != x.shape[:1]:
            raise ValueError(f"column '{name}' of perturb is {described(values)} for {len(x)} images")
    return pair[0].detach(), pair[1]


def _resumable(ctx: Context, counted: Counted, todo: Tensor) -> Context:
    """The context for `perturb`, which gets the images `todo` only; passes made before a restart are counted too."""
    passes = ctx.saved.get("passes", torch.zeros(2, dtype=torch.int64)).tolist()
    counted.forwards, counted.backwards = int(passes[0]), int(passes[1])

    def save(tensors: Columns) -> None:
        ctx.save({**tensors, "passes": torch.tensor([counted.forwards, counted.backwards])})

    own = {name: values for name, values in ctx.saved.items() if name != "passes"}
    return replace(ctx, saved=own, save=save, others=tuple((name, images[todo]) for name, images in ctx.others))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the attacked images at their positions in the block; NaN (or False) elsewhere."""
    fill = float("nan") if values.is_floating_point() else 0
    full = torch.full((len(mask), *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
    full[mask] = values
    return full
