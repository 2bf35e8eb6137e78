"""The contract of every plug-in, checked on a toy network: used by `bench check NAME` and by the tests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.contract.evaluation import Judgement, cases
from bench.contract.training import Training
from bench.core.attack import Attack, Evaluation
from bench.core.defense import Defense
from bench.planning import catalog


class Result(NamedTuple):
    """One check: its name, whether it holds, and what was found where it does not."""

    name: str
    ok: bool
    detail: str = ""


def check_defense(cls: type[Defense]) -> list[Result]:
    """All checks of one defense, with its `test_settings`. An exception in a check is its failure."""
    run = Training(cls)
    with _one_thread():
        return [
            _result("documented and readable without torch", lambda: _readable(cls, "defenses")),
            _result("terms are finite scalars and every parameter learns", run.learns),
            _result("training mode and gradient flags survive a step", run.flags_survive),
            _result("the inner problem leaves weights, gradients and BatchNorm alone", run.inner_is_clean),
            _result("adversarial images lie in ball and box", run.inner_is_feasible),
            _result("same seed, same bits", run.repeats),
            _result("deploys what it declares", run.deploys),
            _result("its state makes a round trip", run.state_trip),
            _result("with its state put back it goes on bit for bit", run.goes_on),
            _result("supports exactly the recipe parts it declares", run.supports_recipe),
        ]


def check_attack(cls: type[Evaluation]) -> list[Result]:
    """All checks of one evaluation, with its `test_settings`, for each norm and kind of model it supports."""
    with _one_thread():
        return _attack_results(cls)


def _attack_results(cls: type[Evaluation]) -> list[Result]:
    results = [_result("documented and readable without torch", lambda: _readable(cls, "attacks"))]
    runs: list[Judgement] = []

    def some_case() -> str | None:
        runs.extend(cases(cls))
        return None if runs else "unsupported_reason() refuses every norm and model"

    results.append(_result("supports some norm and model", some_case))
    for run in runs:
        checks = {"leaves the model as it was": run.traceless, "columns are per-sample": run.columns}
        checks["same seed, same bits"] = run.repeats
        if issubclass(cls, Attack) or getattr(cls, "uses_budgets", False):
            checks |= {"images lie in ball and box": run.feasible, "eps 0 is clean accuracy": run.no_budget}
        results += [_result(f"{name} ({run.norm}, {run.kind})", check) for name, check in checks.items()]
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small lose time to threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _readable(cls: type[Any], kind: catalog.Kind) -> str | None:
    plugin = catalog.get(kind, Path(inspect.getfile(cls)).stem)
    if not re.search(r"[=<>(\[]", plugin.formula):
        return f"the first docstring line must be the objective as a formula, found '{plugin.formula}'"
    if not re.search(r"arXiv|\b(19|20)\d\d\b", plugin.source):
        return "the second docstring paragraph must name the source, e.g. (Madry et al. 2018, arXiv 1706.06083)"
    bare = [field.name for field in plugin.fields if not field.doc]
    if bare:
        return f"setting '{bare[0]}' has no docstring line below it (meaning and unit)"
    plugin.resolve(plugin.constant("test_settings", {}))
    for preset in plugin.constant("presets", {}):
        plugin.resolve({"preset": preset})
    return None


def _result(name: str, check: Callable[[], str | None]) -> Result:
    """Run a check, which returns None where it holds, else what is wrong."""
    try:
        wrong = check()
    except Exception as error:  # a plug-in under test may raise anything
        wrong = f"{type(error).__name__}: {error}"
    return Result(name, wrong is None, wrong or "")
