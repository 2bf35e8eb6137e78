"""One unit of work and its key: equal content gives equal keys, so specs share work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1


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
        text = json.dumps([SCHEMA, self.kind, self.what, self.needs], sort_keys=True, separators=(",", ":"))
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
        if values.get("schema") != SCHEMA:
            raise ValueError(f"job has schema {values.get('schema')}, this version reads {SCHEMA}")
        job = cls(values["kind"], values["what"], tuple(values["needs"]), tuple(values.get("parts", ())))
        if job.key != values["key"]:
            raise ValueError(f"job {values['key']} was changed: its content hashes to {job.key}")
        return job
