"""Records and per-sample arrays -> data frame -> rows. Accuracy, worst case and intervals are derived, never stored.

`frame` has one row an evaluation; `rows` puts the evaluations of one trained configuration (all its seeds) under one
budget together; `matrix` is the terminal's table; `paired` compares two models on the same images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import catalog, datasets
from bench.core.numbers import Number
from bench.core.stats import mean_std, paired_difference, wilson
from bench.names import label as label
from bench.store import Store

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Entry = dict[str, Any]
Picked = dict[str, dict[int, Entry]]  # attack label -> seed -> the evaluation that counts

# what `frame` holds; object columns have None where there is nothing, float64 ones NaN
COLUMNS: dict[str, str] = {
    **dict.fromkeys(("key", "train_key", "config", "dataset", "model", "defense", "defense_label"), "object"),
    **dict.fromkeys(("attack", "attack_label", "attack_version", "norm", "eps"), "object"),
    "eps_value": "float64",
    **dict.fromkeys(("train_norm", "train_eps"), "object"),
    **dict.fromkeys(("train_images", "seed", "n"), "Int64"),
    **dict.fromkeys(("state", "reason"), "object"),
    **dict.fromkeys(("accuracy", "low", "high"), "float64"),
    "test_hash": "object",
    **dict.fromkeys(("attack_seconds", "forwards", "backwards", "train_seconds", "seconds_per_epoch"), "float64"),
    **dict.fromkeys(("inference_ms", "peak_memory_mb"), "float64"),
    **dict.fromkeys(("device", "train_device", "commit"), "object"),
    "dirty": "boolean",
    "workers": "Int64",
    "recipe": "object",
    "epochs": "Int64",
    **dict.fromkeys(("deploys", "train_state"), "object"),
}
RADII = (0.0, 0.25, 0.5, 1.0)
MATRIX_RADII = (0.25, 0.5)
RANKED_N = 1000
LONGEST_REASON = 200


@dataclass(frozen=True)
class Cell:
    """One entry of a row: a share in [0,1] for each seed, over `n` images, and (state, reason) of the other seeds."""

    values: dict[int, float]
    n: int
    absent: dict[int, tuple[str, str]]

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN where there is no value."""
        return mean_std(list(self.values.values()))[0] if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds, 0 for one seed; NaN where there is no value."""
        return mean_std(list(self.values.values()))[1] if self.values else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the mean at n images: seeds share their images, so they do not add to n."""
        return wilson(round(self.mean * self.n), self.n) if self.values else (math.nan, math.nan)

    def state(self) -> str:
        """What stands in the table where there is no number."""
        return ", ".join(sorted({state for state, _ in self.absent.values()})) or "not run"


@dataclass(frozen=True)
class Row:
    """One trained configuration (all seeds together) under one budget.

    `attacks` is keyed by attack label, `certified` by L2 radius (of one `certify`, that with most seeds done). `worst`
    has values for those of `seeds` that have the full attack set; `keys` are the evaluations in it. `collapsed` seeds
    stay in every mean: they are shown, not averaged away. `provisional` says why the row is not ranked. `ratio` is
    the training time over that of `standard`; `shared`: the machine did other jobs meanwhile. `train_key`, `config`:
    as in `frame`, of the first seed.
    """

    dataset: str
    model: str
    defense: str
    method: str
    norm: str | None
    eps: str | None
    eps_value: float
    train_eps: str
    recipe: str
    epochs: int
    deploys: str
    clean: Cell
    autoattack: Cell
    attacks: dict[str, Cell]
    worst: Cell
    certified: dict[float, Cell]
    seeds: tuple[int, ...]
    keys: dict[int, tuple[str, ...]]
    collapsed: tuple[int, ...]
    train_seconds: float
    ratio: float
    shared: bool
    device: str
    commit: str
    provisional: tuple[str, ...]
    train_key: str
    config: str


