"""The package face for notebooks: `bench.load("results")` and `bench.samples(key)`; docs/schema.md has the columns.

Nothing heavy is imported before one of them is called: the command line starts through here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import pandas as pd

__all__ = ["load", "samples"]


def load(results: str | os.PathLike[str] = "results") -> pd.DataFrame:
    """One row an evaluation, ended or not, of a results folder; seeds are never averaged here.

    Columns, units and states: docs/schema.md. Raises FileNotFoundError where there is no such folder.
    """
    from bench.analysis.frame import frame

    return frame(_store(results))


def samples(key: str, results: str | os.PathLike[str] = "results") -> pd.DataFrame:
    """One row a test image of one evaluation (`key` as in `load`), by its index in the test set.

    Columns: docs/schema.md. Raises LookupError where there is no such evaluation or it has not ended, ValueError where
    its samples are damaged.
    """
    import pandas as pd

    store = _store(results)
    job, record = store.job(key), store.record(key)
    if job.kind != "evaluate":
        raise LookupError(
            f"{key} is a job of kind '{job.kind}'; samples are of evaluations (column `key` of bench.load)"
        )
    if record is None or record["state"] != "done":
        raise LookupError(f"evaluation {key} has no samples: it is {record['state'] if record else 'missing'}")
    columns: dict[str, Any] = {}
    for name, values in store.samples(key).items():
        columns[name] = values if values.ndim == 1 else list(values)
    found = pd.DataFrame(columns)
    return found.set_index("index").sort_index() if "index" in found else found


def _store(results: str | os.PathLike[str]) -> Any:
    from pathlib import Path

    from bench.records.store import Store

    folder = Path(results)
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}; `bench run` makes one")
    return Store(folder)
