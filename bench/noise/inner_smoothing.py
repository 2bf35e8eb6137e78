"""Randomized smoothing with the noise inside the net: a vote, certified through the norm of the map before the noise.

With noise N(0, s^2 I) on z = A x + b, the vote is a function of z smoothed there, and Cohen et al.'s bound (2019, arXiv
1902.02918) states that no change of z smaller than s Phi^-1(p) changes it. A change d of the image moves z by A d, so
the vote is constant up to ||d||_2 = s Phi^-1(p) / ||A||_2. Further noise after z only makes the function of z random;
the bound holds for such functions as well. The certificate is that of the vote, not of the net without its noise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.core.smoothing import Vote
from bench.core.stochastic import noise_sites
from bench.noise.affine_map import AffineMap, NotAffine


class InnerSmoothed(Vote):
    """g(x) = argmax_c P(net(x) = c) over the noise of the net's own sources (bench.core.stochastic), on activations.

    Certified by the site with the largest radius: noise of one standard deviation s on an affine image of x.
    """

    def __init__(self, net: nn.Module, n_vote: int = 100, alpha: float = 0.001) -> None:
        super().__init__(net, n_vote, alpha)
        if not noise_sites(net):
            raise ValueError(f"{type(net).__name__} has no noise source, so there is nothing to vote over")
        self._norms: dict[tuple[Any, ...], float] = {}

    def uncertifiable(self) -> str | None:
        """The reason why no site certifies (noise of one standard deviation after affine steps only), or None."""
        try:
            self._sites()
        except NotAffine as reason:
            return str(reason)
        return None

    def _sites(self) -> list[tuple[float, AffineMap]]:
        """Standard deviation and map of each site that certifies. Raises NotAffine where there is none."""
        found, reasons = list[tuple[float, AffineMap]](), list[str]()
        for layer, kind, source in noise_sites(self.net):
            if kind == "weight" or source.sigma is None:
                reasons.append(f"the noise on the {kind} of a {type(layer).__name__} has no one standard deviation")
                continue
            try:
                found.append((source.sigma, AffineMap(self.net, layer, kind)))
            except NotAffine as reason:
                reasons.append(str(reason))
        if not found:
            raise NotAffine("; ".join(dict.fromkeys(reasons)))
        return found

    def radius_unit(self, x: Tensor) -> float:
        """The largest s / ||A||_2 of the sites."""
        return max(sigma / max(self._norm(there, x), 1e-300) for sigma, there in self._sites())

    def _norm(self, there: AffineMap, x: Tensor) -> float:
        """||A||_2, computed once for each site, image shape and state of the net."""
        state = tuple(t._version for t in (*self.net.parameters(), *self.net.buffers()))
        key = (there.layer, there.kind, tuple(x.shape[1:]), state)
        if key not in self._norms:
            self._norms[key] = there.norm(x)
        return self._norms[key]
