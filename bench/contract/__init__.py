"""The contract of every plug-in, checked on a toy network by `bench check NAME` and by the tests."""

import difflib
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
from bench.core.method import Method
from bench.planning import catalog
from bench.planning.plugin_source import MistakeError, place_of
from bench.plugins import line_of, load

Check = Callable[[], str | None]


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


def check(kind: catalog.Kind, name: str) -> list[Result]:
    """All checks of the plug-in of this name, first of its file; one that cannot be imported fails."""
    loaded: list[type[Any]] = []
    results = [_result("documented and readable without torch", lambda: _readable(kind, name))]
    imported = _result("can be imported", lambda: loaded.append(load(kind, name)))
    if not loaded:
        return results if not results[0].ok else [*results, imported]
    return results + (check_defense if kind == "defenses" else check_attack)(loaded[0])


@_one_thread()
def check_defense(cls: type[Defense]) -> list[Result]:
    """All checks of one defense, with its `test_settings`. Without a step that works, the checks after it are left out.

    An exception in a check is its failure.
    """
    run = TrainingChecks(cls)
    checks: list[tuple[str, str, Check]] = [
        ("terms are finite scalars and every parameter learns", "loss", run.every_parameter_learns),
        ("a step restores training mode and gradient flags", "loss", run.flags_are_restored),
        ("the inner maximization changes no weight, gradient or statistic", "inner", run.inner_has_no_side_effects),
        ("adversarial images are inside ball and pixel box", "inner", run.inner_is_feasible),
        ("same seed, same bits", "loss", run.is_reproducible),
        ("deploys the predictor that it declares", "deploy", run.deploys_as_declared),
        ("load_state_dict restores state_dict", "load_state_dict", run.state_is_restored),
        ("continues bit for bit from a restored state", "state_dict", run.continues_from_state),
        ("supports exactly the recipe parts it declares", "loss", run.supports_recipe),
    ]
    results: list[Result] = []
    for name, method, check in checks:
        results.append(_result(name, check, cls, method))
        if name.startswith("terms") and not run.steps:
            break
    return results


@_one_thread()
def check_attack(cls: type[Evaluation]) -> list[Result]:
    """All checks of one evaluation, with its `test_settings`, for each norm and kind of model it supports, until it
    raises in one."""
    runs: list[EvaluationChecks] = []

    def supports_some_case() -> str | None:
        runs.extend(supported_cases(cls))
        return None if runs else "unsupported_reason() rejects every norm and model"

    results = [_result("supports some norm and model", supports_some_case, cls, "unsupported_reason")]
    method = "perturb" if issubclass(cls, Attack) else "evaluate"
    for run in runs:
        checks = {"leaves the model unchanged": run.has_no_side_effects, "columns are per-sample": run.columns}
        checks["same seed, same bits"] = run.is_reproducible
        if issubclass(cls, Attack) or getattr(cls, "uses_budgets", False):
            checks |= {"images are inside ball and pixel box": run.is_feasible}
            checks |= {"robust accuracy at eps 0 is clean accuracy": run.zero_budget}
        case = f"({run.norm}, {run.kind})"
        ran = _result(f"runs on a batch {case}", run.runs, cls, method)
        if not ran.ok:  # it would raise again in all that follows
            return [*results, ran]
        results += [_result(f"{name} {case}", each, cls, method) for name, each in checks.items()]
    return results


def _readable(kind: catalog.Kind, name: str) -> str | None:
    plugin = catalog.get(kind, name)
    if not re.search(r"[=<>(\[]", plugin.formula):
        found = f"found '{plugin.formula}'" if plugin.formula else "found none"
        raise plugin.mistake("", f"the first docstring line must be the objective as a formula, {found}")
    if not re.search(r"arXiv|\b(19|20)\d\d\b", plugin.source):
        wanted = "(Madry et al. 2018, arXiv 1706.06083)"
        raise plugin.mistake("", f"the second docstring paragraph must name the source, such as {wanted}")
    bases = (Method, Defense, Evaluation)
    known = {name for base in bases for name, note in inspect.get_annotations(base).items() if "ClassVar" in str(note)}
    for field in plugin.fields:
        if field.name in known:
            wanted = f"{field.name}: ClassVar[{field.written}] = {field.default!r}"
            raise plugin.mistake(field.name, f"'{field.name}' is a constant, not a setting; write {wanted}")
        if not field.doc:
            raise plugin.mistake(field.name, f"'{field.name}' has no docstring line below it (meaning and unit)")
    for constant in sorted(plugin.constants.keys() - known):
        if near := difflib.get_close_matches(constant, known, n=1, cutoff=0.8):
            raise plugin.mistake(constant, f"no constant is named '{constant}'. Did you mean '{near[0]}'?")
    plugin.resolve(plugin.constant("test_settings", {}))
    for preset in plugin.constant("presets", {}):
        plugin.resolve({"preset": preset})
    return None


def _result(name: str, check: Check, cls: type[Method] | None = None, method: str = "") -> Result:
    """Run a check, which returns None or the reason of its failure; a failure begins with the author's file and line,
    which without a line in the traceback is that of `method`, or of the class."""
    try:
        failure, found = check(), ""
    except MistakeError as error:
        return Result(name, False, str(error))
    except Exception as error:  # a plug-in under test may raise anything
        failure, found = f"{type(error).__name__}: {' '.join(str(error).split())}", line_of(error)
    return Result(name, failure is None, f"{found or _place(cls, method)}: {failure}" if failure else "")


def _place(cls: type[Method] | None, method: str) -> str:
    """File and line of a method of a plug-in, of its class if it has none of its own."""
    if cls is None:
        return ""
    own = vars(cls).get(method)
    line = own.__code__.co_firstlineno if inspect.isfunction(own) else inspect.getsourcelines(cls)[1]
    return place_of(Path(inspect.getfile(cls)), line)
