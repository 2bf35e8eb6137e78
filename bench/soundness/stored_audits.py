"""What audits of a results folder found, by what they audited. An audit that failed is no answer, and says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.planning.job import AuditJob
from bench.planning.job_fields import JobThreat
from bench.records.store import Store
from bench.soundness.checks import Finding

Audited = tuple[str, str, str]  # training, which of its weights, split of the images


class Audit(NamedTuple):
    """A finished audit of a model, and its findings."""

    job: AuditJob
    findings: tuple[Finding, ...]

    def covers(self, norm: str | None, eps: str | None) -> bool:
        """Was the model looked at under this budget? A row without one asks for none."""
        return norm is None or eps is None or JobThreat(norm, eps) in self.job.threats


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
            if isinstance(job, AuditJob):
                self._take(job, store.record(key))
        for name, found in self.images.items():
            # images that one audit looked at may be gone from the disk when another one asks for them
            self.images[name] = [f for f in found if f.level != "not checked"] or found

    def _take(self, job: AuditJob, record: dict[str, Any] | None) -> None:
        about = job.model_key, job.weights, job.split
        if record is None or record["state"] != "done":
            error = (record or {}).get("error") or {}
            why = f"audit {record['state']}: {error.get('message', '')}".rstrip(": ") if record else "audit missing"
            self._failed.setdefault(about, why)
            return
        found = tuple(Finding.from_json(values) for values in record["metrics"]["findings"])
        if job.part == "model":
            self._models.setdefault(about, []).append(Audit(job, found))
        else:
            for finding in found:
                self.images.setdefault(finding.attack or "", []).append(finding)

    def of(self, about: Audited, norm: str | None, eps: str | None) -> tuple[Audit | None, str]:
        """The audit of a model that says most of a budget (at it, then full before quick, then most images), or why
        there is none."""

        def worth(audit: Audit) -> tuple[bool, bool, int, str]:
            return audit.covers(norm, eps), audit.job.level == "full", audit.job.n, audit.job.key

        best = max(self._models.get(about, []), key=worth, default=None)
        return best, "" if best else self._failed.get(about, "no audit")
