"""Failures of a job before its record: attempts.json counts the runs that failed, retries.json lists the retries of the
present run. Both become part of the record.
"""

from __future__ import annotations

from pathlib import Path

from bench.atomic import read_json, write_json
from bench.records.record import Retry, retries_from_json, retries_to_json

ATTEMPTS, RETRIES = "attempts.json", "retries.json"


def failures(folder: Path) -> int:
    """How often the job has failed; 0 if nothing readable is stored."""
    try:
        return int(read_json(folder / ATTEMPTS)["count"])
    except (OSError, KeyError, TypeError, ValueError):
        return 0


def count_failure(folder: Path) -> None:
    """Count one more failure of the job."""
    write_json(folder / ATTEMPTS, {"count": failures(folder) + 1})


def retries(folder: Path) -> list[Retry]:
    """The retries of the run that is under way, as its record will list them; empty if they cannot be read."""
    try:
        return retries_from_json(read_json(folder / RETRIES))
    except (OSError, ValueError):
        return []


def save_retries(folder: Path, entries: list[Retry]) -> None:
    """Replace the list of retries; an empty one removes the file."""
    if entries:
        write_json(folder / RETRIES, retries_to_json(entries))
    else:
        (folder / RETRIES).unlink(missing_ok=True)
