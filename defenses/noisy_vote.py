"""argmax_c P(f(x; W1 x + b + s n) = c), n ~ N(0, I), trained by noisy's closed form; R = s Phi^-1(p) / ||W1||_2

Noise injection (Arous et al. 2023, arXiv 2312.08877) kept at prediction (Cohen et al. 2019, arXiv 1902.02918): the
training of the first with the vote and the certificate of the second.

Not a published method. Training is that of `noisy`, bit for bit, at equal settings. The paper removes the noise after
training; here the prediction is the vote of n_vote noise draws, which abstains where its leader is not significant.
Noise on the first layer's pre-activation W1 x + b is randomized smoothing in that space, so no change of the image
smaller than R in L2 changes the vote, with p a lower confidence bound of its leader's probability. ||W1||_2 is the norm
of the whole map from the image in [0,1] to the site (normalization, stride, padding), exact or an upper bound
(bench.noise.affine_map). Certificate and predictions are those of the vote, not of the net without noise.

A site that no affine map reaches from the image certifies nothing. The settings are those of `noisy`, described in its
file and in bench.noise.closed_form, and two more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Gt, Lt
from torch import Tensor, nn

from bench.core.defense import Batch, Losses
from bench.core.stochastic import NoiseSource, noise_off
from bench.noise.gaussian_noise import NoiseScale
from bench.noise.graph import trace
from bench.noise.inner_smoothing import InnerSmoothed
from bench.noise.propagation import site_node
from defenses.noisy import Noisy


class _TrainedNoise(NoiseSource):
    """The noise of the site, with the scale that the net stores for it and may have learned."""

    def __init__(self, scale: NoiseScale) -> None:
        super().__init__()
        self._held = (scale,)  # a tuple, so that the scale is stored once, where `noisy` stores it

    def _scale(self) -> Tensor:
        return self._held[0].sigma().detach()

    @property
    def sigma(self) -> float:
        """The scale as a number."""
        return float(self._scale())

    def std(self, signal: Tensor) -> Tensor:
        return self._scale().to(signal.dtype)


@dataclass
class NoisyVote(Noisy):
    """`noisy` with its noise on at prediction: 3 (1 + probes + rows) F in training, n_vote F at prediction."""

    predictor: ClassVar[str] = "smoothed"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3, "n_vote": 20}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation in training and in the vote, in units of the quantity at the site."""
    learn_sigma: bool = False
    """Train s too; the vote uses the learned s."""
    n_vote: Annotated[int, Gt(0)] = 100
    """Draws of the deployed vote."""
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.001
    """Probability that the deployed vote returns another class than the ideal vote."""

    def wrap(self, net: nn.Module) -> nn.Module:
        node = site_node(trace(net), net, self.site)
        net = super().wrap(net)
        image = node.op == "placeholder"
        layer = net if image else net.get_submodule(str(node.target))
        _TrainedNoise(net.noise).attach(layer, "input" if image else "output")  # type: ignore[arg-type]
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        with noise_off(net):
            super().check(net, x, classes)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        with noise_off(net):
            return super().loss(net, batch, adv)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        with noise_off(net):
            return super().metrics(net)

    def deploy(self, net: nn.Module) -> InnerSmoothed:
        """The vote over the noise that the net was trained under."""
        return InnerSmoothed(net, self.n_vote, self.alpha)