def frame(store: Store, keys: Iterable[str] | None = None) -> pd.DataFrame:
    """One row an evaluation among `keys` (default: all of the store), ended or not; seeds are never averaged here.

    key, train_key; config: hash of the training job apart from its seed, and of the weights attacked; dataset, model,
    defense, defense_label, attack, attack_label, attack_version (engine.revision); norm, eps (text), eps_value: the
    budget attacked, None for clean and certify; train_norm, train_eps: the budget trained at, None for a defense that
    uses none; train_images, n: how many images are asked for; seed; state: done, error, diverged, unsupported, missing
    (no record), blocked (its training failed) or unreadable (damaged job or samples), and its reason; accuracy, low,
    high: share in [0,1] and its 95 % Wilson interval, NaN unless done; test_hash; attack_seconds; forwards, backwards:
    passes per image; train_seconds, seconds_per_epoch; inference_ms: per image; peak_memory_mb: of the training, on
    the GPU or else resident; device: of the attack; train_device, commit, dirty; workers: above 1 training times
    shared the machine; recipe, epochs, deploys, train_state.
    """
    import pandas as pd

    wanted = store.keys() if keys is None else dict.fromkeys(keys)
    entries = []
    for key in wanted:
        if keys is None and not (store.folder(key) / "job.json").exists():
            continue  # an empty folder: nothing was written down, so nothing is known to be missing
        try:
            entry = _entry(store, key)
        except (LookupError, ValueError) as problem:
            entry = {"key": key, "state": "unreadable", "reason": str(problem)}
        if entry is not None:
            entries.append(entry)
    entries.sort(key=lambda e: (e.get("dataset") or "", e.get("defense_label") or "", e.get("seed") or 0, e["key"]))
    return pd.DataFrame({c: pd.Series([e.get(c) for e in entries], dtype=d) for c, d in COLUMNS.items()})  # type: ignore[call-overload]


def _entry(store: Store, key: str) -> Entry | None:
    job = store.job(key)
    if job.kind != "evaluate":
        return None
    trained, record = store.job(job.needs[0]), store.record(key)
    attack, threat = job.what["attack"], job.what["threat"] or {}
    entry = {
        "key": key,
        **_of_training(store, trained.key, trained.what, job.what["weights"]),
        "attack": attack["name"],
        "attack_label": label("attacks", attack["name"], attack["set"]),
        "attack_version": f"{job.what['engine']}.{attack['revision']}",
        "norm": threat.get("norm"),
        "eps": threat.get("eps"),
        "eps_value": float(Number(threat["eps"])) if threat else None,
        "n": job.what["n"],
        "state": record["state"] if record else "missing",
        "reason": _reason(record),
    }
    if entry["state"] in ("missing", "error") and entry["train_state"] not in ("done", "missing"):
        reason = f"training {entry['train_state']}: {_reason(store.record(trained.key))}"
        entry |= {"state": "blocked", "reason": reason}
    if record is None:
        return entry
    metrics, origin = record.get("metrics", {}), record.get("provenance", {})
    entry |= {name: metrics.get(name) for name in ("attack_seconds", "test_hash")}
    entry |= {name: metrics.get(f"{name}_per_image") for name in ("forwards", "backwards")}
    entry |= {name: origin.get(name) for name in ("device", "commit", "dirty")}
    return entry | (_accuracy(store, key) if entry["state"] == "done" else {})


