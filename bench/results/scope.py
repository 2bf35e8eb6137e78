"""Restricts an output to some of the stored jobs: those of a spec, a data set, budgets or defenses."""

from __future__ import annotations

from collections.abc import Iterable

from bench.core.epsilon import Epsilon
from bench.planning.catalog import suggest
from bench.planning.evaluations import BASELINE
from bench.planning.job import EvaluateJob, Job, ModelJob
from bench.records.store import Scope, Store
from bench.results.facts import DatasetNames


def dataset_named(store: Store, name: str) -> str:
    """The full name of a data set of the records. Raises LookupError, in one line, for none or several."""
    names = DatasetNames(store)
    known = sorted({names.name(job.data) for job in store.jobs().values() if isinstance(job, ModelJob)})
    alike = [each for each in known if each.split(" ")[0] == name]
    if name in known or len(alike) == 1:
        return name if name in known else alike[0]
    if alike:
        raise LookupError(f"data set {name} is ambiguous; give one of {', '.join(map(repr, alike))}")
    raise LookupError(f"no record has data set {name}.{suggest(name, known)} There are: {', '.join(known) or 'none'}")


def scoped(
    store: Store,
    keys: Iterable[str] | None = None,
    about: str = "",
    dataset: str | None = None,
    eps: Iterable[str] = (),
    defenses: Iterable[str] = (),
) -> Store:
    """A read-only store of the jobs in scope; nothing given does not restrict.

    Args:
        store: The records.
        keys: Jobs of a spec, and `about`: its name.
        dataset: A name of `dataset_named`.
        eps: Budgets of attacks. Trainings that were attacked at none of them are left out.
        defenses: Names of defenses. `standard`, the baseline of every ratio, is added.

    Raises:
        LookupError: No job is of this data set, budget or defense; in one line.
    """
    store, budgets = store.snapshot(), frozenset(Epsilon(each) for each in eps)
    full = None if dataset is None else dataset_named(store, dataset)
    jobs, names = store.jobs(), DatasetNames(store)
    models = {key: job for key, job in jobs.items() if isinstance(job, ModelJob)}
    if unknown := sorted(set(defenses) - (known := {job.defense.name for job in models.values()})):
        near = f"{suggest(unknown[0], sorted(known))} There are: {', '.join(sorted(known)) or 'none'}"
        raise LookupError(f"no record has defense {unknown[0]}.{near}")
    wanted = {*defenses, BASELINE}
    models = {
        key: job
        for key, job in models.items()
        if full in (None, names.name(job.data)) and (not defenses or job.defense.name in wanted)
    }
    if budgets:
        attacked = [(job.model_key, at) for job in jobs.values() for at in _budgets(job) if job.model_key in models]
        models = {key: models[key] for key, at in attacked if at in budgets}
        if not models:
            met = ", ".join(str(at) for at in sorted({at for _, at in attacked})) or "none"
            raise LookupError(f"no record has eps {', '.join(map(str, sorted(budgets)))}. There are: {met}")
    found = {key for key, job in jobs.items() if (key if isinstance(job, ModelJob) else job.model_key) in models}
    asked = {"spec": about, "data set": full, "eps": ", ".join(map(str, sorted(budgets)))}
    asked["defenses"] = ", ".join(sorted(wanted)) if defenses else ""
    text = "; ".join(f"{name} {value}" for name, value in asked.items() if value)
    return Store(store.root, read_only=True, scope=Scope(found if keys is None else found & set(keys), budgets, text))


def _budgets(job: Job) -> set[Epsilon]:
    """The budgets that an evaluation attacks; a security curve has several."""
    if not isinstance(job, EvaluateJob) or job.threat is None:
        return set()
    return {Epsilon(each) for each in job.attack.settings.get("budgets") or [job.threat.eps]}
