"""argmax_c P(f(x; W1 x + b + s n) = c), n ~ N(0, I), trained by noisy's closed form; R = s Phi^-1(p) / ||W1||_2

Noise injection (Arous et al. 2023, arXiv 2312.08877) kept at prediction (Cohen et al. 2019, arXiv 1902.02918): the
training of the one, the vote and the certificate of the other.

Not a published method. Training is `noisy`, bit for bit, at equal settings. The paper withdraws the noise; here the
prediction is the vote of n_vote draws, which abstains where its leader is not sure. The noise at the first layer's
pre-activation W1 x + b is randomised smoothing there, so no change of the image below R in L2 turns the vote, p being a
lower bound of its leader's share. ||W1||_2 is the norm of the whole map from the image in [0,1] to the site
(normalisation, stride, padding, and with post_bn BatchNorm), exact or an upper bound (bench.noise.affine_map).
Certificate and predictions are of the vote, not of the net without noise.

A site that no affine map reaches from the image certifies nothing; of several sites the best one certifies, and the
others may be anywhere. scale=relative is refused: the noise would depend on the other images of a batch, and no
certificate holds. The settings are those of `noisy`, whose file tells more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from bench.core.defense import Batch, Losses
from bench.core.stochastic import NoiseSource, noise_off
from bench.noise.affine_map import trace
from bench.noise.inner_smoothing import InnerSmoothed
from bench.noise.propagation import site_nodes
from defenses.noisy import Noise, Noisy


class _Own(NoiseSource):
    """The noise of one site, with the scale that the net keeps (and may have learned) for it."""

    def __init__(self, scales: Noise, place: int) -> None:
        super().__init__()
        self._scales = (scales,)  # a tuple, so that the scale is stored once, where `noisy` stores it
        self._place = place

    def _scale(self) -> Tensor:
        return self._scales[0].sigma().detach().reshape(-1)[self._place]

    @property
    def sigma(self) -> float:
        """The scale as a number."""
        return float(self._scale())

    def std(self, signal: Tensor) -> Tensor:
        return self._scale().to(signal.dtype)


@dataclass
class NoisyVote(Noisy):
    """`noisy` with its noise on at prediction: 3 (1 + probes + rows) F in training, n_vote F at prediction."""

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "smoothed"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    cost: ClassVar[str] = "3 (1 + probes + rows) F"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3, "n_vote": 20}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation in training and in the vote, in units of the quantity at the site."""
    learn_sigma: bool = False
    """Train s too; the vote has the s that was learned."""
    site: Literal["first", "input"] | list[int | Literal["input"]] = "first"
    """Where the noise enters: what the first convolution or linear layer puts out, the image, or a list."""
    structure: Literal["jacobian", "diag", "adjoint", "ungated", "sampled"] = "jacobian"
    """Covariance of the logits in training."""
    rows: Annotated[int, Ge(0)] = 1
    """Strongest competitors in the probability term; 0 = all classes."""
    probes: Annotated[int, Ge(0)] = 1
    """Random probes for the trace in the squared error; 0 = exact."""
    relu: Literal["laplace", "adf"] = "laplace"
    """Moments behind an activation or max-pool in diag and adjoint."""
    target: Literal["logits", "softmax"] = "logits"
    """What the squared error compares with the one-hot label."""
    w_mse: Annotated[float, Ge(0)] = 1.0
    """Weight of the squared error."""
    w_prob: Annotated[float, Ge(0)] = 1.0
    """Weight of the probability term."""
    scale: Literal["absolute", "relative"] = "absolute"
    """Unit of sigma; only that of the quantity at the site makes a vote of one image by itself."""
    noise_at: Literal["pre_bn", "post_bn"] = "pre_bn"
    """What a layer puts out, or what the BatchNorm that takes it makes of it."""
    param: Literal["softplus", "exp"] = "softplus"
    """How a learned s stays positive."""
    sigma_lr: Annotated[float, Gt(0)] = 0.1
    """Learning rate of s relative to the weights'."""
    draws: Annotated[int, Ge(2)] = 16
    """Draws of the noise in training with structure=sampled."""
    joint: Literal["product", "min", "union"] = "product"
    """Probability to beat all rivals in the loss."""
    w_ece: Annotated[float, Ge(0)] = 0.0
    """Weight of an upper bound of the expected cross-entropy."""
    check_every: Annotated[int, Ge(0)] = 2
    """Hold the closed form against draws at the end of every so many epochs; 0 = never."""
    n_vote: Annotated[int, Gt(0)] = 100
    """Draws of the deployed vote."""
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.001
    """Probability that the deployed vote answers with another class than the ideal vote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "relative":
            raise ValueError(
                "scale=relative makes the noise depend on the other images of a batch, so no certificate holds; "
                "use scale=absolute"
            )

    def wrap(self, net: nn.Module) -> nn.Module:
        nodes = site_nodes(trace(net), net, self._sites, self.noise_at == "post_bn")
        net = super().wrap(net)
        for place, node in enumerate(nodes):
            image = node.op == "placeholder"
            layer = net if image else net.get_submodule(str(node.target))
            _Own(net.noise, place).attach(layer, "input" if image else "output")  # type: ignore[arg-type]
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
        """The vote over the noise that the net was trained for."""
        return InnerSmoothed(net, self.n_vote, self.alpha)
