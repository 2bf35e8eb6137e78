"""Reads a job from its JSON."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from bench.core.epsilon import Epsilon
from bench.planning.job import AuditJob, Job, ModelJob
from bench.planning.job_fields import DataChoice, JobThreat, Normalization, PluginChoice, json_names
from bench.planning.schema import first_problem, upgraded

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_NUMBERS = ("steps", "restarts", "eot", "draws", "reach", "block_size")  # settings that tables compute with
KEY = re.compile(r"[0-9a-f]{12}")
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


@functools.cache
def _types(kind: str) -> TypeAdapter[Job]:
    from pydantic import TypeAdapter

    return TypeAdapter(KINDS[kind])


def _check(job: Job) -> None:
    """Raises ValueError unless every field has its type, and the numbers and keys in it a meaning."""
    from pydantic import ValidationError

    try:
        _types(job.kind).validate_python(job)
    except ValidationError as error:
        raise first_problem(error) from None
    for key in job.waits:
        if not KEY.fullmatch(key):
            raise ValueError(f"it waits for {key!a}, which is not a job key")
    if isinstance(job, ModelJob):
        threats = [job.threat]
        if type(job.epochs) is not int or job.epochs < 0:
            raise ValueError("train.epochs is not a number of epochs")
    else:
        threats = list(job.threats) if isinstance(job, AuditJob) else [job.threat]
        first, last = (0, job.n) if isinstance(job, AuditJob) else job.range
        if not job.needs:
            raise ValueError("it names no training")
        if not 0 <= first < last <= job.n:
            raise ValueError(f"its images are {first} to {last} of {job.n}")
    chosen = job.defense if isinstance(job, ModelJob) else None if isinstance(job, AuditJob) else job.attack
    for eps in [*(threat.eps for threat in threats if threat), *(_budgets(chosen) if chosen else [])]:
        Epsilon(eps)


def _budgets(chosen: PluginChoice) -> list[Any]:
    """The budgets of a security curve. Raises ValueError where a setting that tables compute with has another type."""
    lists = {"budgets": True, "draws": chosen.name == "eot"}
    for name, value in chosen.settings.items():
        numbers = value if lists.get(name) else [value]
        odd = not isinstance(numbers, list) or (
            name in _NUMBERS and any(type(each) not in (int, float) for each in numbers)
        )
        if odd or (name == "base" and not (isinstance(value, dict) and isinstance(value.get("name"), str))):
            raise ValueError(f"{chosen.name}.{name} is {value!a:.60}")
    return list(chosen.settings.get("budgets") or [])


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
    _check(job)
    return job
