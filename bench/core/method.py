"""What every method declares, a defense or an attack, for the planner, the tables and the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bench.core.threat import Threat


def described(value: object) -> str:
    """A value that a plug-in returned, in words for an error: the shape of a tensor, else the type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__


@dataclass
class Method:
    """Base of defenses and evaluations: one file, one dataclass, whose fields are its settings.

    Class constants. They must be literals, because the planner reads them without importing torch:

    - `uses_threat`: True if the result depends on norm and eps.
    - `cost`: forward passes F per image, as a formula over the settings such as "(2 steps + 2) F = 42F", or a range
      "A to B" where images stop early. A backward pass to the image is one F, to the weights as well two.
    - `revision`: number to raise when results may change; it is part of the job key.
    - `settings_added_later`: settings younger than the first records. At their default they are left out of the job,
      so that the keys of older records stay valid; a new default for one needs a new revision.
    - `retired_settings`: removed settings, each with the one value that the method still computes. That value is still
      written into a job (unless the setting is in `settings_added_later`), so that the keys of older records stay
      valid. Records with another value are read and shown, but cannot be computed again.
    - `retired_results`: the page with the results of the removed settings, named in the error when one is requested.
    - `test_settings`: cheap settings for the contract tests.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}
    uses_threat: ClassVar[bool] = True
    cost: ClassVar[str] = ""
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ()
    retired_settings: ClassVar[dict[str, Any]] = {}
    retired_results: ClassVar[str] = ""
    test_settings: ClassVar[dict[str, Any]] = {}

    threat: Threat
