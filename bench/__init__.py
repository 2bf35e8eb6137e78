"""The package face for notebooks: `bench.load`, `bench.samples` and `bench.worst`; docs/schema.md has the columns.

Nothing heavy is imported before one of them is called: the command line starts through here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import pandas as pd

__all__ = ["load", "samples", "worst"]


def load(results: str | os.PathLike[str] = "results") -> pd.DataFrame:
    """One row an evaluation, ended or not, of a results folder; seeds are never averaged here.

    Columns, units and states: docs/schema.md. Raises FileNotFoundError where there is no such folder.
    """
    from bench.results.evaluations import frame

    return frame(_store(results))


def samples(key: str, results: str | os.PathLike[str] = "results") -> pd.DataFrame:
    """One row a test image of one evaluation (`key` as in `load`), by its index in the test set.

    Columns: docs/schema.md. Raises LookupError where there is no such evaluation or it has not ended, ValueError where
    its samples are damaged.
    """
    import pandas as pd

    from bench.planning.job import EvaluateJob

    store = _store(results)
    job, record = store.job(key), store.record(key)
    if not isinstance(job, EvaluateJob):
        raise LookupError(
            f"{key} is a job of kind '{job.kind}'; samples are of evaluations (column `key` of bench.load)"
        )
    if record is None or record.state != "done":
        raise LookupError(f"evaluation {key} has no samples: it is {record.state if record else 'missing'}")
    columns: dict[str, Any] = {}
    for name, values in store.samples(key).items():
        columns[name] = values if values.ndim == 1 else list(values)
    found = pd.DataFrame(columns)
    return found.set_index("index").sort_index() if "index" in found else found


def worst(
    train_key: str, eps: str | float, results: str | os.PathLike[str] = "results", *, weights: str = "last"
) -> pd.DataFrame:
    """One row per test image: is this training's model correct without an attack and under every attack at this budget?

    Columns: `right` (bool), correct by the deployed rule; for a stochastic model also `share`, of single draws that are
    correct, where the attack was chosen by other draws. Their means are the worst case of the leaderboard. `eps`: as in
    the column of `bench.load`, or a number; `weights`: `last`, or `best` where it was evaluated.
    Raises LookupError where there is no such worst case, with the reason.
    """
    import pandas as pd

    from bench.core.epsilon import Epsilon
    from bench.results.evaluations import evaluations
    from bench.results.rows import rows

    store, radius = _store(results), float(Epsilon(eps))
    reasons = []
    for row in rows(store, evaluations(store).of_split("test")):
        entries = [e for e in row.evaluations if e.train_key == train_key]
        if not entries or row.eps_value != radius or store.evaluation(entries[0].key).weights != weights:
            continue
        seed = entries[0].seed
        if seed in row.accuracy.robust:
            columns = {
                "right": row.accuracy.robust[seed],
                **({"share": row.accuracy.share[seed]} if seed in row.accuracy.share else {}),
            }
            return pd.DataFrame(columns).rename_axis("index")
        reasons.append(": ".join(part for part in row.accuracy.worst.absent.get(seed, ("not attacked", "")) if part))
    why = "; ".join(reasons) or f"no evaluation of its {weights} weights at this eps"
    raise LookupError(f"training {train_key} has no worst case at eps {eps}: {why}")


def _store(results: str | os.PathLike[str]) -> Any:
    from pathlib import Path

    from bench.records.store import Store

    folder = Path(results)
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}; `bench run` makes one")
    return Store(folder)
