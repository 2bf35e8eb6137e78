"""The attacks of torchattacks: norms, settings and requirements of each."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# methods bounded by eps, and their norms
BOUNDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("FGSM", "BIM", "RFGSM", "PGD", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "DIFGSM"), ("Linf",)),
    **dict.fromkeys(("TIFGSM", "Jitter", "NIFGSM", "PGDRS", "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA"), ("Linf",)),
    **dict.fromkeys(("PIFGSM", "PIFGSMPP"), ("Linf",)),
    **dict.fromkeys(("PGDL2", "PGDRSL2"), ("L2",)),
    **dict.fromkeys(("APGD", "APGDT", "Square", "AutoAttack"), ("Linf", "L2")),
}
L0 = ("OnePixel", "Pixle", "JSMA", "SparseFool")  # minimize the number of changed pixels
# methods that search for the smallest perturbation, and the norms in which it is measured
MINIMAL: dict[str, tuple[str, ...]] = {
    **{"CW": ("L2",), "DeepFool": ("L2",), "EADEN": ("L1", "L2"), "EADL1": ("L1",), "FAB": ("Linf", "L2")},
    **dict.fromkeys(L0, ("Linf", "L2", "L1")),
}
THREE = ("TIFGSM", "PIFGSM", "PIFGSMPP")  # their kernels are written for three channels
POSITIVE = ("CW", "EADEN", "EADL1")  # they mask the other classes' logits with 0
REFUSED: dict[str, str] = {
    "GN": "adds noise of any size, bounded by no norm",
    "VANILA": "is not an attack: it returns the image unchanged",
    "MultiAttack": "combines other attacks: list them one by one",
    "LGV": "needs to train its own models",
}


class ModelAdapter(nn.Module):
    """The model as torchattacks needs it: gray images from the first channel, logits shifted to be positive."""

    def __init__(self, model: nn.Module, gray: bool, positive: bool) -> None:
        super().__init__()
        self.model, self.gray, self.positive = model, gray, positive

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x[:, :1] if self.gray else x)
        return logits - logits.detach().amin(1, keepdim=True) if self.positive else logits


def _accepted(method: str) -> Any:
    """The package's class of an attack and its parameters. Raises ImportError if it is not installed."""
    try:
        import torchattacks
    except ImportError:
        raise ImportError("torchattacks is not installed; pip install --no-deps torchattacks") from None
    maker = getattr(torchattacks, method)
    return maker, inspect.signature(maker).parameters


def check(method: str, given: dict[str, Any]) -> None:
    """Raise ValueError for a setting that the method does not have, or with which its result would be meaningless."""
    free = [name for name in _accepted(method)[1] if name not in ("model", "norm", "eps", "max_epsilon")]
    for name in given:
        if name not in free:
            known = ", ".join(free)
            raise ValueError(f"{method} has no setting '{name}' (norm and eps are the threat's); known: {known}")
    if method == "FAB" and {"n_restarts", "multi_targeted"} & given.keys():
        raise ValueError("FAB runs once and untargeted, to report distances; for more use autoattack with fab-t")
    if float(given.get("max_iterations", 10)) < 10 and method.startswith("EAD"):
        raise ValueError(f"{method} max_iterations is {given['max_iterations']}; expected at least 10")


def build(method: str, given: dict[str, Any], model: nn.Module, norm: str, eps: float, seed: int, classes: int) -> Any:
    """The package's attack object."""
    maker, accepted = _accepted(method)
    steps = given.get("steps", accepted["steps"].default if "steps" in accepted else 2)
    # PIFGSM's constructor calls eps max_epsilon
    own = {"eps": eps, "max_epsilon": eps, "norm": norm, "seed": seed, "n_classes": classes}
    own["alpha"] = 2.5 * eps / float(steps)
    if method == "SPSA":
        own["lr"] = max(accepted["lr"].default, 2.5 * eps / float(given.get("nb_iter", accepted["nb_iter"].default)))
    settings = {name: value for name, value in own.items() if name in accepted}
    return maker(model, **{**settings, **given})


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Context with the model in eval mode, as the package expects; each submodule's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
