"""robustbench.model_zoo.model_dicts[dataset][threat][name]["model"]()

RobustBench (Croce et al. 2021, arXiv:2010.09670): the architectures of its model zoo, each with the normalization of
its authors, for `bench eval robustbench:NAME` and the checkpoint of that name.

Differs from robustbench.load_model: nothing is downloaded here, and a checkpoint is loaded strictly but for constants
of a normalization, which old ones lack. Ensembles of several checkpoints are left out. Of the package its zoo alone is
imported, which needs timm, geotorch and torchdiffeq; torchattacks brings a copy of 2022 with fewer models.
"""

import difflib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from torch import nn

from bench.core.extras import imported
from bench.models.common import MAY_LACK, Inputs

revision = 1
CONSTANTS = ("mu", "sigma", "mean", "std")  # last parts of names of buffers that hold a normalization


def build(inputs: Inputs, *, name: str = "", dataset: str = "cifar10", threat: str = "Linf") -> nn.Module:
    """Images `b 3 h w` in [0,1] -> logits `b k`; `dataset` and `threat` are the keys of the zoo. Raises ImportError
    without the package, and ValueError in one line for what is not in its zoo."""
    entry = _entry(name, dataset, threat)
    if not isinstance(entry.get("gdrive_id"), str):
        raise ValueError(f"robustbench:{name} is not one checkpoint; give a function that loads it: FILE.py:FUNCTION")
    net: nn.Module = entry["model"]()
    vars(net)[MAY_LACK] = {each for each, _ in net.named_buffers() if each.rpartition(".")[2] in CONSTANTS}
    return net


def _entry(name: str, dataset: str, threat: str) -> dict[str, Any]:
    """What the zoo says of a model."""
    found: Any = _zoo()
    for kind, key in (("dataset", dataset), ("threat", threat), ("name", name)):
        known = {str(getattr(each, "value", each)): value for each, value in found.items()}
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) if len(known) > 4 else list(known)
            raise ValueError(f"robustbench has no {kind} '{key}' here; near: {', '.join(near) or 'none'}")
        found = known[key]
    return dict(found)


def _zoo() -> Any:
    """Its models by data set and threat. The package itself would import all that its downloads and its own attacks
    need."""
    install = "pip install robustbench timm geotorch torchdiffeq, the first with --no-deps"
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"robustbench is not installed: {install}")
    if "robustbench.model_zoo" not in sys.modules:
        package = sys.modules["robustbench"] = ModuleType("robustbench")
        package.__path__ = list(spec.submodule_search_locations)
    try:
        return imported("robustbench.model_zoo", install).model_dicts
    finally:
        if not hasattr(sys.modules.get("robustbench"), "__file__"):
            sys.modules.pop("robustbench", None)
