"""What audits of a results folder found, by what they audited. An audit that failed is no answer, and says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.planning.job import Job
from bench.records.store import Store
from bench.soundness.checks import Finding

Audited = tuple[str, str, str]  # training, which of its weights, split of the images


class Audit(NamedTuple):
    """A finished audit of a model: its key, what was asked for, and its findings."""

    key: str
    what: dict[str, Any]
    findings: tuple[Finding, ...]

    def covers(self, norm: str | None, eps: str | None) -> bool:
        """Was the model looked at under this budget? A row without one asks for none."""
        return norm is None or {"norm": norm, "eps": eps} in self.what["threats"]


class Audits:
    """The audits among `keys`.

    `images`: findings about the stored adversarial images of an evaluation, by its key.
    """

    def __init__(self, store: Store, keys: Iterable[str]) -> None:
        self.images: dict[str, list[Finding]] = {}
        self._models: dict[Audited, list[Audit]] = {}
        self._failed: dict[Audited, str] = {}
        for key in keys:
            try:
                job = store.job(key)
            except (LookupError, ValueError):
                continue
            if job.kind == "audit":
                self._take(job, store.record(key))
        for name, found in self.images.items():
            # images that one audit looked at may be gone from the disk when another one asks for them
            self.images[name] = [f for f in found if f.level != "not checked"] or found

    def _take(self, job: Job, record: dict[str, Any] | None) -> None:
        about = job.needs[0], job.what["weights"], job.what.get("split", "test")
        if record is None or record["state"] != "done":
            error = (record or {}).get("error") or {}
            why = f"audit {record['state']}: {error.get('message', '')}".rstrip(": ") if record else "audit missing"
            self._failed.setdefault(about, why)
            return
        found = tuple(Finding.from_json(values) for values in record["metrics"]["findings"])
        if job.what["part"] == "model":
            self._models.setdefault(about, []).append(Audit(job.key, job.what, found))
        else:
            for finding in found:
                self.images.setdefault(finding.attack or "", []).append(finding)

    def of(self, about: Audited, norm: str | None, eps: str | None) -> tuple[Audit | None, str]:
        """The audit of a model that says most of a budget (at it, then full before quick, then most images), or why
        there is none."""

        def worth(audit: Audit) -> tuple[bool, bool, int, str]:
            return audit.covers(norm, eps), audit.what["level"] == "full", audit.what["n"], audit.key

        best = max(self._models.get(about, []), key=worth, default=None)
        return best, "" if best else self._failed.get(about, "no audit")
