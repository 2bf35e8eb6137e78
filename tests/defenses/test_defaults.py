"""The defaults, as published: a record is named by its settings, so a silent change would make old rows lie."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from bench.planning import catalog

# what the papers' code has for CIFAR-10 under Linf (smoothadv: L2); steps of eps as published steps over published eps
PAPERS: dict[str, dict[str, Any]] = {
    "at_mixture": {"alpha": 0.5, "steps": 1, "rel_step_size": 1, "start": "zero", "joint": True, "label": "true"},
    "robust_training": {"variant": "alternate"},
    "input_gradient_penalty": {"eta": 0, "strength": 1},
    "lsa": {"linearise": "scores", "layer": "input"},
    "pgd_at": {"steps": 10, "rel_step_size": Fraction(2, 8), "start": "uniform", "attack_bn_mode": "train"},
    "trades": {"beta": 6, "steps": 10, "rel_step_size": Fraction(7, 31), "start": "normal", "attack_bn_mode": "eval"},
    "mart": {"beta": 5, "steps": 10, "rel_step_size": Fraction(7, 31), "start": "normal", "attack_bn_mode": "eval"},
    "ibp": {"kappa": 0.5},
    "crown_ibp": {"kappa": 0.5},
    "fast_at": {"variant": "fgsm_rs", "rel_step_size": None, "noise": 2, "max_drop": 0.2, "attack_bn_mode": "train"},
    "free_at": {"replays": 8, "rel_step_size": 1},
    "gradalign": {"lam": 0.2, "attack_bn_mode": "train"},
    "gat": {
        **{"lam": 10, "late_factor": 4, "late_from": Fraction(86, 100)},
        **{"start": Fraction(4, 8), "alternate": True, "attack_bn_mode": "eval"},
    },
    "nuat": {
        **{"lam": 4.5, "ramp": Fraction(90, 100)},
        **{"start": Fraction(4, 8), "alternate": True, "attack_bn_mode": "eval"},
    },
    "fgsm_pgi": {"lam": 10, "decay": 0.3, "reset": 40},
    "awp": {"base": {"name": "trades"}, "gamma": 5e-3, "warmup": Fraction(10, 200)},
    "rat": {"beta": 6, "w0": 1, "w1": 0.2, "w2": 0.2, "steps": 10, "rel_step_size": Fraction(2, 8), "start": "normal"},
    "rat_release": {
        **{"beta": 6, "alpha": 0.2, "second": 0.5, "cc": None, "smoothing": "gap", "fix_q2": False, "noise_std": 1e-4},
        **{"steps": 10, "rel_step_size": Fraction(2, 8), "start": "normal", "attack_bn_mode": "eval"},
    },
    "smoothing": {"sigma": 0.25, "alpha": 0.001},
    "smoothadv": {"sigma": 0.25, "attack": "pgd", "steps": 2, "gamma": 0.05, "init_norm": 1, "alpha": 0.001},
    "pni": {
        **{"per": "layer", "initial": 0.25, "clean": 0.5, "warmup": Fraction(5, 160), "label": "training"},
        **{"steps": 7, "rel_step_size": Fraction(10, 31), "start": "uniform", "attack_bn_mode": "eval", "n_draws": 1},
    },
    "rse": {"sigma_init": 0.2, "sigma_inner": 0.1},
}
RECIPES = {  # learning rate, weight decay, epochs, batch
    "standard": (0.1, 5e-4, 200, 128),
    "pgd_at": (0.1, 5e-4, 200, 128),
    "trades": (0.1, 2e-4, 76, 128),
    "mart": (0.01, 3.5e-3, 120, 128),
    "ibp": (1e-3, 0.0, 100, 100),
    "crown_ibp": (5e-4, 0.0, 200, 256),
    "fast_at": (0.2, 5e-4, 15, 128),
    "free_at": (0.04, 5e-4, 10, 128),
    "gradalign": (0.3, 5e-4, 30, 128),
    "gat": (0.1, 5e-4, 100, 64),
    "nuat": (0.1, 5e-4, 100, 64),
    "fgsm_pgi": (0.1, 5e-4, 110, 128),
    "awp": (0.1, 5e-4, 200, 128),
    "rat": (0.1, 5e-4, 200, 128),
    "rat_sampled": (0.1, 5e-4, 200, 128),
    "rat_release": (0.1, 5e-4, 200, 128),
    "smoothing": (0.1, 1e-4, 90, 400),
    "smoothadv": (0.1, 1e-4, 150, 256),
    "pni": (0.1, 3e-4, 160, 128),
}


@pytest.mark.parametrize("name", PAPERS)
def test_settings(name: str) -> None:
    found = {field.name: field.default for field in catalog.get("defenses", name).fields}
    for key, value in PAPERS[name].items():
        expected = pytest.approx(float(value), rel=1e-15) if isinstance(value, Fraction) else value
        assert found[key] == expected, key


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    recipe = catalog.get("defenses", name).constant("recipe", {})
    assert tuple(recipe[key] for key in ("lr", "weight_decay", "epochs", "batch_size")) == RECIPES[name]
