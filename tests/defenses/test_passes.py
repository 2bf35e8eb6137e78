"""No defense makes more passes a step than its method needs: counted by hooks, and as work in units of F."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from bench import plugins
from bench.core.defense import Batch
from bench.models.common import Inputs
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.training.cost import profile_step

# defense, settings, forward and backward passes through the net, F needed (a backward pass to the input is 1F, to the
# weights too 2F). The recursions of `noisy` do not call the net, so only their work is counted.
CASES: list[tuple[str, dict[str, Any], int, int, float]] = [
    ("standard", {}, 1, 1, 3),
    ("smoothing", {}, 1, 1, 3),
    ("rse", {}, 1, 1, 3),
    ("logit_squeezing", {}, 1, 1, 3),
    ("noisy_sampled", {}, 1, 1, 3),
    ("pgd_at", {}, 11, 11, 23),
    ("pgd_at", {"steps": 7}, 8, 8, 17),
    ("trades", {}, 13, 12, 27),
    ("mart", {}, 12, 12, 26),
    ("rat", {}, 13, 12, 27),
    ("rat_sampled", {"draws": 3}, 13, 12, 27),
    ("rat_sampled", {"noise_on": "network"}, 14, 13, 30),
    ("rat_sampled", {"noise_on": "network", "branches": "adversarial"}, 13, 12, 27),
    ("rat_release", {}, 13, 12, 27),
    ("awp", {"warmup": 0.0}, 15, 14, 33),
    ("awp", {"warmup": 0.0, "base": {"name": "pgd_at"}}, 12, 12, 26),
    ("awp", {"warmup": 1.0}, 13, 12, 27),
    ("at_mixture", {}, 3, 2, 8),
    ("fast_at", {}, 2, 2, 5),
    ("free_at", {}, 8, 8, 24),
    ("gradalign", {}, 3, 4, 11),  # the gradient at the random point is differentiated again
    ("fgsm_pgi", {}, 2, 3, 7),
    ("gat", {}, 3, 3, 8),
    ("gat", {"alternate": False}, 4, 3, 9),
    ("nuat", {}, 3, 3, 8),
    ("nuat", {"alternate": False}, 4, 3, 9),
    ("robust_training", {}, 2, 2, 5),
    ("ibp", {}, 1, 1, 9),
    ("crown_ibp", {}, 1, 1, 18),  # 3 (K + 2)
    ("lsa", {}, 2, 4, 7),  # K + 3
    ("pni", {}, 9, 9, 20),
    ("smoothadv", {}, 6, 3, 14),  # two draws an image; a backward pass counts once for both
    ("jacobian_penalty", {}, 1, 2, 6),
    ("input_gradient_penalty", {}, 1, 2, 6),
    ("dual_margin", {}, 1, 2, 6),
    ("noisy", {}, 1, 3, 9),  # 3 (1 + probe + row)
    ("noisy", {"rows": 2, "probes": 0, "w_mse": 0.0}, 1, 3, 9),
    ("noisy", {"structure": "diag"}, 0, 0, 6),
    ("noisy", {"structure": "adjoint"}, 0, 0, 12),  # diag, and 3F a probe and a row
    ("noisy_vote", {}, 1, 3, 9),  # as noisy
]
DEFENSES = sorted(p.stem for p in (Path(__file__).parents[2] / "defenses").glob("*.py") if not p.stem.startswith("_"))


def test_every_defense_is_counted() -> None:
    assert sorted({name for name, *_ in CASES}) == DEFENSES


@pytest.mark.parametrize(("name", "settings", "forwards", "backwards", "needed"), CASES)
def test_passes_of_a_step(name: str, settings: dict[str, Any], forwards: int, backwards: int, needed: float) -> None:
    norm = "L2" if name == "smoothadv" else "Linf"
    defense = plugins.make("defenses", PluginChoice(name, settings), JobThreat(norm, "0.05"))
    net = defense.wrap(plugins.build_model("small_cnn", {}, Inputs(1, 8, 4, (0.0,), (1.0,)))).train()
    updater: Any = toys.Descent(net, lr=1e-3)
    y = torch.arange(8) % 4
    _, cost = profile_step(defense, net, updater, Batch(torch.rand(8, 1, 8, 8), y, y, 1, 0.5))
    assert (cost["forwards_per_image"], cost["backwards_per_image"]) == (forwards, backwards)
    assert cost["work_per_image_f"] <= needed
    if not settings and "=" in defense.cost:  # what it declares; awp says it for a step after the warm-up
        assert defense.cost.endswith(f"= {needed}F")