def _of_training(store: Store, key: str, what: dict[str, Any], weights: str) -> Entry:
    record = store.record(key) or {}
    metrics, origin, memory = (record.get(part) or {} for part in ("metrics", "provenance", "peak_memory_mb"))
    config = json.dumps([{name: value for name, value in what.items() if name != "seed"}, weights], sort_keys=True)
    defense, threat = what["defense"], what["threat"] or {}
    deploys = metrics.get("deploys")
    if deploys is None:
        try:
            deploys = catalog.get("defenses", defense["name"]).constant("deploys", "deterministic")
        except (LookupError, ValueError):  # the plug-in is gone and the model was never trained
            deploys = "deterministic"
    return {
        "train_key": key,
        "config": hashlib.sha256(config.encode()).hexdigest()[:12],
        "dataset": what["data"]["name"],
        "model": label("models", what["model"]["name"], what["model"]["set"]),
        "defense": defense["name"],
        "defense_label": label("defenses", defense["name"], defense["set"]),
        "train_norm": threat.get("norm"),
        "train_eps": threat.get("eps"),
        "train_images": what["data"]["train"],
        "seed": what["seed"],
        "recipe": what["recipe"],
        "epochs": what["train"]["epochs"],
        "deploys": deploys,
        "train_state": record.get("state", "missing"),
        "train_device": origin.get("device"),
        "workers": origin.get("workers"),
        "train_seconds": metrics.get("train_seconds"),
        "seconds_per_epoch": metrics.get("seconds_per_epoch"),
        "inference_ms": metrics.get("inference_ms_per_image"),
        "peak_memory_mb": memory.get("cuda") or memory.get("rss"),
    }


def _reason(record: dict[str, Any] | None) -> str | None:
    """The one line that a record which is not done has to say."""
    if record is None or record["state"] == "done":
        return None
    error = record.get("error") or {}
    return record.get("reason") or ": ".join(error[part] for part in ("type", "message") if error.get(part)) or None


def _accuracy(store: Store, key: str) -> Entry:
    try:
        correct = store.samples(key)["correct"]
        hits, n = int(correct.sum()), len(correct)
        low, high = wilson(hits, n)
    except (LookupError, OSError, ValueError) as problem:  # damaged evidence is no number
        return {"state": "unreadable", "reason": str(problem)}
    return {"accuracy": hits / n, "low": low, "high": high}


