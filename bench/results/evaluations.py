"""Records and per-sample arrays -> data frame, one row an evaluation. Accuracy is derived here, never stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.results.facts import Facts
from bench.core.stats import wilson
from bench.planning.evaluations import RANDOMISED_REVISION
from bench.planning.job import Job
from bench.records.store import Store

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Entry = dict[str, Any]

# what `frame` holds; object columns have None where there is nothing, float64 ones NaN
COLUMNS: dict[str, str] = {
    **dict.fromkeys(("key", "train_key", "config", "dataset", "split", "model", "defense", "defense_label"), "object"),
    **dict.fromkeys(("attack", "attack_label", "attack_version", "norm", "eps"), "object"),
    "eps_value": "float64",
    **dict.fromkeys(("train_norm", "train_eps"), "object"),
    **dict.fromkeys(("train_images", "seed", "n"), "Int64"),
    **dict.fromkeys(("state", "reason"), "object"),
    **dict.fromkeys(("accuracy", "low", "high", "median_distance"), "float64"),
    "measures": "object",
    "measured": "float64",
    "test_hash": "object",
    **dict.fromkeys(("attack_seconds", "forwards", "backwards", "train_seconds", "seconds_per_epoch"), "float64"),
    **dict.fromkeys(("work_per_image_f", "inference_ms", "peak_memory_mb"), "float64"),
    **dict.fromkeys(("device", "train_device", "commit"), "object"),
    "dirty": "boolean",
    "workers": "Int64",
    "attack_workers": "Int64",
    "recipe": "object",
    "epochs": "Int64",
    **dict.fromkeys(("deploys", "train_state"), "object"),
}


def frame(store: Store, keys: Iterable[str] | None = None) -> pd.DataFrame:
    """One row an evaluation among `keys` (default: all of the store), ended or not; seeds are never averaged here.

    key, train_key; config: hash of the training job apart from its seed, of the weights attacked and of the split they
    are judged on; dataset; split: test or validation; model, defense, defense_label, attack, attack_label,
    attack_version (engine.revision); norm, eps (text), eps_value: the budget attacked, None for clean and certify;
    train_norm, train_eps: the budget trained at, None for a defense that uses none; train_images, n: how many images
    are asked for; seed; state: done, error, timeout, oom, diverged, unsupported, missing (no record), blocked (its
    training failed), stale (a model that draws, judged by an older rule) or unreadable (damaged job or samples), and
    its reason; accuracy, low, high: share in [0,1] and its 95 % Wilson interval, NaN unless done; median_distance:
    from images right when clean to what a minimal-norm attack found, inf if it found nothing for half of them;
    measures, measured: for an evaluation that judges no robustness the column it is about and its mean, which stand in
    no table of accuracies; test_hash; attack_seconds; forwards, backwards: passes per image; train_seconds,
    seconds_per_epoch; work_per_image_f: of a training step, in forward passes F of the net; inference_ms: per image;
    peak_memory_mb: of the training, on the GPU or else resident; device: of the attack; train_device, commit, dirty;
    workers, attack_workers: above 1 the times of the training, or of the attack, shared the machine; recipe, epochs,
    deploys, train_state.
    """
    import pandas as pd

    wanted = store.keys() if keys is None else dict.fromkeys(keys)
    entries, facts = [], Facts(store)
    for key in wanted:
        if keys is None and not (store.folder(key) / "job.json").exists():
            continue  # an empty folder: nothing was written down, so nothing is known to be missing
        try:
            entries += _entries(store, facts, key)
        except (LookupError, ValueError) as problem:
            entries.append({"key": key, "state": "unreadable", "reason": str(problem)})
    entries.sort(key=lambda e: (e.get("dataset") or "", e.get("defense_label") or "", e.get("seed") or 0, e["key"]))
    return pd.DataFrame({c: pd.Series([e.get(c) for e in entries], dtype=d) for c, d in COLUMNS.items()})  # type: ignore[call-overload]


def of_split(table: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """The evaluations on images of this split; unreadable ones count as "test".

    Ranks rest on test images only, since settings may have been chosen on validation images.
    """
    return table[table["split"].fillna("test") == split]


def _entries(store: Store, facts: Facts, key: str) -> list[Entry]:
    """The evaluation of this key; one that walks through several budgets is as many entries, none if it is no such."""
    job = store.job(key)
    if job.kind != "evaluate":
        return []
    budgets = job.what["attack"]["set"].get("budgets")
    if not budgets:
        threat = job.what["threat"] or {}
        return [_entry(store, facts, job, threat.get("eps"))]
    return [_entry(store, facts, job, eps) for eps in budgets]


def right_at(samples: dict[str, Any], eps: float) -> np.ndarray[Any, Any]:
    """Which images (bool) are right at a budget: of a security curve those that broke above it only."""
    if "broken_at" in samples:
        found: np.ndarray[Any, Any] = samples["broken_at"] > eps
        return found
    return samples["correct"].astype(bool)  # type: ignore[no-any-return]


def _entry(store: Store, facts: Facts, job: Job, eps: str | None) -> Entry:
    key, record = job.key, store.record(job.key)
    attack, threat = job.what["attack"], job.what["threat"] or {}
    split = job.what.get("split", "test")
    judged = [job.what["weights"], *([split] if split != "test" else [])]
    entry = {
        "key": key,
        **facts.of_training(job.needs[0], judged),
        "split": split,
        "attack": attack["name"],
        "attack_label": facts.label("attacks", attack["name"], attack["set"]),
        "attack_version": f"{job.what['engine']}.{attack['revision']}",
        "norm": threat.get("norm"),
        "eps": eps,
        "eps_value": facts.value(eps) if eps is not None else None,
        "n": job.what["n"],
        "measures": facts.measures(attack["name"], record),
        "state": record["state"] if record else "missing",
        "reason": _reason(record),
    }
    if entry["state"] in ("missing", "error") and entry["train_state"] not in ("done", "missing"):
        reason = f"training {entry['train_state']}: {_reason(store.record(entry['train_key']))}"
        entry |= {"state": "blocked", "reason": reason}
    if entry["deploys"] != "deterministic" and job.what["engine"] < RANDOMISED_REVISION and entry["state"] == "done":
        # such samples cannot be put together with newer ones: the draws that judge also chose
        why = "judged before choosing and judging draws were kept apart; `bench run` does it again"
        return entry | {"state": "stale", "reason": why}
    if record is None:
        return entry
    metrics, origin = record.get("metrics", {}), record.get("provenance", {})
    entry |= {name: metrics.get(name) for name in ("attack_seconds", "test_hash")}
    entry |= {name: metrics.get(f"{name}_per_image") for name in ("forwards", "backwards")}
    entry |= {name: origin.get(name) for name in ("device", "commit", "dirty")}
    entry["attack_workers"] = origin.get("workers")
    if entry["state"] != "done":
        return entry
    measures = entry["measures"]
    return entry | (_measured(store, key, measures) if measures else _accuracy(store, key, entry["eps_value"] or 0.0))


def _reason(record: dict[str, Any] | None) -> str | None:
    """The one line that a record which is not done has to say."""
    if record is None or record["state"] == "done":
        return None
    error = record.get("error") or {}
    return record.get("reason") or ": ".join(error[part] for part in ("type", "message") if error.get(part)) or None


def _measured(store: Store, key: str, column: str) -> Entry:
    try:
        return {"measured": float(store.samples(key)[column].mean())}
    except (LookupError, OSError, ValueError) as problem:
        return {"state": "unreadable", "reason": str(problem)}


def _accuracy(store: Store, key: str, eps: float) -> Entry:
    try:
        samples = store.samples(key, ("correct", "broken_at", "distance"))
        correct = right_at(samples, eps)
        hits, n = int(correct.sum()), len(correct)
        low, high = wilson(hits, n)
        distance = _median_distance(store, key, samples)
    except (LookupError, OSError, ValueError) as problem:  # damaged evidence is no number
        return {"state": "unreadable", "reason": str(problem)}
    return {"accuracy": hits / n, "low": low, "high": high, "median_distance": distance}


def _median_distance(store: Store, key: str, samples: dict[str, Any]) -> float | None:
    """Of the images that are right without an attack; one that a minimal-norm attack never broke is infinitely far."""
    import numpy as np

    if "distance" not in samples:
        return None
    clean = store.samples(key, ("clean",))["clean"]
    asked = clean.astype(bool) & ~np.isnan(samples["distance"])
    return float(np.median(samples["distance"][asked])) if asked.any() else None
