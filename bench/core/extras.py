"""Imports of optional packages, whose faults are told in one line."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def imported(module: str, install: str) -> Any:
    """The module of an optional package; `install`: what to do where the package is missing.

    Raises ImportError in one line with what fails, such as a torchvision that is of another build than torch.
    """
    package = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages about the versions of others
            return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] == package:
            raise ImportError(f"{package} is not installed: {install}") from None
        raise ImportError(f"{package} does not import: {missing}; install that module") from None
    except Exception as fault:
        raise ImportError(f"{package} does not import: {type(fault).__name__}: {fault}") from None