def rows(store: Store, table: pd.DataFrame) -> list[Row]:
    """One Row for each trained configuration and budget of a `frame`, ordered by method.

    Worst case of a seed: share of images right under clean *and* every attack at this budget, over the largest prefix
    of the test set that all of them, in all counted seeds, share. A seed counts if it has every attack of the row
    done; an attack that no seed supports is left out of the set and shown as unsupported.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in table[table["config"].notna()].to_dict("records"):
        groups.setdefault(entry["config"], []).append({str(name): value for name, value in entry.items()})
    times = _standard_times([entry for group in groups.values() for entry in group])
    found = []
    for group in groups.values():
        budgets = {(e["norm"], e["eps"]) for e in group if e["norm"]} or {(None, None)}
        for budget in sorted(budgets, key=lambda b: (b[0] or "", Number(b[1] or 0))):
            # clean and certify do not depend on the budget: they stand in every row
            found.append(_row(store, [e for e in group if e["norm"] is None or (e["norm"], e["eps"]) == budget], times))
    return sorted(_told_apart(store, found), key=lambda row: (row.method, row.config))


def _row(store: Store, entries: list[Entry], times: dict[tuple[Any, ...], float]) -> Row:
    picked = _pick(entries)
    first = min(entries, key=lambda e: (e["norm"] is None, e["seed"], e["key"]))
    seeds = tuple(sorted({e["seed"] for e in entries}))
    attacks = {name: found for name, found in picked.items() if _any(found)["norm"]}
    clean = {name: found for name, found in picked.items() if _any(found)["attack"] == "clean"}
    certify = [found for name, found in sorted(picked.items()) if not _any(found)["norm"] and name not in clean]
    certify.sort(key=lambda found: -sum(e["state"] == "done" for e in found.values()))
    cells = {name: _cell(found) for name, found in attacks.items()}
    worst, keys = _worst(store, clean | attacks, seeds)
    suites = [cells[name] for name, found in attacks.items() if _is_autoattack(store, _any(found))]
    clean_cell = _cell(next(iter(clean.values()), {}))
    seconds = {e["train_key"]: e["train_seconds"] for e in entries if not math.isnan(e["train_seconds"])}
    mean_seconds = fmean(seconds.values()) if seconds else math.nan
    row = Row(
        **{name: first[name] for name in ("dataset", "model", "defense", "norm", "eps", "eps_value", "recipe")},
        **{name: first[name] for name in ("epochs", "deploys", "train_key", "config")},
        method=first["defense_label"],
        train_eps=_train_eps(first),
        clean=clean_cell,
        autoattack=next((cell for cell in suites if cell.values), suites[0] if suites else Cell({}, 0, {})),
        attacks=cells,
        worst=worst,
        certified={radius: _certified(store, certify[0], radius) for radius in _radii(first)} if certify else {},
        seeds=seeds,
        keys=keys,
        collapsed=_collapsed(first["dataset"], clean_cell, [clean_cell, *cells.values(), worst], seeds),
        train_seconds=mean_seconds,
        ratio=mean_seconds / times.get(_time_class(first), math.nan),
        shared=any(_busy(e) for e in entries),
        device=_joined(name for e in entries for name in (e["train_device"], e["device"])),
        commit=_joined(e["commit"] and e["commit"] + (" (dirty)" if e["dirty"] is True else "") for e in entries),
        provisional=(),
    )
    return replace(row, provisional=_provisional(row))


def _pick(entries: list[Entry]) -> Picked:
    """The evaluation that counts for each attack and seed: newest revision, then done, then most images."""

    def order(entry: Entry) -> tuple[list[int], bool, int, str]:
        version = [int(part) for part in entry["attack_version"].split(".")]
        return version, entry["state"] == "done", entry["n"], entry["key"]

    picked: Picked = {}
    for entry in sorted(entries, key=order):
        picked.setdefault(entry["attack_label"], {})[entry["seed"]] = entry
    return picked


def _any(found: dict[int, Entry]) -> Entry:
    """One of the evaluations of an attack, for what its seeds have in common."""
    return next(iter(found.values()))


def _joined(names: Iterable[str | None]) -> str:
    return "; ".join(sorted({name for name in names if name})) or "unknown"


def _train_eps(entry: Entry) -> str:
    if entry["train_eps"] is None:
        return "–"
    same = entry["train_norm"] == entry["norm"] or entry["norm"] is None
    return str(entry["train_eps"]) if same else f"{entry['train_norm']} {entry['train_eps']}"


def _radii(entry: Entry) -> list[float]:
    return sorted({*RADII, *([entry["eps_value"]] if entry["norm"] == "L2" else [])})


def _is_autoattack(store: Store, entry: Entry) -> bool:
    """The suite of its authors in full; `rand` and custom suites have their own column only."""
    version = store.job(entry["key"]).what["attack"]["set"].get("version", "standard")
    return entry["attack"] == "autoattack" and version in ("standard", "plus")


def _cell(found: dict[int, Entry]) -> Cell:
    done = {seed: e for seed, e in sorted(found.items()) if e["state"] == "done"}
    absent = {seed: (e["state"], e["reason"] or "") for seed, e in found.items() if seed not in done}
    problem = _mixed((e["n"], e["test_hash"], e["key"]) for e in done.values())
    if problem:
        return Cell({}, 0, dict.fromkeys(found, ("mixed test sets", problem)))
    return Cell({s: e["accuracy"] for s, e in done.items()}, min((e["n"] for e in done.values()), default=0), absent)


def _mixed(subsets: Iterable[tuple[int, str | None, str]]) -> str | None:
    """What is wrong if evaluations of equally many images saw different ones (subsets of other sizes hash apart)."""
    seen: dict[int, tuple[str | None, str]] = {}
    for n, test_hash, key in subsets:
        other, first = seen.setdefault(n, (test_hash, key))
        if other != test_hash:
            return f"{first} saw test images {other}, {key} saw {test_hash}"
    return None


def _prefixes(store: Store, keys: Iterable[str]) -> list[np.ndarray[Any, Any]]:
    """`correct` of each evaluation on the largest prefix of the test set that all of them share, equally long.

    Raises ValueError where they did not see the same images.
    """
    import numpy as np

    found, labels, subsets = [], [], []
    for key in keys:
        samples, record = store.samples(key), store.record(key) or {"metrics": {}}
        subsets.append((len(samples["index"]), record["metrics"].get("test_hash"), key))
        order = np.argsort(samples["index"], kind="stable")
        n = int(np.cumprod(samples["index"][order] == np.arange(len(order))).sum())
        found.append(samples["correct"][order][:n].astype(bool))
        labels.append((samples["label"][order][:n], key) if "label" in samples else None)
    n = min(map(len, found))
    known = [pair for pair in labels if pair]
    wrong = [key for values, key in known if not np.array_equal(values[:n], known[0][0][:n])]
    problem = _mixed(subsets) or (f"{known[0][1]} and {wrong[0]} have other labels at the same index" if wrong else "")
    if problem:
        raise ValueError(problem)
    return [correct[:n] for correct in found]


def _worst(store: Store, judged: Picked, seeds: tuple[int, ...]) -> tuple[Cell, dict[int, tuple[str, ...]]]:
    """Worst case of the seeds that have every attack, and the evaluations it is the minimum of."""
    asked = {name: by for name, by in judged.items() if any(e["state"] != "unsupported" for e in by.values())}
    if not any(_any(by)["norm"] for by in asked.values()):
        return Cell({}, 0, dict.fromkeys(seeds, ("not attacked", ""))), {}
    keys, absent = {}, {}
    for seed in seeds:
        states = {name: by[seed]["state"] if seed in by else "not planned" for name, by in sorted(asked.items())}
        lacking = [f"{name} {state}" for name, state in states.items() if state != "done"]
        if lacking:
            absent[seed] = ("incomplete", ", ".join(lacking))
        else:
            keys[seed] = tuple(sorted(by[seed]["key"] for by in asked.values()))
    if not keys:
        return Cell({}, 0, absent), {}
    try:
        columns = _prefixes(store, [key for chosen in keys.values() for key in chosen])
    except ValueError as problem:
        return Cell({}, 0, dict.fromkeys(seeds, ("mixed test sets", str(problem)))), {}
    n, left = len(columns[0]), iter(columns)
    if n == 0:
        return Cell({}, 0, dict.fromkeys(seeds, ("no shared images", "no prefix of the test set is shared"))), {}
    values = {seed: float(_all(next(left) for _ in chosen).mean()) for seed, chosen in keys.items()}
    return Cell(values, n, absent), keys


def _all(columns: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.logical_and.reduce(list(columns))


def _certified(store: Store, found: dict[int, Entry], radius: float) -> Cell:
    """Share of images that are right with a certificate of at least this radius."""
    cell, values = _cell(found), {}
    for seed in cell.values:
        samples = store.samples(found[seed]["key"])
        if "radius" not in samples:
            return Cell({}, 0, dict.fromkeys(found, ("no certificate", "")))
        values[seed] = float((samples["correct"].astype(bool) & (samples["radius"] >= radius)).mean())
    return replace(cell, values=values)


def _collapsed(dataset: str, clean: Cell, cells: list[Cell], seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds at chance on clean images, or in some column below a tenth of the mean of the others, beyond noise."""
    facts = datasets.KNOWN.get(dataset)
    found = {seed for seed, value in clean.values.items() if facts and value <= 1.5 / facts.classes}
    for cell in cells:
        for seed, value in cell.values.items():
            others = [v for s, v in cell.values.items() if s != seed]
            if others and value < fmean(others) / 10 and wilson(round(value * cell.n), cell.n)[1] < fmean(others):
                found.add(seed)
    return tuple(seed for seed in seeds if seed in found)


