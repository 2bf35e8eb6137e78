"""Soundness checks measured on a deployed model: does anything suggest that its robustness is false?

Each entry of CHECKS measures one code on an Audit, which runs each attack once. A check that could not be made says so;
it is never "ok".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from bench.core.classifier import Classifier
from bench.core.rng import scope
from bench.core.rng import seed as named_seed
from bench.core.threat import Threat
from bench.soundness import attack_strength as effort
from bench.soundness import binarization_test as planted
from bench.soundness import budget_curve as curve
from bench.soundness import forward_checks as forward
from bench.soundness import gradient_checks as gradients
from bench.soundness import test_time_optimization as inner
from bench.soundness.audit import Audit, NotApplicable, NotMeasured
from bench.soundness.checks import Finding

Measure = Callable[[Audit], list[Finding]]
# in this order: what stops attacks comes before the attacks, and what they left behind comes last
CHECKS: dict[str, Measure] = {
    "C1": forward.deterministic,
    "C2": forward.gives_logits,
    "C18": forward.pixel_space,
    "C6": inner.no_test_time_optimization,
    "C5": gradients.differentiable,
    "C4": gradients.zero_gradients,
    "C3": gradients.finite,
    "C7": effort.one_step,
    "C8": curve.monotone,
    "C9": curve.unbounded,
    "C10": effort.converged,
    "C11": effort.silent_success,
    "C12": effort.noise,
    "C19": planted.planted,
    "C29": gradients.rough,
    "C17": effort.no_trace,
}


def audit(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threats: list[Threat],
    level: Literal["quick", "full"],
    *,
    seed: int,
    claimed: float | None,
    report: Callable[[int, int, str], None],
) -> tuple[list[Finding], dict[str, Tensor]]:
    """Findings of all measured checks, and which images each attack leaves correct, as bool columns of length n.

    `x` (n c h w, in [0,1]) and `y` on the model's device; `threats`: the budgets, of one norm; `claimed`: accuracy on
    clean images as measured elsewhere, in [0,1]. Columns: `clean`, and for each eps `fgsm@EPS`, `pgd-ce@EPS`,
    `pgd-cw@EPS` and, for a deterministic model, `noise@EPS`; a column is left out where its attack failed.
    Restores the model and the random generators. Raises ValueError without images or threats, or for several norms.
    """
    if len(x) == 0 or not threats or len({threat.norm for threat in threats}) > 1:
        raise ValueError(f"an audit needs images and threats of one norm, got {len(x)} images, {len(threats)} threats")
    with scope(named_seed(seed, "audit")):
        state = Audit(model, x, y, threats, level, seed, claimed)
        try:
            found = list[Finding]()
            for done, (code, measure) in enumerate(CHECKS.items()):
                report(done, len(CHECKS), code)
                found += _measured(code, measure, state)
            report(len(CHECKS), len(CHECKS), "")
            return found, state.columns()
        finally:
            state.trace.restore()


def _measured(code: str, measure: Measure, state: Audit) -> list[Finding]:
    try:
        return measure(state)
    except NotApplicable as reason:
        return [Finding(code, "n/a", note=str(reason))]
    except NotMeasured as reason:
        return [Finding(code, "not checked", note=str(reason))]
