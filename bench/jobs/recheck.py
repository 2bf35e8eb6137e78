"""Stored adversarial images, scored again by another process than the one that made them (C16 and `bench verify`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import plugins
from bench.core.classifier import Classifier, frozen
from bench.data.images import Data, test_block
from bench.jobs import user_model
from bench.jobs.model_files import evaluation_images, load_model, stored_images
from bench.planning.job import AuditJob, EvaluationJob, ImportJob
from bench.records.evaluated_weights import REPEATED, outdated
from bench.records.record import evaluation_metrics
from bench.records.store import IMAGES, Store
from bench.soundness.checks import Finding
from bench.terminal import counted
from bench.training.train import build

MIN_IMAGES = {"quick": 256, "full": 10**9}  # images that an audit scores again, rounded up to whole blocks


def check_images(
    store: Store, job: AuditJob, model: Classifier, data: Data, report: Callable[[int, int, str], None]
) -> list[Finding]:
    """One finding for each evaluation of an audit, about its first images, in whole blocks, at least `MIN_IMAGES`.

    Raises ValueError for an evaluation of other weights, since its outcomes may differ.
    """
    keys = job.needs[1:]
    other = [key for key in keys if outdated(store, store.job(key))]
    if other:
        raise ValueError(f"other weights were used by {', '.join(other)}; {REPEATED}")
    found = []
    for k, key in enumerate(keys):
        report(k, len(keys), key)
        found.append(score_again(store, store.evaluation(key), MIN_IMAGES[job.level], model, data))
    return found


def score_again(store: Store, job: EvaluationJob, n: int, model: Classifier, data: Data) -> Finding:
    """Check the first `n` stored images of an evaluation, in whole blocks. The value counts what is wrong.

    A perturbation must lie in ball and box, measured in float64; the outcome of each image must be as stored, unless
    the model is stochastic. Raises ValueError for an evaluation without a threat.
    """
    if job.threat is None:
        raise ValueError(f"evaluation {job.key} has no threat, so no adversarial images to check")
    threat, record = plugins.threat_of(job.threat), store.record(job.key)
    finding = functools.partial(Finding, "C16", eps=str(threat.eps), attack=job.key)
    if record is None or record.state != "done":
        return finding("n/a", note=f"the evaluation ended as {record.state if record else 'nothing'}")
    if IMAGES not in record.files:
        return finding("n/a", note="it makes no adversarial images")
    if not store.matches(job.key, IMAGES, record):
        return finding("not checked", note="its adversarial images are absent or damaged")
    x_adv, samples = stored_images(store, job.key).to(data.test.x.device), store.samples(job.key)
    attack = plugins.make("attacks", job.attack, job.threat)
    block = getattr(attack, "block_size", attack.block)
    last = min(len(x_adv), -(-n // block) * block)  # whole blocks, so that each batch is the one of the evaluation
    wrong, notes = 0, list[str]()
    for start in range(0, last, block):
        stop = min(start + block, last)
        x, y = test_block(data, start, stop)
        if samples["label"][start:stop].tolist() != y.tolist():
            wrong += 1
            notes.append("labels differ from the data")
        try:
            threat.check(x, x_adv[start:stop])
        except ValueError as problem:
            wrong += 1
            notes.append(str(problem))
        if not model.stochastic:
            stored = torch.from_numpy(samples["correct"][start:stop]).to(y.device)
            wrong += int((_correct(model, x, x_adv[start:stop], y) != stored).sum())
    count = counted(wrong, "differing verdict") if wrong else counted(last, "image")
    note = "; ".join(dict.fromkeys(notes)) or count
    return finding("X" if wrong else "ok", float(wrong), 0.0, note)


def _correct(model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """Which images (bool) are correct clean and under attack, as `Attack.evaluate` scores them."""
    with frozen(model), torch.no_grad():
        return (model.predict(x) == y) & (model.predict(x_adv) == y)


def verify_images(store: Store, key: str, root: Path) -> tuple[bool, str]:
    """Score all stored images of an evaluation again, on the CPU. Returns whether anything differs, and a note.

    If data or code are not available here, nothing differs and the note gives the reason.
    """
    job = store.evaluation(key)
    trained = store.model_job(job.model_key)
    try:
        data = evaluation_images(job, trained, root, torch.device("cpu"), lambda values: None)
        if data.test_hash != evaluation_metrics(store.record(key)).test_hash:
            raise ValueError("the data folder holds other test images")
        # a plug-in that does not load is not a change of the stored files, which are not yet read
        plugins.make("attacks", job.attack, job.threat)
        if isinstance(trained, ImportJob):
            user_model.build(trained, data.facts)
        else:
            build(trained, data, trained=True)
    except (ValueError, LookupError, ImportError, OSError) as error:
        return False, f"not scored again: {error}"
    try:
        found = score_again(store, job, job.n, load_model(store, trained, data, job.weights), data)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        return True, f"cannot be scored again: {error}"
    return found.level not in ("ok", "n/a"), found.note