def _provisional(row: Row) -> tuple[str, ...]:
    """Why this row has no rank; empty where it has one."""
    facts = datasets.KNOWN.get(row.dataset)
    needed = min(RANKED_N, facts.test) if facts else RANKED_N
    reasons = [] if row.worst.values else ["no worst case"]
    if row.worst.values and row.worst.n < needed:
        reasons.append(f"worst case over {row.worst.n} images, ranking needs {needed}")
    if row.deploys != "deterministic":
        reasons.append("randomised protocol not run")
    elif not row.autoattack.values:
        reasons.append("AutoAttack standard is not in the attack set")
    return tuple(reasons)


def _time_class(entry: Entry) -> tuple[Any, ...]:
    """Training times are compared within one of these only; papers' own recipes differ in epochs by intent."""
    epochs = entry["epochs"] if entry["recipe"] == "shared" else None
    return (
        *(entry[name] for name in ("dataset", "train_images", "model", "train_device", "recipe")),
        epochs,
        _busy(entry),
    )


def _busy(entry: Entry) -> bool:
    """Did the machine do other jobs during the training?"""
    return isinstance(entry["workers"], int) and entry["workers"] > 1


def _standard_times(entries: list[Entry]) -> dict[tuple[Any, ...], float]:
    """Mean training seconds of `standard` in each class."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for e in entries:
        if e["defense"] == "standard" and not math.isnan(e["train_seconds"]):
            times.setdefault(_time_class(e), {})[e["train_key"]] = e["train_seconds"]
    return {kind: fmean(seconds.values()) for kind, seconds in times.items()}


def _told_apart(store: Store, found: list[Row]) -> list[Row]:
    """Rows that would read alike get the settings in which they differ behind their name."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        shown = (row.dataset, row.norm, row.eps, row.method, row.model, row.train_eps, row.recipe, row.epochs)
        alike.setdefault(shown, []).append(row)
    names = {}
    for group in alike.values():
        flat = [dict(_flat(store.job(row.train_key).what)) for row in group]
        differ = sorted(k for k in set().union(*flat) if k != "seed" and len({str(f.get(k)) for f in flat}) > 1)
        for row, facts in zip(group, flat, strict=True):
            if differ:
                names[id(row)] = f"{row.method} [{', '.join(f'{k}={facts.get(k)}' for k in differ)}]"
    return [replace(row, method=names.get(id(row), row.method)) for row in found]


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, dict):
        yield path, values
        return
    for name, value in values.items():
        yield from _flat(value, f"{path}.{name}" if path else str(name))


