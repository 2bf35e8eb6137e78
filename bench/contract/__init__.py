"""The contract of every plug-in, checked on a toy network by `bench check NAME` and by the tests."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.contract.evaluation import EvaluationChecks, supported_cases
from bench.contract.training import TrainingChecks
from bench.core.attack import Attack, Evaluation
from bench.core.defense import Defense
from bench.planning import catalog


class Result(NamedTuple):
    """Result of one check: its name, whether the plug-in passes, and the reason if it does not."""

    name: str
    ok: bool
    detail: str = ""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context with one thread: threads slow networks this small down, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def check_defense(cls: type[Defense]) -> list[Result]:
    """All checks of one defense, with its `test_settings`. An exception in a check is its failure."""
    run = TrainingChecks(cls)
    return [
        _result("documented and readable without torch", lambda: _readable(cls, "defenses")),
        _result("terms are finite scalars and every parameter learns", run.every_parameter_learns),
        _result("a step restores training mode and gradient flags", run.flags_are_restored),
        _result("the inner maximization changes no weight, gradient or statistic", run.inner_has_no_side_effects),
        _result("adversarial images are inside ball and pixel box", run.inner_is_feasible),
        _result("same seed, same bits", run.is_reproducible),
        _result("deploys the predictor that it declares", run.deploys_as_declared),
        _result("load_state_dict restores state_dict", run.state_is_restored),
        _result("continues bit for bit from a restored state", run.continues_from_state),
        _result("supports exactly the recipe parts it declares", run.supports_recipe),
    ]


@_one_thread()
def check_attack(cls: type[Evaluation]) -> list[Result]:
    """All checks of one evaluation, with its `test_settings`, for each norm and kind of model it supports."""
    results = [_result("documented and readable without torch", lambda: _readable(cls, "attacks"))]
    runs: list[EvaluationChecks] = []

    def supports_some_case() -> str | None:
        runs.extend(supported_cases(cls))
        return None if runs else "unsupported_reason() rejects every norm and model"

    results.append(_result("supports some norm and model", supports_some_case))
    for run in runs:
        checks = {"leaves the model unchanged": run.has_no_side_effects, "columns are per-sample": run.columns}
        checks["same seed, same bits"] = run.is_reproducible
        if issubclass(cls, Attack) or getattr(cls, "uses_budgets", False):
            checks |= {"images are inside ball and pixel box": run.is_feasible}
            checks |= {"robust accuracy at eps 0 is clean accuracy": run.zero_budget}
        results += [_result(f"{name} ({run.norm}, {run.kind})", check) for name, check in checks.items()]
    return results


def _readable(cls: type[Any], kind: catalog.Kind) -> str | None:
    plugin = catalog.get(kind, Path(inspect.getfile(cls)).stem)
    if not re.search(r"[=<>(\[]", plugin.formula):
        return f"the first docstring line must be the objective as a formula, found '{plugin.formula}'"
    if not re.search(r"arXiv|\b(19|20)\d\d\b", plugin.source):
        return "the second docstring paragraph must name the source, e.g. (Madry et al. 2018, arXiv 1706.06083)"
    undocumented = [field.name for field in plugin.fields if not field.doc]
    if undocumented:
        return f"setting '{undocumented[0]}' has no docstring line below it (meaning and unit)"
    plugin.resolve(plugin.constant("test_settings", {}))
    for preset in plugin.constant("presets", {}):
        plugin.resolve({"preset": preset})
    return None


def _result(name: str, check: Callable[[], str | None]) -> Result:
    """Run a check, which returns None or the reason of its failure."""
    try:
        failure = check()
    except Exception as error:  # a plug-in under test may raise anything
        failure = f"{type(error).__name__}: {error}"
    return Result(name, failure is None, failure or "")
