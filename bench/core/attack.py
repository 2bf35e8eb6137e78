"""Evaluations and attacks. The base class owns feasibility check and scoring: no attack marks its own homework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, Counted, frozen
from bench.core.rng import scope, seed
from bench.core.threat import Threat

Columns = dict[str, Tensor]


class Outcome(NamedTuple):
    """Per-sample results: named columns of length b, and the adversarial images where the evaluation makes any."""

    columns: Columns
    x_adv: Tensor | None = None


# Fresh draws that judge an image made against a randomised model; as many others choose between attacks.
DRAWS = 100


@dataclass
class Context:
    """What an evaluation may use beside model and images. `seed` belongs to one block of image indices, so that batch
    size, sharding and a kill change nothing; `clean_seed` likewise, the same for every attack, so that all of them see
    the clean images under the same draws (default: `seed`). `report(done, total, note)` feeds the live view.

    A long attack calls `save(tensors)` when a part of its work stands and finds in `saved`, after a kill, what it saved
    last for this block (empty at first). `others`: name and adversarial images of other evaluations on these very
    images, for an attack with `needs_images`.
    """

    seed: int
    report: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)
    saved: dict[str, Tensor] = field(default_factory=dict)
    save: Callable[[dict[str, Tensor]], None] = field(default=lambda tensors: None)
    others: tuple[tuple[str, Tensor], ...] = ()
    clean_seed: int | None = None

    def clean_draws(self) -> int:
        """The seed under which clean images are judged."""
        return seed(self.seed if self.clean_seed is None else self.clean_seed, "clean")


@dataclass
class Evaluation:
    """Base of all that judges a deployed model. A subclass is one file in `attacks/`; its fields are its settings.

    Class constants, literals so that the planner can read them without importing torch:
    `access` (what it sees of the model: "gradients", or "scores" for a search without them), `uses_threat` (is the
    budget part of the question), `norms` it supports, `kind` ("bounded" by eps or "minimal" norm), `needs_smoothed`
    (only for models that certify), `needs_draws` (only for models that draw at test time), `needs_images` (it works on
    adversarial images that the evaluations of the attack named by its setting `source` made of other rows),
    `uses_noise_model` (it reads the noise of the model itself, so that no average over draws can stand in),
    `uses_budgets` (one job for all budgets, which the planner puts into its setting `budgets`), `block` (images
    evaluated together: the unit of seed and resume, and a shard holds whole ones; a setting `block_size` takes its
    place), `revision` (raise it when results may change), `settings_added_later` (settings younger than the first
    records, as of a Defense), `test_settings` (cheap settings for the contract tests), `metric` (the column whose mean
    it is about, for an evaluation that judges no robustness: it has no column `correct`, and stands outside accuracies,
    worst case and rank).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}
    access: ClassVar[Literal["gradients", "scores"]] = "gradients"
    uses_threat: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    kind: ClassVar[Literal["bounded", "minimal"]] = "bounded"
    needs_smoothed: ClassVar[bool] = False
    needs_draws: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    uses_budgets: ClassVar[bool] = False
    uses_noise_model: ClassVar[bool] = False
    block: ClassVar[int] = 500
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ()
    test_settings: ClassVar[dict[str, Any]] = {}
    metric: ClassVar[str] = ""

    threat: Threat

    def unsupported_reason(self, model: Classifier) -> str | None:
        """Why this model cannot be evaluated so, or None. A cell that is not supported says so; it is no failure."""
        if self.threat.norm not in self.norms:
            return f"no {self.threat.norm} version; norms: {', '.join(self.norms)}"
        if self.needs_smoothed and not model.smoothed:
            return "needs a smoothed classifier"
        if self.needs_draws and not model.stochastic:
            return "needs a model that draws at test time; this one is deterministic"
        return None

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Judge the model on images `x` (b c h w, in [0,1]) with labels `y`; at least the column `correct`, or the one
        that it `metric`."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate")


