"""One unit of work and its key: equal content gives equal keys, so specs share work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

IMPORTED = "imported"  # the recipe of a model of the user's, of whose training nothing is known
SCHEMA = 1  # of job.json and record.json
KEYS = 1  # part of every key: another one says that no older outcome counts
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # from the schema named to the next


class NewerSchemaError(OSError):
    """A newer version of bench wrote this: no damage (so no ValueError), and nothing to write over."""


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """What a job.json or record.json says, in the present schema. Raises ValueError where it has none that is known."""
    schema = values.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise ValueError(f"schema {schema}, this version reads {SCHEMA}")
    if schema > SCHEMA:
        raise NewerSchemaError(f"results have schema {schema}, this version reads up to {SCHEMA}; update bench")
    while schema < SCHEMA:
        values = MIGRATIONS[schema](values)
        schema += 1
    return {**values, "schema": SCHEMA}


@dataclass(frozen=True)
class Job:
    """One unit of work. `what` has every default resolved and is all that the result depends on beside `needs`.

    `kind`: train, evaluate, shard (an evaluation of a range of the images) or audit (soundness checks). The first of
    `needs` is the training and must be done; the others (images made by other evaluations) must only have ended.
    `parts`: shards the result is put together from; not in the key, since they change no outcome.
    """

    kind: str
    what: dict[str, Any]
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([KEYS, self.kind, self.what, self.needs], sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def waits(self) -> tuple[str, ...]:
        """Every job that has to end before this one begins."""
        return (*self.needs, *self.parts)

    def to_json(self) -> dict[str, Any]:
        """What job.json holds."""
        parts = {"parts": list(self.parts)} if self.parts else {}
        about = {"schema": SCHEMA, "key": self.key, "kind": self.kind, "what": self.what, "needs": list(self.needs)}
        return about | parts

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """Rebuild a job. Raises ValueError where content and key disagree or the schema is newer than this code."""
        values = upgraded(values)
        job = cls(values["kind"], values["what"], tuple(values["needs"]), tuple(values.get("parts", ())))
        if job.key != values["key"]:
            raise ValueError(f"job {values['key']} was changed: its content hashes to {job.key}")
        return job
