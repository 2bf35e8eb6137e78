"""The findings of the audits in a results folder, by the model that they audited, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.planning.job import AuditJob
from bench.planning.job_fields import JobThreat
from bench.records.record import audit_findings
from bench.records.store import Store
from bench.soundness.checks import Finding

Audited = tuple[str, str, str]  # key of the training, which of its weights, split of the images


class StoredAudit(NamedTuple):
    """A finished audit of a model."""

    job: AuditJob
    findings: tuple[Finding, ...]

    def covers(self, norm: str | None, eps: str | None) -> bool:
        """Was the model audited at this budget? A row without a budget needs none."""
        return norm is None or JobThreat(norm, str(eps)) in self.job.threats


class StoredAudits:
    """The audits among `keys`.

    `images`: findings about the stored adversarial images of an evaluation, by its key.
    """

    def __init__(self, store: Store, keys: Iterable[str]) -> None:
        self.images: dict[str, list[Finding]] = {}
        self._models: dict[Audited, list[StoredAudit]] = {}
        self._failed: dict[Audited, str] = {}
        for key in keys:
            try:
                job = store.job(key)
            except (LookupError, ValueError):
                continue
            if isinstance(job, AuditJob):
                self._add(store, job)
        for key, found in self.images.items():
            # images that one audit measured may be gone from the disk when another one asks for them
            self.images[key] = [f for f in found if f.level != "not checked"] or found

    def _add(self, store: Store, job: AuditJob) -> None:
        about, record = (job.model_key, job.weights, job.split), store.record(job.key)
        if record is None or record.state != "done":
            message = record.error.message if record and record.error else ""
            why = f"audit {record.state}: {message}".rstrip(": ") if record else "audit missing"
            self._failed.setdefault(about, why)
            return
        found = audit_findings(record)
        if job.part == "model":
            self._models.setdefault(about, []).append(StoredAudit(job, found))
        else:
            for finding in found:
                self.images.setdefault(finding.attack or "", []).append(finding)

    def of(self, about: Audited, norm: str | None, eps: str | None) -> tuple[StoredAudit | None, str]:
        """The most informative audit of a model for a budget (at it, then by the newest checks, then full before
        quick, then most images), or why there is none."""

        def worth(audit: StoredAudit) -> tuple[bool, int, bool, int, str]:
            job = audit.job
            return audit.covers(norm, eps), job.engine, job.level == "full", job.n, job.key

        best = max(self._models.get(about, []), key=worth, default=None)
        return best, "" if best else self._failed.get(about, "no audit")