@dataclass
class Attack(Evaluation):
    """An evaluation that perturbs images. A subclass defines `perturb` only."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Adversarial images for `x` against the frozen surrogate `model`, and further columns (may be empty)."""
        raise NotImplementedError(f"{type(self).__name__} must define perturb")

    @final
    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Perturb on the surrogate, check ball and box in float64, score with the model's own prediction rule.

        Columns: `correct` (right on the clean image and on the adversarial one), `clean`, `size` (norm of the
        perturbation), `forwards` and `backwards` (passes per image of the block), and what `perturb` adds. For a
        stochastic model `correct` is the deployed rule on the adversarial image alone, since a clean image that was
        wrong once is no fact, and the columns of `draw_columns` stand beside it.
        """
        with frozen(model), scope(seed(ctx.seed, "attack")):
            with torch.no_grad(), scope(ctx.clean_draws()):
                clean = model.predict(x) == y
            # A wrong clean image is lost already; where prediction is random, "wrong" is not a fact, so attack all.
            todo = torch.ones_like(clean) if model.stochastic else clean
            x_adv, extra = x.clone(), {}
            surrogate = Counted(model.surrogate())
            inner = _resumable(ctx, surrogate, todo)
            attacked = self.threat.radius > 0 and bool(todo.any())
            if attacked:
                found, columns = self.perturb(surrogate, x[todo], y[todo], inner)
                x_adv[todo] = found.detach()
                extra = {name: _spread(values, todo) for name, values in columns.items()}
            size = self._size(x, x_adv)
            correct = clean.clone()  # without a budget it is clean accuracy, for a stochastic model too
            if attacked:
                with torch.no_grad(), scope(seed(ctx.seed, "score")):
                    right = model.predict(x_adv) == y
                correct = right if model.stochastic else correct & right
            if model.stochastic:
                extra |= draw_columns(model, x_adv, y, ctx.seed)
        passes = {
            name: torch.full_like(size, count / len(x), dtype=torch.float32)
            for name, count in (("forwards", surrogate.forwards), ("backwards", surrogate.backwards))
        }
        return Outcome({"correct": correct, "clean": clean, "size": size, **passes, **extra}, x_adv)

    def _size(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return self.threat.check(x, x_adv).float()


@torch.no_grad()
def draw_columns(model: nn.Module, x: Tensor, y: Tensor, seed_: int, draws: int = DRAWS) -> Columns:
    """How single draws of a stochastic model judge images `x`; every draw is fresh, and none was seen by an attack.

    `select`: share of `draws` draws that are right, by which a worst case chooses between attacks; and on as many
    *other* draws, so that choosing adds no luck, `share`, `vote` (the majority is right) and `always` (all are).
    """
    with scope(seed(seed_, "select")):
        select = _votes(model, x, draws)
    with scope(seed(seed_, "single")):
        counts = _votes(model, x, draws)
    hits = counts.gather(1, y[:, None]).squeeze(1)
    return {
        "select": select.gather(1, y[:, None]).squeeze(1).float() / draws,
        "share": hits.float() / draws,
        "vote": counts.argmax(1) == y,
        "always": hits == draws,
    }


def _votes(model: nn.Module, x: Tensor, draws: int) -> Tensor:
    """How many of `draws` draws gave each class, int64 `b k`."""
    counts: Tensor | None = None
    for _ in range(draws):
        logits = model(x)
        counts = torch.zeros(logits.shape, dtype=torch.int64, device=x.device) if counts is None else counts
        counts.scatter_add_(1, logits.argmax(1, keepdim=True), torch.ones_like(counts[:, :1]))
    assert counts is not None
    return counts


def _resumable(ctx: Context, counted: Counted, todo: Tensor) -> Context:
    """The context for `perturb`, which sees the images `todo` only; passes made before a kill count as well."""
    passes = ctx.saved.get("passes", torch.zeros(2, dtype=torch.int64)).tolist()
    counted.forwards, counted.backwards = int(passes[0]), int(passes[1])

    def save(tensors: Columns) -> None:
        ctx.save({**tensors, "passes": torch.tensor([counted.forwards, counted.backwards])})

    own = {name: values for name, values in ctx.saved.items() if name != "passes"}
    return replace(ctx, saved=own, save=save, others=tuple((name, images[todo]) for name, images in ctx.others))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the attacked samples back at their places among all; NaN (or False) elsewhere."""
    fill = float("nan") if values.is_floating_point() else 0
    full = torch.full((len(mask), *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
    full[mask] = values
    return full
