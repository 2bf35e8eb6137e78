"""Soundness checks measured on a deployed model: does anything suggest that its robustness is false?

Each entry of MEASURES measures one check on an Audit, which runs each attack once. A check that could not be made is
"not checked", never "ok".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from bench.core.classifier import Classifier
from bench.core.rng import scope
from bench.core.rng import seed as named_seed
from bench.core.threat import Threat
from bench.soundness import attack_strength, forward_checks, gradient_checks
from bench.soundness.audit import Audit, Effort, Unseen
from bench.soundness.binarization_test import finds_known_points
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Check, Finding
from bench.soundness.memorization import robust_elsewhere
from bench.soundness.test_time_optimization import no_test_time_optimization

# in this order: what stops attacks comes before the attacks; what they left behind, and NaN in any pass, come last
MEASURES: dict[str, Callable[[Check, Audit], Iterator[Finding]]] = {
    "C1": forward_checks.deterministic,
    "C2": forward_checks.gives_logits,
    "C18": forward_checks.pixel_space,
    "C6": no_test_time_optimization,
    "C5": gradient_checks.differentiable,
    "C4": gradient_checks.zero_gradients,
    "C7": attack_strength.one_step,
    "C8": attack_strength.monotone,
    "C9": attack_strength.unbounded,
    "C10": attack_strength.converged,
    "C11": attack_strength.silent_success,
    "C12": attack_strength.noise,
    "C19": finds_known_points,
    "C29": gradient_checks.rough,
    "C30": robust_elsewhere,
    "C17": attack_strength.no_trace,
    "C3": gradient_checks.finite,
}


def audit(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threats: list[Threat],
    level: Effort,
    *,
    seed: int,
    claimed: float | None,
    report: Callable[[int, int, str], None],
    unseen: Unseen | None = None,
) -> tuple[list[Finding], dict[str, Tensor]]:
    """Findings of all measured checks, and which images each attack leaves correct, as bool columns of length n.

    `x` (n c h w, in [0,1]) and `y` on the model's device; `threats`: the budgets, of one norm; `claimed`: accuracy on
    clean images as measured elsewhere, in [0,1]; `unseen`: training images, for a model that bench did not train.
    Columns: `clean`, and for each eps `fgsm@EPS`, `pgd-ce@EPS`,
    `pgd-cw@EPS` and, for a deterministic model, `noise@EPS`; a column is left out where its attack failed.
    Restores the model and the random generators. Raises ValueError without images or threats, or for several norms.
    """
    if len(x) == 0 or not threats or len({threat.norm for threat in threats}) > 1:
        raise ValueError(f"an audit needs images and threats of one norm, got {len(x)} images, {len(threats)} threats")
    with scope(named_seed(seed, "audit")):
        state = Audit(model, x, y, threats, level, seed, claimed, unseen)
        try:
            found = list[Finding]()
            with state.watch():
                for done, (code, measure) in enumerate(MEASURES.items()):
                    report(done, len(MEASURES), code)
                    found += CHECKS[code].findings(measure, state)
            report(len(MEASURES), len(MEASURES), "")
            return found, state.columns()
        finally:
            state.before.restore()
