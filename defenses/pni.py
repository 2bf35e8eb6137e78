"""min_{w,a} E_n[ c CE(f(x), y) + (1-c) max_{x' in B(x, eps)} CE(f(x'), y) ], weights w_l + a_l std(w_l) n, n ~ N(0, I)

Parametric noise injection (He et al. 2019, arXiv 1811.09310), on weights: every convolution and linear layer adds
Gaussian noise of learnable size a_l to its weights, in training and at prediction, beside adversarial training.

The noise is fresh in each forward pass and shared by the batch; std(w_l) is that of the whole tensor and, like the
draw, a constant in the gradient; a_l has no weight decay, and may change its sign. Noise has its own switch and does
not follow train or eval mode. x' maximizes the loss against the prediction at x, as released (no label leaking), and
the adversarial term starts after 5 of 160 epochs (a fraction here). That prediction comes from the training pass, as
there; label=prediction is a pass of its own, in eval mode as the attack, for one F more. Their Nesterov momentum is
plain here.

One draw decides, as in the paper (n_draws = 1); more average the softmax. The published accuracies are of the
checkpoint best on test images under PGD without averaging over the noise, so expect less here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.core.adversarial_training import AdversarialTraining
from bench.core.defense import Batch, Losses, Updater
from bench.core.pgd import attack_loss
from bench.core.stochastic import NoiseSource, Randomized, noise_sites


class WeightNoise(NoiseSource):
    """Noise of size |a| std(w) on a weight tensor w; `a` is one number, one a channel, or one an element."""

    def __init__(self, weight: Tensor, per: str, initial: float) -> None:
        super().__init__()
        shapes = {"layer": (), "channel": (len(weight), *[1] * (weight.dim() - 1)), "element": tuple(weight.shape)}
        self.a = nn.Parameter(weight.new_full(shapes[per], initial))

    def std(self, signal: Tensor) -> Tensor:
        """a std(w), with the sign of a."""
        return self.a * signal.detach().std()


@dataclass
class PNI(AdversarialTraining):
    """Adversarial training with learnable weight noise. Costs 2 steps + 6 forward passes F an image."""

    predictor: ClassVar[str] = "randomised"
    cost: ClassVar[str] = "(2 steps + 6) F = 20F"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    revision: ClassVar[int] = 2
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 3e-4,
        "schedule": "step",
        "epochs": 160,
        "batch_size": 128,
    }

    per: Literal["layer", "channel", "element"] = "layer"
    """What has a noise size of its own."""
    initial: Annotated[float, Gt(0)] = 0.25
    """Noise size at the start, in units of the standard deviation of a layer's weights."""
    clean: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the clean cross-entropy; the adversarial one has the rest."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.03125
    """Fraction of training at its start without adversarial images."""
    label: Literal["prediction", "training", "true"] = "training"
    """Label that the attack leads away from: the net's prediction at the clean image in a pass of its own, that of the
    training pass, or the true one; the first costs one F more."""
    steps: Annotated[int, Gt(0)] = 7
    """Gradient steps of the inner maximization; each sees fresh noise."""
    rel_step_size: Annotated[float, Gt(0)] = 0.3225806451612903
    """Step size in units of eps: .01 / .031."""
    n_draws: Annotated[int, Gt(0)] = 1
    """Draws of the deployed prediction: one decides alone, several average their softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = self._adversarial = 0
        self._clean: Tensor | None = None  # logits of the step's clean training pass, while it runs

    def wrap(self, net: nn.Module) -> nn.Module:
        """The same net, whose convolutions and linear layers draw their weights."""
        for layer in [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
            # unsafe: no trial draw, which would move the random stream
            noise = WeightNoise(layer.weight, self.per, self.initial)
            parametrize.register_parametrization(layer, "weight", noise, unsafe=True)
        return net

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Weight decay everywhere but on the noise sizes, which it would drive to 0."""
        own = {id(size): size for size in noise_sizes(net)}
        rest = [p for p in net.parameters() if id(p) not in own]
        return [{"params": rest}, {"params": list(own.values()), "weight_decay": 0.0}]

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """As of any defense, but for label=training the clean pass comes first: its prediction guides the attack."""
        active = batch.progress >= self.warmup
        self._steps, self._adversarial = self._steps + 1, self._adversarial + active
        self._clean = net(batch.x) if active and self.label == "training" else None
        try:
            return super().step(net, updater, batch)
        finally:
            self._clean = None

    def inner(self, net: nn.Module, batch: Batch) -> Tensor | None:
        """Adversarial images against the noisy net; None during the warm-up."""
        return super().inner(net, batch) if batch.progress >= self.warmup else None

    def objective(self, target: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy to the label that the attack leads away from."""
        if self.label == "true":
            return attack_loss("ce", batch.y)
        with torch.no_grad():
            logits = target(batch.x) if self._clean is None else self._clean
        return attack_loss("ce", logits.argmax(1))

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """The two weighted cross-entropies, each under noise of its own; the clean one alone during the warm-up."""
        logits = net(batch.x) if self._clean is None else self._clean
        clean = F.cross_entropy(logits, batch.y, label_smoothing=batch.smoothing)
        if adv is None:
            return {"ce": clean}
        moved = F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)
        return {"ce": self.clean * clean, "adv": (1 - self.clean) * moved}

    def deploy(self, net: nn.Module) -> Randomized:
        """The noisy net; n_draws decide."""
        return Randomized(net, self.n_draws)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """Mean and largest size of the noise over layers; steps so far with adversarial images, and their share."""
        sizes = torch.stack([size.detach().abs().mean() for size in noise_sizes(net)])
        own = {"adv_steps": self._adversarial, "adv_share": self._adversarial / max(self._steps, 1)}
        active = {name: torch.tensor(float(value)) for name, value in own.items()}
        return {"noise_mean": sizes.mean(), "noise_max": sizes.max(), **active}

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor([self._steps, self._adversarial])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps, self._adversarial = state["steps"].tolist()


def noise_sizes(net: nn.Module) -> list[nn.Parameter]:
    """The learnable a_l of every noisy layer."""
    return [site.source.a for site in noise_sites(net) if isinstance(site.source, WeightNoise)]
