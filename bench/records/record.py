"""The content of record.json: its checksum, its files, and what makes it readable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from typing import Any

from bench.planning.schema import upgraded

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names of files in a record: never a path
FINISHED = ("done", "diverged", "unsupported")  # states that the same command does not try again


def parsed(data: bytes | None, key: str) -> dict[str, Any] | None:
    """The record of job `key` from the bytes of its file; None where they are absent or damaged.

    Raises NewerSchemaError where a newer version wrote it.
    """
    try:
        record: dict[str, Any] = json.loads((data or b"").decode())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or record.get("key") != key or record.get("checksum") != checksum(record):
        return None
    files = record.get("files", {})
    if not isinstance(files, dict) or not all(FILE.fullmatch(name) for name in files):
        return None
    with contextlib.suppress(ValueError):
        return upgraded(record)
    return None


def weights_file(which: str) -> str:
    """Name of the file with a training's `last` weights, or with the `best` ones by validation."""
    return f"weights-{which}.safetensors"


def finite(values: Any) -> Any:
    """The values with null in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def checksum(record: dict[str, Any]) -> str:
    """Checksum of all fields of a record but the checksum itself."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
