"""Failures of a job before its record: attempts.json counts the runs that failed, retries.json lists the retries of the
present run. Both become part of the record.

Older versions used each name for the other file; an object is the count, a list the retries.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bench.atomic import write_json
from bench.records.record import Retry, retries_from_json, retries_to_json

ATTEMPTS, RETRIES = "attempts.json", "retries.json"


def failures(folder: Path) -> int:
    """How often the job has failed; 0 if nothing is stored."""
    for name in (ATTEMPTS, RETRIES):
        try:
            return int(_saved(folder / name)["count"])
        except (KeyError, TypeError, ValueError):
            continue
    return 0


def count_failure(folder: Path) -> None:
    """Count one more failure of the job."""
    _save(folder, failures(folder) + 1, retries(folder))


def retries(folder: Path) -> list[Retry]:
    """The retries of the run that is under way, as its record will list them; empty where they cannot be read."""
    for name in (RETRIES, ATTEMPTS):
        found = _saved(folder / name)
        if isinstance(found, list):
            with contextlib.suppress(ValueError):
                return retries_from_json(found)
    return []


def save_retries(folder: Path, entries: list[Retry]) -> None:
    """Replace the list of retries; empty once the job has ended."""
    _save(folder, failures(folder), entries)


def _save(folder: Path, count: int, entries: list[Retry]) -> None:
    listed = retries_to_json(entries)
    for name, value, empty in ((ATTEMPTS, {"count": count}, not count), (RETRIES, listed, not entries)):
        if empty:
            (folder / name).unlink(missing_ok=True)
        elif _saved(folder / name) != value:
            write_json(folder / name, value)


def _saved(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
