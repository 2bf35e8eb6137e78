"""The version of job.json and record.json, and how files of an older version are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

SCHEMA = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # from this version to the next


class NewerSchemaError(OSError):
    """A newer version of bench wrote this file. Not a ValueError: the file is not damaged and must not be replaced."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a job.json or record.json in the present schema. Raises ValueError for an unknown schema."""
    schema = values.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"schema {schema}, this version reads {SCHEMA}")
    if schema > SCHEMA:
        raise NewerSchemaError(f"results have schema {schema}, this version reads up to {SCHEMA}; update bench")
    for version in range(schema, SCHEMA):
        values = MIGRATIONS[version](values)
    return {**values, "schema": SCHEMA}


def first_problem(error: ValidationError) -> ValueError:
    """The first field of another type as an error of one line: the field, its value, and what was expected."""
    first = error.errors(include_url=False)[0]
    return ValueError(f"{'.'.join(map(str, first['loc']))} is {first['input']!a:.60}: {first['msg'].lower()}")