def failures(found: Iterable[Row]) -> list[str]:
    """Why cells have no number, a line for each method, seed and reason. Missing records need no explanation."""
    lines: dict[tuple[str, int, str], dict[str, None]] = {}
    for row in found:
        cells = [("clean", row.clean), *row.attacks.items()]
        cells += [("certified", cell) for cell in list(row.certified.values())[:1]]
        cells += [] if row.worst.values else [("worst case", row.worst)]
        for name, cell in cells:
            for seed, (state, reason) in cell.absent.items():
                # what an incomplete worst case lacks has said why itself, unless it was never planned
                if reason and (state != "incomplete" or "not planned" in reason):
                    short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…"
                    lines.setdefault((row.method, seed, f"{state}: {short}"), {})[name] = None
    return [f"{method}, seed {seed}, {', '.join(names)}: {why}" for (method, seed, why), names in lines.items()]


def matrix(store: Store, keys: Iterable[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """The end-of-run table of these jobs, in their order: header, lines, notes. Percent with half a 95 % interval."""
    asked = list(keys)
    table = frame(store, asked)
    place = {key: k for k, key in enumerate(asked)}
    known = table[table["config"].notna()].sort_values("key", key=lambda column: column.map(place))
    order = {config: k for k, config in enumerate(dict.fromkeys(known["config"]))}
    found = sorted(rows(store, table), key=lambda row: (order[row.config], row.norm or "", row.eps_value))
    columns = _matrix_columns(found, list(dict.fromkeys(known[known["norm"].notna()]["attack_label"])))
    lines = [[show(row) for show in columns.values()] for row in found]
    unreadable = table[table["config"].isna()]
    notes = [*_matrix_notes(found), *(f"{key}: unreadable: {why}" for key, why in unreadable[["key", "reason"]].values)]
    return list(columns), lines, notes


def _matrix_columns(found: list[Row], attacks: list[str]) -> dict[str, Callable[[Row], str]]:
    columns: dict[str, Callable[[Row], str]] = {"defense": lambda row: row.method}
    for name in ("dataset", "model"):
        if len({getattr(row, name) for row in found}) > 1:
            columns[name] = lambda row, name=name: getattr(row, name)  # type: ignore[misc]
    columns["eps"] = lambda row: f"{row.norm} {row.eps}" if row.norm else "–"
    if any(row.train_eps not in ("–", row.eps) for row in found):
        columns["train eps"] = lambda row: row.train_eps
    columns["clean"] = lambda row: _short(row, row.clean)
    for name in attacks:
        columns[name] = lambda row, name=name: _short(row, row.attacks.get(name))  # type: ignore[misc]
    columns["worst case"] = lambda row: _short(row, row.worst) + ("†" if row.provisional else "")
    for radius in MATRIX_RADII if any(row.certified for row in found) else ():
        columns[f"certified {radius:g}"] = lambda row, r=radius: _short(row, row.certified.get(r))  # type: ignore[misc]
    seconds = {"train s": lambda row: "–" if math.isnan(row.train_seconds) else f"{row.train_seconds:.1f}"}
    ratio = {"× standard": lambda row: "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}"}
    return columns | seconds | ratio


def _short(row: Row, cell: Cell | None) -> str:
    if cell is None or not cell.values:
        return cell.state() if cell else "not run"
    (low, high), done, planned = cell.interval(), len(cell.values), len(row.seeds)
    seeds = f" ({done}/{planned})" if done < planned else ""
    return f"{100 * cell.mean:.1f} ±{50 * (high - low):.1f}{seeds}"


def _matrix_notes(found: list[Row]) -> list[str]:
    sizes: dict[str, set[int]] = {}
    for row in found:
        cells = {"clean": row.clean, **row.attacks, "worst case": row.worst}
        cells |= {"certified": next(iter(row.certified.values()), Cell({}, 0, {}))}
        for name, cell in cells.items():
            if cell.values:
                sizes.setdefault(name, set()).add(cell.n)
    shown = ", ".join(f"{name} {'/'.join(map(str, sorted(n)))}" for name, n in sizes.items())
    notes = [f"percent ± half a 95 % interval; images: {shown}"] if shown else []
    partial = [row for row in found if 0 < len(row.worst.values) < len(row.seeds)]
    notes += ["(k/s): k of s seeds; only seeds with every attack count in the worst case"] if partial else []
    notes += [f"{row.method}: seeds {', '.join(map(str, row.collapsed))} collapsed" for row in found if row.collapsed]
    reasons: dict[str, list[str]] = {}
    for row in found:
        for reason in row.provisional:
            reasons.setdefault(reason, []).append(row.method)
    for reason, methods in reasons.items():
        names = "all" if len(methods) == len(found) > 1 else ", ".join(dict.fromkeys(methods))
        notes.append(f"† {reason} ({names})")
    return [*notes, *failures(found)]


class Paired(NamedTuple):
    """Difference of two worst-case accuracies on the same n images, with its 95 % interval; shares in [0,1]."""

    difference: float
    low: float
    high: float
    n: int


def paired(store: Store, keys_a: Iterable[str], keys_b: Iterable[str]) -> Paired:
    """Worst case of evaluations `keys_a` minus that of `keys_b` (`Row.keys` of a seed), image by image.

    Raises ValueError where they share no images or saw different test sets.
    """
    a, b = list(keys_a), list(keys_b)
    columns = _prefixes(store, [*a, *b])
    first, second = _all(columns[: len(a)]), _all(columns[len(a) :])
    return Paired(*paired_difference(first.tolist(), second.tolist()), n=len(first))
