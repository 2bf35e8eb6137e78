"""Reads a job from its JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from bench.planning.job import Job
from bench.planning.job_fields import DataChoice, JobThreat, Normalization, PluginChoice, json_names
from bench.planning.schema import upgraded

KINDS: dict[str, type[Job]] = {kind.kind: kind for kind in get_args(Job)}
_READ: dict[str, Callable[[Any], Any]] = {
    **{"data": DataChoice.from_json, "threat": JobThreat.from_json, "normalization": Normalization.from_json},
    **dict.fromkeys(("model", "defense", "attack"), PluginChoice.from_json),
    "checkpoint": lambda values: values["sha256"],
    "threats": lambda values: tuple(JobThreat.from_json(each) for each in values),
    "images": tuple,
}


def job_of(kind: str, content: dict[str, Any], needs: tuple[str, ...] = (), parts: tuple[str, ...] = ()) -> Job:
    """The job of a kind with this content. Raises ValueError for an unknown kind or a missing field."""
    if kind not in KINDS:
        raise ValueError(f"kind is '{kind}'; expected one of {', '.join(KINDS)}")
    names = json_names(KINDS[kind])
    try:
        given = {names[name]: value for name, value in content.items() if name in names}
        own = {n: _READ[n](v) if n in _READ and v is not None else v for n, v in given.items()}
        return KINDS[kind](**own, needs=needs, parts=parts)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a job of kind {kind} with missing or malformed fields: {error}") from None


def from_json(values: dict[str, Any]) -> Job:
    """The job of a job.json. Raises ValueError where content and key disagree, or for an unknown schema."""
    values = upgraded(values)
    try:
        job = job_of(values["kind"], values["what"], tuple(values["needs"]), tuple(values.get("parts", ())))
    except ValueError as error:
        raise ValueError(f"job {values['key']} was changed: {error}") from None
    if job.key != values["key"]:
        raise ValueError(f"job {values['key']} was changed: its content hashes to {job.key}")
    if job.content() != values["what"]:  # a field that no job of this kind has does not reach the hash
        raise ValueError(f"job {values['key']} was changed: it holds fields that no {job.kind} job has")
    return job
