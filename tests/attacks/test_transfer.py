"""Transfer: what breaks the row joins its worst case, whichever row it was made against; no row waits for a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Bench
from torch import Tensor, nn

from attacks.transfer import Transfer
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.executors.base import todo
from bench.planning.job import Job
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.record import Record
from bench.records.store import IMAGES, Store

ROOT = Path("no-data-here")
THREAT = Threat("Linf", Epsilon("0.1"))


class _Bright(nn.Module):
    """Class 1 where the first pixel is above one half."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        return torch.stack([torch.full_like(first, 0.5), first], dim=1)


def test_the_first_image_that_breaks_is_kept_and_named() -> None:
    model, x = Classifier(_Bright()), torch.full((3, 1, 2, 2), 0.45)
    x[2] = 0.1
    y = torch.tensor([0, 0, 0])
    weak, strong = x + 0.01, x + 0.1
    others = (("weak", weak), ("strong", strong), ("strong again", strong))
    outcome = Transfer(THREAT).evaluate(model, x, y, Context(0, others=others))
    assert outcome.columns["correct"].tolist() == [False, False, True]
    assert outcome.columns["source"].tolist() == [1, 1, -1]
    assert outcome.x_adv is not None
    assert torch.equal(outcome.x_adv[:2], strong[:2])
    assert torch.equal(outcome.x_adv[2], x[2])  # what breaks nothing is not kept
    assert outcome.columns["forwards"].tolist() == [3, 3, 3]
    assert not outcome.columns["backwards"].any()


def test_an_image_from_outside_the_ball_is_an_error_and_no_success() -> None:
    model, x = Classifier(_Bright()), torch.full((1, 1, 2, 2), 0.3)
    with pytest.raises(ValueError, match="leave the Linf ball"):
        Transfer(THREAT).evaluate(model, x, torch.tensor([0]), Context(0, others=(("far", x + 0.5),)))


def test_images_stay_with_their_labels_where_some_clean_ones_are_wrong() -> None:
    model = Classifier(_Bright())
    x = torch.tensor([0.9, 0.45, 0.2]).view(3, 1, 1, 1)
    y = torch.tensor([0, 0, 0])  # the first is wrong without an attack
    others = (("one", x + torch.tensor([0.0, 0.1, 0.0]).view(3, 1, 1, 1)),)
    columns = Transfer(THREAT).evaluate(model, x, y, Context(0, others=others)).columns
    assert columns["correct"].tolist() == [False, False, True]


SPEC = {
    "data": {"name": "digits", "test": 40, "train": 200},
    "models": ["mlp"],
    "threat": {"eps": [0.1, 0.2]},
    "train": {"epochs": 1},
    "defenses": ["standard", {"name": "pgd_at", "set": {"steps": 2, "rel_step_size": 0.5}}, "smoothing"],
    "attacks": [
        {"name": "pgd", "n": 30, "grid": {"loss": ["ce", "cw"]}, "set": {"steps": 2, "rel_step_size": 0.5}},
        "transfer",
    ],
    "checks": "off",
}


def of(jobs: list[Job], name: str) -> list[Job]:
    return [job for job in jobs if job.kind == "evaluate" and job.attack.name == name]


@pytest.mark.usefixtures("fresh_catalog")
def test_every_row_is_shown_what_was_made_against_every_other_at_its_budget() -> None:
    jobs = plan(build(SPEC), ROOT)
    known = {job.key: job for job in jobs}
    transfers = of(jobs, "transfer")
    assert len(transfers) == 3 * 2
    for job in transfers:
        sources = [known[key] for key in job.needs[1:]]
        assert len(sources) == 2 * 2  # two other rows, two losses
        assert all(s.threat == job.threat and s.needs[0] != job.needs[0] for s in sources)
        assert job.n == 30  # no more images than there are of each
        assert all(jobs.index(need) < jobs.index(job) for need in sources)


@pytest.mark.usefixtures("fresh_catalog")
def test_the_undefended_twin_and_an_unlisted_source_are_added() -> None:
    spec = {**SPEC, "defenses": ["smoothing"], "attacks": ["clean", "transfer"]}
    jobs = plan(build(spec), ROOT)
    trained = {job.key: job.defense.name for job in jobs if job.kind == "train"}
    assert sorted(trained.values()) == ["smoothing", "standard"]
    assert [trained[job.needs[0]] for job in of(jobs, "transfer")] == ["smoothing", "smoothing"]
    assert sorted(trained[job.needs[0]] for job in of(jobs, "pgd")) == [
        "smoothing",
        "smoothing",
        "standard",
        "standard",
    ]
    assert [trained[job.needs[0]] for job in of(jobs, "clean")] == ["smoothing"]  # the twin is no row of its own


@pytest.mark.usefixtures("fresh_catalog")
@pytest.mark.parametrize("source", ["clean", "certify", "transfer", "flatness", "surface", "corruption"])
def test_a_source_without_images_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"transfer.source is {source}, which makes no adversarial images"):
        plan(build({**SPEC, "attacks": [{"name": "transfer", "set": {"source": source}}]}), ROOT)


@pytest.mark.usefixtures("fresh_catalog")
def test_a_row_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="but the only row is standard; add a defense"):
        plan(build({**SPEC, "defenses": ["standard"], "attacks": ["transfer"]}), ROOT)


def test_a_row_without_images_blanks_no_other_and_lost_images_are_made_again(bench: Bench, tmp_path: Path) -> None:
    import yaml

    Path("s.yaml").write_text(yaml.safe_dump({**SPEC, "threat": {"eps": 0.2}}))
    words = ["run", "s.yaml", "--executor", "debug"]
    assert bench(*words).code == 0
    store = Store(Path("results"))
    jobs = plan(build({**SPEC, "threat": {"eps": 0.2}}), ROOT)
    assert todo(jobs, store) == []
    target = of(jobs, "transfer")[0]
    honest = store.samples(target.key)["correct"]
    first, *rest = target.needs[1:]
    # images absent, as after a clone: only a pending transfer asks for them
    (store.folder(first) / IMAGES).unlink()
    assert todo(jobs, store) == []
    (store.folder(target.key) / "record.json").unlink()
    assert {job.key for job in todo(jobs, store)} == {first, target.key}
    assert bench(*words).code == 0
    assert (store.samples(target.key)["correct"] == honest).all()
    assert store.record(target.key).metrics.sources == (first, *rest)
    # one of the sources crashed: the row is judged by the others, and its record says so
    (store.folder(target.key) / "record.json").unlink()
    store.put(store.job(first), Record("unsupported", reason="not in the mood"))
    assert bench(*words).code == 0
    metrics = store.record(target.key).metrics
    assert (metrics.sources, metrics.sources_without_images) == (tuple(rest), (first,))
