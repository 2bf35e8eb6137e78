"""Jobs for tests: complete ones, of which a test gives only the fields that it is about."""

from __future__ import annotations

from typing import Any

from bench.planning.job import Job, job_of

TOY_DATA = {"name": "digits", "train": 100, "validation": 0, "size": 8}
TOY_CONTENT: dict[str, dict[str, Any]] = {
    "train": {
        "engine": 1,
        "data": TOY_DATA,
        "model": {"name": "mlp", "set": {}, "revision": 1},
        "defense": {"name": "standard", "set": {}, "revision": 1},
        "threat": None,
        "recipe": "shared",
        "train": {"epochs": 1},
        "seed": 0,
    },
    "evaluate": {
        "engine": 1,
        "attack": {"name": "pgd", "set": {}, "revision": 1},
        "threat": {"norm": "Linf", "eps": "0.1"},
        "n": 100,
        "seed": 0,
        "weights": "last",
    },
    "audit": {
        "engine": 1,
        "part": "model",
        "level": "quick",
        "threats": [{"norm": "Linf", "eps": "0.1"}],
        "n": 100,
        "seed": 0,
        "weights": "last",
    },
}
TOY_CONTENT["shard"] = {**TOY_CONTENT["evaluate"], "images": [0, 100]}


def toy_job(kind: str, content: dict[str, Any], needs: tuple[str, ...] = (), parts: tuple[str, ...] = ()) -> Job:
    """The job of this kind with the JSON fields of `content`, the others (also within plug-ins and data) as above."""
    whole: dict[str, Any] = {**TOY_CONTENT[kind], **content}
    for name, default in TOY_CONTENT[kind].items():
        if name in ("data", "model", "defense", "attack") and name in content:
            whole[name] = {**default, **content[name]}
    return job_of(kind, whole, needs, parts)
