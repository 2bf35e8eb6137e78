"""Builders for tests: jobs of which a test gives only the fields that it is about, and their stored records."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.atomic import file_hash, write_atomic
from bench.planning.evaluations import RANDOMISED_REVISION
from bench.planning.job import Job
from bench.planning.job_json import job_of
from bench.records.record import AuditMetrics, EvaluationMetrics, JobError, PeakMemory, Provenance, Record, TrainMetrics
from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.rows import Row, rows
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Finding

OUT_OF_MEMORY = JobError("RuntimeError", "out of memory", "long")
TOY_DATA = {"name": "digits", "train": 100, "validation": 0, "size": 8}
TOY_CONTENT: dict[str, dict[str, Any]] = {
    "train": {
        "engine": 1,
        "data": TOY_DATA,
        "model": {"name": "mlp", "set": {}, "revision": 1},
        "defense": {"name": "standard", "set": {}, "revision": 1},
        "threat": None,
        "recipe": "shared",
        "train": {"epochs": 1},
        "seed": 0,
    },
    "evaluate": {
        "engine": 1,
        "attack": {"name": "pgd", "set": {}, "revision": 1},
        "threat": {"norm": "Linf", "eps": "0.1"},
        "n": 100,
        "seed": 0,
        "weights": "last",
    },
    "audit": {
        "engine": 1,
        "part": "model",
        "level": "quick",
        "threats": [{"norm": "Linf", "eps": "0.1"}],
        "n": 100,
        "seed": 0,
        "weights": "last",
    },
}
TOY_CONTENT["shard"] = {**TOY_CONTENT["evaluate"], "images": [0, 100]}


def toy_job(kind: str, content: dict[str, Any], needs: tuple[str, ...] = (), parts: tuple[str, ...] = ()) -> Job:
    """The job of this kind with the JSON fields of `content`, the others (also within plug-ins and data) as above."""
    whole: dict[str, Any] = {**TOY_CONTENT[kind], **content}
    for name, default in TOY_CONTENT[kind].items():
        if name in ("data", "model", "defense", "attack") and name in content:
            whole[name] = {**default, **content[name]}
    return job_of(kind, whole, needs, parts)


STEPS = {"steps": 40}


STANDARD = {"version": "standard"}


def train_job(named: str, seed: int, eps: str | None = "0.1", **other: Any) -> Job:
    what: dict[str, Any] = {
        "engine": 1,
        "data": {"name": "toy", "train": 100, "validation": 0, "size": None},
        "model": {"name": "tiny", "set": {}, "revision": 1},
        "defense": {"name": named, "set": {}, "revision": 1},
        "threat": None if eps is None else {"norm": "Linf", "eps": eps},
        "recipe": "shared",
        "train": {"epochs": 2, "lr": 0.1},
        "seed": seed,
    }
    for name, value in other.items():
        what[name] = {**what[name], **value} if isinstance(what[name], dict) else value
    return toy_job("train", what)


def trained(store: Store, name: str = "guard", seed: int = 0, state: str = "done", **other: Any) -> Job:
    seconds, deploys = other.pop("seconds", 10.0), other.pop("deploys", "deterministic")
    own = other.pop("metrics", {})
    workers, device = other.pop("workers", 1), other.pop("device", "CPU x")
    job = train_job(name, seed, **other)
    store.add(job)
    where = Provenance(commit="abc", dirty=False, device=device, workers=workers)
    about: dict[str, Any] = {"provenance": where, "peak_memory_mb": PeakMemory(rss=300.0)}
    if state == "done":
        metrics = {"train_seconds": seconds, "seconds_per_epoch": seconds / 2, "predictor": deploys}
        metrics |= {"inference_ms_per_image": 0.5, **own}
        store.put(job, Record("done", TrainMetrics(**metrics), **about))
    elif state != "missing":
        store.put(job, Record(state, error=JobError("Diverged", "loss is NaN"), **about))
    return job


def evaluated(
    store: Store,
    train: Job,
    attack: str,
    correct: list[int] | None = None,
    settings: dict[str, Any] | None = None,
    *,
    eps: str | None = "0.1",
    state: str = "done",
    n: int | None = None,
    revision: int = 1,
    norm: str = "Linf",
    test_hash: str = "",
    split: str = "test",
    weights: str = "last",
    columns: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> str:
    """Write one evaluation; gives its key. `clean`, `certify` and `corruption` have no threat. `files`: more names in
    the record."""
    what = {
        "engine": RANDOMISED_REVISION,
        "attack": {"name": attack, "set": settings or {}, "revision": revision},
        "threat": None if attack in ("clean", "certify", "corruption") else {"norm": norm, "eps": eps},
        "n": n or len(correct or []),
        "seed": train.seed,
        "weights": weights,
        **({} if split == "test" else {"split": split}),
    }
    job = toy_job("evaluate", what, (train.key,))
    store.add(job)
    provenance = Provenance(commit="abc", dirty=False, device="CPU x", workers=1)
    if state == "done":
        arrays = {"index": np.arange(what["n"]), "correct": np.array(correct, dtype=bool), **(columns or {})}
        path = store.folder(job.key) / "samples.npz"
        write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        own = {"n": what["n"], "test_hash": test_hash or f"hash{what['n']}", "attack_seconds": 2.0}
        measured = EvaluationMetrics(**own | (metrics or {}))
        hashes = {"samples.npz": file_hash(path), **(files or {})}
        store.put(job, Record("done", measured, files=hashes, provenance=provenance))
    elif state == "unsupported":
        store.put(job, Record(state, reason="needs gradients", provenance=provenance))
    elif state != "missing":
        store.put(job, Record(state, error=OUT_OF_MEMORY, provenance=provenance))
    return job.key


def full(store: Store, train: Job, hits: int, n: int = 1000, eps: str = "0.1") -> list[str]:
    """Clean, steep and AutoAttack standard; `hits` images survive AutoAttack."""
    return [
        evaluated(store, train, "clean", [1] * n),
        evaluated(store, train, "steep", [1] * (hits + 1) + [0] * (n - hits - 1), STEPS, eps=eps),
        evaluated(store, train, "autoattack", [1] * hits + [0] * (n - hits), STANDARD, eps=eps),
    ]


def all_rows(store: Store) -> list[Row]:
    return rows(store, evaluations(store).readable)


def only(store: Store) -> Row:
    (row,) = all_rows(store)
    return row


def draws(select: list[float], share: list[float]) -> dict[str, Any]:
    return {"select": np.array(select, dtype=np.float32), "share": np.array(share, dtype=np.float32)}


def golden_store(store: Store) -> None:
    """Two seeds of a ranked defense, `standard`, a smoothed model, a failure and a row of another data set."""
    for seed in range(2):
        full(store, trained(store, "guard", seed, seconds=30.0, defense={"set": {"beta": 6.0}}), 450 + 10 * seed)
    full(store, trained(store, "standard", eps=None), 0)
    failed = trained(store, "broken_one", state="diverged")
    evaluated(store, failed, "steep", state="missing", n=1000, settings=STEPS)
    smooth = trained(store, "smooth", eps=None, deploys="smoothed", workers=2)
    evaluated(store, smooth, "clean", [1] * 90 + [0] * 10)
    evaluated(store, smooth, "steep", [1] * 40 + [0] * 60, STEPS)
    evaluated(store, smooth, "certify", [1] * 80 + [0] * 20, columns={"radius": np.linspace(1, 0, 100)})
    evaluated(store, trained(store, data={"name": "toy10"}), "steep", [1, 0], eps="8/255")


STANDARD, CW = {"version": "standard"}, {"loss": "cw"}


N = 1000


Images = list[int]


def right(share: float, n: int = N) -> Images:
    """The first share * n of n images."""
    hits = round(share * n)
    return [1] * hits + [0] * (n - hits)


def imported(store: Store, name: str = "mine") -> Job:
    """A user's model whose import is done."""
    choice = {"name": name, "set": {}, "revision": 1}
    about = {"engine": 1, "data": TOY_DATA, "model": choice, "defense": choice, "threat": None, "recipe": "imported"}
    own = {"checkpoint": None, "normalise": None, "randomised": False, "train": {"epochs": 0}, "seed": 0}
    job = job_of("import", {**about, **own}, (), ())
    store.add(job)
    store.put(job, Record("done", TrainMetrics(clean_accuracy=0.9, clean_n=1000, predictor="deterministic")))
    return job


