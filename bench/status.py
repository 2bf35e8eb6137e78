"""`bench status`: what is done, runs, waits and failed in a results folder. Reads only, so also while a run goes on."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import live
from bench.estimate import Estimator, clock
from bench.job import Job
from bench.leases import holder_of
from bench.store import Store

SILENT = 120.0  # seconds after which progress without a lease says nothing any more
GOOD = ("done", "unsupported", "running", "waiting")  # every other state is a failure


def status(results: Path, planned: list[Job], as_json: bool) -> None:
    """Print it. `planned`: the jobs of a spec; without any, all there are folders for."""
    store = Store(results)
    known = {**store.jobs(), **{job.key: job for job in planned}}
    found = survey(store, {job.key: job for job in planned} or known, known)
    found["unreadable"] = len(set(store.keys()) - set(known))
    if as_json:
        print(json.dumps({"results": str(results), **found}, indent=1))
        return
    for line in lines(results, found):
        print(line)


def survey(store: Store, jobs: dict[str, Job], known: dict[str, Job]) -> dict[str, Any]:
    """Everything there is to say, as plain values."""
    kinds: dict[str, Counter[str]] = {}
    running, failed, dirty, retried = [], [], 0, 0
    estimator = None
    for key, job in jobs.items():
        record = store.record(key)
        state = record["state"] if record else _open(store, key)
        kinds.setdefault(job.kind, Counter())[state] += 1
        about = {"key": key, "kind": job.kind, "job": live.title(job, known)}
        if state == "running":
            estimator = estimator or Estimator(store)
            running.append({**about, **_progress(store, job, estimator)})
        elif record is not None and state not in GOOD:
            failed.append({**about, "state": state, "reason": _reason(record)})
        if record is not None:
            dirty += state == "done" and bool(record.get("provenance", {}).get("dirty"))
            retried += "retries" in record or "attempts" in record
    total = sum(kinds.values(), Counter[str]())
    return {
        "jobs": len(jobs),
        "states": dict(sorted(total.items())),
        "kinds": {kind: dict(sorted(count.items())) for kind, count in sorted(kinds.items())},
        "running": running,
        "failed": sorted(failed, key=lambda one: str(one["state"])),
        "quarantined": store.quarantined(),
        "retried": retried,
        "dirty": dirty,
    }


def lines(results: Path, found: dict[str, Any]) -> list[str]:
    """The same for people."""
    told = [f"{found['jobs']} jobs in {results}: {_counts(found['states'])}"]
    told += [f"  {kind:9} {_counts(states)}" for kind, states in found["kinds"].items() if len(found["kinds"]) > 1]
    if found["unreadable"]:
        told.append(f"{found['unreadable']} folders have no readable job.json; `bench run` writes it again")
    for one in found["running"]:
        left = f", about {clock(one['seconds_left'])} left" if one["seconds_left"] is not None else ""
        told.append(f"running   {one['job']} ({one['key']}) {one['share']:.0%}{left}")
    told += [f"{one['state']:9} {one['job']} ({one['key']}): {one['reason']}" for one in found["failed"]]
    if found["failed"]:
        told.append("`bench logs KEY` shows a log; `bench retry --failed` lets the same run do them again")
    if found["quarantined"]:
        told.append(f"{len(found['quarantined'])} damaged files set aside in {results}/quarantine/")
    if found["retried"]:
        told.append(f"{found['retried']} records come from a job that had failed before")
    if found["dirty"]:
        told.append(f"{found['dirty']} records were made with uncommitted changes in the code")
    return told


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _open(store: Store, key: str) -> str:
    """State of a job without a record."""
    fresh = abs(time.time() - store.progress(key).get("now", 0)) < SILENT
    there = (store.root / key).is_dir()
    return "running" if there and (fresh or holder_of(store, key) is not None) else "waiting"


def _progress(store: Store, job: Job, estimator: Estimator) -> dict[str, Any]:
    says = store.progress(job.key)
    share, spent = float(says.get("share", 0.0)), time.time() - says.get("began", time.time())
    expected = spent / share if share > 0.05 else estimator.seconds(job)
    return {"share": share, "seconds_left": None if expected is None else max(expected - spent, 0.0)}


def _reason(record: dict[str, Any]) -> str:
    error = record.get("error") or {}
    return f"{error['type']}: {error['message']}" if error else str(record.get("reason", "no reason stored"))
