"""C16: stored adversarial images judged once more, in another process than the one that made them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from bench import plugins
from bench.atomic import file_hash
from bench.core.classifier import Classifier, frozen
from bench.data.images import Data, test_block
from bench.planning.job import AuditJob
from bench.records.evaluated_weights import AGAIN, outdated
from bench.records.store import IMAGES, Store
from bench.soundness.checks import Finding

LEAST = {"quick": 256, "full": 10**9}  # images re-checked, rounded up to whole blocks
Tell = Callable[[int, int, str], None]


def images(store: Store, job: AuditJob, model: Classifier, data: Data, tell: Tell) -> list[Finding]:
    """One finding for each evaluation the audit names: its first images, whole blocks of them, up to `LEAST`.

    A perturbation is measured in float64 against ball and box; for a deterministic model the verdict of every image
    has to come out as it is stored. Value: images for which something is wrong. Raises ValueError for an evaluation of
    other weights, whose verdicts need not come out so.
    """
    others = [key for key in job.needs[1:] if outdated(store, store.job(key))]
    if others:
        raise ValueError(f"other weights were judged by {', '.join(others)}; {AGAIN}")
    found = []
    for place, key in enumerate(job.needs[1:]):
        tell(place, len(job.needs) - 1, key)
        found.append(again(store, key, LEAST[job.level], model, data))
    return found


def again(store: Store, key: str, n: int, model: Classifier, data: Data) -> Finding:
    """The first `n` stored images of one evaluation, whole blocks of them."""
    made, record = store.evaluation(key), store.record(key)
    if made.threat is None:
        raise ValueError(f"evaluation {key} has no threat, so no adversarial images to check")
    threat = plugins.threat_of(made.threat)
    finding = functools.partial(Finding, "C16", eps=str(threat.eps), attack=key)
    if record is None or record.state != "done":
        return finding("n/a", note=f"the evaluation ended as {record.state if record else 'nothing'}")
    expected = record.files.get(IMAGES)
    if expected is None:
        return finding("n/a", note="it makes no adversarial images")
    path = store.folder(key) / IMAGES
    if file_hash(path) != expected:
        return finding("not checked", note="its adversarial images are absent or damaged")
    x_adv, samples = load_file(path)["x_adv"].to(data.test.x.device), store.samples(key)
    judge = plugins.make("attacks", made.attack, made.threat)
    block = getattr(judge, "block_size", judge.block)
    last = min(len(x_adv), -(-n // block) * block)  # whole blocks, so that a batch holds what it held then
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
            wrong += int((_verdicts(model, x, x_adv[start:stop], y) != stored).sum())
    note = "; ".join(dict.fromkeys(notes)) or (f"{wrong} verdicts differ" if wrong else f"{last} images")
    return finding("X" if wrong else "ok", float(wrong), 0.0, note)


def _verdicts(model: Classifier, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Right on the clean image and on the adversarial one, as the attack's own scoring has it."""
    with frozen(model), torch.no_grad():
        return (model.predict(x) == y) & (model.predict(x_adv) == y)
