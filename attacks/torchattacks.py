"""x' = torchattacks.METHOD(f, eps, ...)(x, y)

Torchattacks (Kim 2020, arXiv 2010.01950), version 3.5: any image attack of that package, as a second opinion beside
our own. Each counts as what it is there: some bound the perturbation by eps, some look for the smallest one.

Differs from calling the package: eps is the threat's; `alpha`, fixed there for 8/255, becomes 2.5 eps / steps unless
given; the attack's own seed and number of classes are set; the training mode of every submodule is restored (the
package leaves all of them in train mode); prints are muted. A minimal-norm attack is scored as accuracy at eps: an
image found outside the ball counts as not broken. Its AutoAttack, APGD, FAB and Square are not those of their authors:
`autoattack` here runs the latter.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier
from bench.core.threat import Threat

# the norms each method knows, where eps bounds it
_BOUNDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM"), ("Linf",)),
    **dict.fromkeys(("TIFGSM", "Jitter", "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA"), ("Linf",)),
    **dict.fromkeys(("PIFGSM", "PIFGSMPP"), ("Linf",)),
    **dict.fromkeys(("PGDL2", "PGDRSL2"), ("L2",)),
    **dict.fromkeys(("APGD", "APGDT", "FAB", "Square", "AutoAttack"), ("Linf", "L2")),
}
# methods that look for the smallest perturbation, and what they measure
_MINIMAL: dict[str, tuple[str, ...]] = {"CW": ("L2",), "DeepFool": ("L2",), "EADEN": ("L1", "L2"), "EADL1": ("L1",)}
_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("OnePixel", "Pixle", "JSMA", "SparseFool"), "counts changed pixels (L0), which none of our norms bounds"
    ),
    "GN": "adds noise of any size, bounded by no norm",
    "VANILA": "is no attack: it leaves the image as it is",
    "MultiAttack": "combines other attacks: list them one by one",
    "LGV": "needs to train models of its own",
}


@dataclass
class TorchAttacks(Attack):
    """One attack of torchattacks. Column `distance` (minimal-norm methods): size of what was found, else inf."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    revision: ClassVar[int] = 1
    smoke: ClassVar[dict[str, Any]] = {"method": "MIFGSM", "kwargs": {"steps": 2}}

    method: str = "MIFGSM"
    """Name of the attack as in the package: FGSM, MIFGSM, DIFGSM, PGDL2, CW, DeepFool, ..."""
    kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of its constructor other than model, norm and eps; the package's defaults otherwise."""

    def __post_init__(self) -> None:
        known = [*_BOUNDED, *_MINIMAL, *_REFUSED]
        if self.method not in known:
            near = difflib.get_close_matches(self.method.upper(), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"torchattacks has no attack '{self.method}'{hint}")

    def supports(self, model: Classifier) -> str | None:
        if self.method in _REFUSED:
            return f"{self.method} {_REFUSED[self.method]}"
        native = _BOUNDED.get(self.method) or _MINIMAL[self.method]
        if self.threat.norm not in native:
            return f"{self.method} has no {self.threat.norm} version; norms: {', '.join(native)}"
        return super().supports(model)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """What the attack returns; for minimal-norm ones only what lies inside the ball, and `distance`."""
        reason = _REFUSED.get(self.method)
        if reason:
            raise ValueError(f"{self.method} {reason}")
        with _modes_kept(model), contextlib.redirect_stdout(io.StringIO()):
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            attack = _build(self.method, self.kwargs, model, self.threat, ctx.seed % 2**31, classes, x.shape[1])
            attack.set_device(x.device)
            found = attack(x.clone(), y).detach()
            if self.method not in _MINIMAL:
                return found, {}
            with torch.no_grad():
                broken = model(found).argmax(1) != y
        size = self.threat.size(found - x)
        inside = broken & (size <= self.threat.radius)
        x_adv = torch.where(inside.view(-1, *[1] * (x.dim() - 1)), found, x)
        return x_adv, {"distance": torch.where(broken, size, float("inf"))}


def _build(
    method: str, given: dict[str, Any], model: nn.Module, threat: Threat, seed: int, classes: int, channels: int
) -> Any:
    """The package's attack object. Raises ImportError without the package, ValueError for a setting it lacks."""
    try:
        import torchattacks
    except ImportError:
        raise ImportError("torchattacks is not installed; pip install --no-deps torchattacks") from None
    if method in ("TIFGSM", "PIFGSM", "PIFGSMPP") and channels != 3:  # their kernels are written for three
        raise ValueError(f"{method} needs images of 3 channels, got {channels}")
    maker = getattr(torchattacks, method)
    accepted = inspect.signature(maker).parameters
    free = [name for name in accepted if name not in ("model", "norm", "eps", "max_epsilon")]
    for name in given:
        if name not in free:
            known = ", ".join(free)
            raise ValueError(f"{method} has no setting '{name}' (norm and eps are the threat's); known: {known}")
    eps = threat.radius
    steps = given.get("steps", accepted["steps"].default if "steps" in accepted else 2)
    # PIFGSM's constructor calls eps max_epsilon
    own = {"eps": eps, "max_epsilon": eps, "norm": threat.norm, "seed": seed, "n_classes": classes}
    own["alpha"] = 2.5 * eps / float(steps)
    settings = {name: value for name, value in own.items() if name in accepted}
    return maker(model, **{**settings, **given})


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, which the package expects, and each submodule's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
