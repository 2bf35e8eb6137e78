"""Images that no attack can break, by interval bounds (Gowal et al. 2018, arXiv 1810.12715) or CROWN-IBP (Zhang et al.
2020, arXiv 1906.06316), so that attacks need not try."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, Counted
from bench.core.threat import Threat
from bench.noise.interval import METHODS, obstacle, proved

TRIAL = 16  # images that decide whether proofs are tried on the others
BATCH = 64


def proved_images(surrogate: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Which of the images (b c h w, classified as `y`) have a proof for the whole ball, bool of shape b.

    Boxes are tried on a few images first. If they prove none of them, nothing is tried on the others, nor is CROWN on
    any: it proves little of a net that boxes fail on, and takes minutes on a large one.
    """
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    model = surrogate.model if isinstance(surrogate, Counted) else surrogate
    if not isinstance(model, Classifier) or obstacle(model, x[:16]):
        return found
    for method in METHODS:
        left = (~found).nonzero().squeeze(1)
        for number, part in enumerate((left[:TRIAL], *left[TRIAL:].split(BATCH))):
            found[part] = proved(model, x[part], y[part], threat, method) > 0
            if isinstance(surrogate, Counted):  # boxes are two maps, and each margin of CROWN comes back once
                surrogate.spend(2 * len(part), 0 if method == "interval" else 9 * len(part))
            if number == 0 and not bool(found.any()):
                return found
    return found