def audited(
    store: Store,
    train: Job,
    *found: Finding,
    evaluations: tuple[str, ...] = (),
    columns: dict[str, Any] | None = None,
    state: str = "done",
    level: str = "quick",
    weights: str = "last",
    threat: tuple[str, ...] = ("Linf", "0.1"),
    engine: int = 1,
    absent: tuple[str, ...] = (),
) -> str:
    """Write an audit in which all is well but `found`: of the model, or of the images of `evaluations`. Its key.

    `absent`: checks that were unknown when it was made.
    """
    part = "images" if evaluations else "model"
    n = len(next(iter((columns or {"": [1]}).values())))
    threats = [{"norm": threat[0], "eps": eps} for eps in threat[1:]]
    about = {"engine": engine, "part": part, "level": level, "threats": threats, "weights": weights}
    job = toy_job("audit", {**about, "n": n, "seed": train.seed}, (train.key, *evaluations))
    store.add(job)
    if state != "done":
        store.put(job, Record(state, error=OUT_OF_MEMORY))
        return job.key
    fine = [Finding("C16", "ok", 0.0, attack=key) for key in evaluations]
    fine += [Finding(check.code, "ok") for check in CHECKS.values() if check.source == "model" and not evaluations]
    told = {(finding.code, finding.attack) for finding in found}
    findings = [*(f for f in fine if (f.code, f.attack) not in told and f.code not in absent), *found]
    path = store.folder(job.key) / "samples.npz"
    arrays = {"index": np.arange(n), **{name: np.array(values) for name, values in (columns or {}).items()}}
    arrays |= {name: values.astype(bool) for name, values in arrays.items() if "@" in name}
    write_atomic(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    store.put(job, Record("done", AuditMetrics(findings=tuple(findings)), files={"samples.npz": file_hash(path)}))
    return job.key


FLOOR = {"steps": 50, "restarts": 5}


# attack, settings, how many of the first images stay right: nothing is wrong with a model of these outcomes
ATTACKS: dict[str, tuple[str, dict[str, Any], Images]] = {
    "fgsm": ("fgsm", {}, right(0.6)),
    "pgd": ("pgd", FLOOR, right(0.52)),
    "cw": ("pgd", {**FLOOR, **CW}, right(0.515)),
    "autoattack": ("autoattack", STANDARD, right(0.5)),
}


def attacked(store: Store, train: Job, attacks: dict[str, Any] | None = None, **where: Any) -> tuple[str, ...]:
    """Evaluations of a model: those of ATTACKS with `attacks` in the place of some; None leaves one out. Their keys.

    APGD-CE, the first stage of AutoAttack, breaks what it breaks, unless a fourth member gives the stages.
    """
    keys = []
    for given in (ATTACKS | (attacks or {})).values():
        if given is not None:
            name, settings, correct, *stage = given
            stages = {"stage": np.array(stage[0] if stage else [-hit or 1 for hit in correct], dtype=np.int8)}
            columns = stages if name == "autoattack" else None
            keys.append(evaluated(store, train, name, correct, settings, columns=columns, **where))
    return tuple(keys)


def sound(
    store: Store,
    *found: Finding,
    attacks: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    name: str = "pgd_at",
    seed: int = 0,
    clean: float = 0.9,
    weights: str = "last",
    **training: Any,
) -> tuple[Job, tuple[str, ...]]:
    """A model with nothing wrong but `found`: clean 90 %, FGSM 60 %, PGD 52 %, AutoAttack 50 %, and its audits."""
    train = trained(store, name, seed, **training)
    evaluated(store, train, "clean", right(clean), weights=weights)
    keys = attacked(store, train, attacks, weights=weights)
    audited(store, train, *found, columns=columns, weights=weights, threat=("Linf", "0.1", "0.2"))
    audited(store, train, evaluations=keys, weights=weights)
    return train, keys


def finding(row: Row, code: str) -> Finding:
    """The one finding of the model itself (of no single attack) with this code."""
    (found,) = [f for f in row.findings if f.code == code and f.attack is None]
    return found
