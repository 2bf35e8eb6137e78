"""`--probe`: each unknown kind measured once in a child, extrapolated to whole jobs, told, and nothing written."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_jobs import evaluate, measured, train
from harness import Bench, tiny, write_plugins

from bench.executors.devices import Slot
from bench.planning.job import Job
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.typed import Options
from bench.progress import probe
from bench.records.runtime_estimate import Estimator
from bench.records.store import Store

torch = pytest.importorskip("torch")
ROOT = Path("no-data-here")
pytestmark = pytest.mark.usefixtures("fresh_catalog")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def jobs_of(**given: Any) -> list[Job]:
    """A plan on digits."""
    defaults = {"dataset": "digits", "n": 64, "baseline": False, "checks": "off", "model": ["mlp"]}
    return plan(to_spec(Options(**{**defaults, **given}), ROOT)[0], ROOT)


def task(job: Job, trained: Job | None, store: Store, cap: float = 0.2) -> probe.Task:
    return probe.Task(job, trained, store.root, ROOT, "cpu", {}, cap)


def test_each_unknown_kind_is_one_group(store: Store) -> None:
    store.prepare()
    past, first, second = train(0), train(1, defense="trades"), train(2, 300, defense="trades")
    measured(store, past, 10.0)
    estimator = Estimator(store)
    jobs = [past, first, second, evaluate(past), evaluate(first), evaluate(second, attack="fgsm")]
    estimator.know(jobs)
    groups = [[job.key for job in group] for group in probe.kinds(jobs, estimator).values()]
    assert groups == [[first.key, second.key], [jobs[3].key, jobs[4].key], [jobs[5].key]]


def test_a_probe_teaches_the_estimator_its_kind(store: Store) -> None:
    estimator = Estimator(store)
    estimator.assume(train(1, 100), 10.0, (8.0, 16.0), 2.0, {"rss": 300.0}, 1000)
    other = train(2, 200)
    assert estimator.seconds(other) == pytest.approx(22.0)
    assert estimator.span(other) == pytest.approx((18.0, 34.0))
    assert (estimator.memory(other, "rss"), estimator.disk([other])) == (300.0, (1000, 0))
    assert estimator.seconds(train(3, defense="trades")) is None


def test_the_plan_is_told_from_a_probe_and_nothing_is_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CAP", 0.2)
    words = tiny(*write_plugins(tmp_path), "--dry-run", "--probe", "--workers", 2, attack="clean,wobble,picky")
    before = sorted(tmp_path.rglob("*"))
    outcome = bench(*words)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    shown = [line for line in lines if line.startswith("probe ")]
    assert len(shown) == 4
    assert re.search(r"train plain seed 0: 1 steps of 64 images in \d+\.\d s, [\d.]+ ms each; about \d+ s", outcome.out)
    assert re.search(r"wobble Linf 0.1 on plain seed 0: 8 of 8 images at a time in .* untrained net", outcome.out)
    assert "picky Linf 0.1 on plain seed 0: no cell: this model cannot be judged so" in outcome.out
    assert any(
        re.fullmatch(r"probed    4 of 4 kinds of jobs in .*, 2 at a time; nothing was written", x) for x in lines
    )
    assert any(re.fullmatch(r"time      about \d+ s on 2 slots( \(.* to .*\))?", line) for line in lines)
    assert any(line.startswith("memory    at most ") for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_no_record_tells_is_measured(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CAP", 0.2)
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins)).code == 0
    again = bench(*tiny(*plugins, "--dry-run", "--probe", "--seeds", 1)).out
    assert "probe     nothing: a record tells of every kind of job that is left" in again
    more = bench(*tiny(*plugins, "--dry-run", "--probe", "--seeds", 1, attack="clean,fgsm")).out
    assert [line.split(":")[0] for line in more.splitlines() if line.startswith("probe ")] == [
        "probe     fgsm Linf 0.1 on plain seed 1"
    ]


def test_what_cannot_be_measured_says_why(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CAP", 0.2)
    plugins = write_plugins(tmp_path)
    (tmp_path / "fragile.todo").write_text("kill")
    (tmp_path / "wobble.todo").write_text("raise")
    out = bench(*tiny(*plugins, "--dry-run", "--probe", defense="fragile", attack="wobble")).out
    assert "train fragile seed 0: no estimate; its process was killed, perhaps for memory" in out
    assert re.search(
        r"wobble Linf 0.1 on fragile seed 0: no estimate; RuntimeError: broken on purpose in \S+wobble", out
    )
    assert "probed    0 of 2 kinds of jobs" in out
    assert "time      unknown, 2 jobs with no past record" in out


def test_a_kind_that_takes_for_ever_is_given_up(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIMIT", 1.0)
    plugins = write_plugins(tmp_path)
    (tmp_path / "wobble.todo").write_text("sleep")
    out = bench(*tiny(*plugins, "--dry-run", "--probe", attack="wobble")).out
    assert "wobble Linf 0.1 on plain seed 0: no estimate; not one step or image was over within 1 s" in out


def test_a_run_refuses_it(bench: Bench) -> None:
    outcome = bench(*tiny("--probe", defense="standard", attack="clean"))
    assert outcome.code == 2
    assert outcome.err == "error: --probe is for a plan: use `bench plan --probe` or `bench run --dry-run --probe`\n"


def test_steps_are_timed_after_the_warm_up_and_up_to_the_cap() -> None:
    from bench.progress.probing import _timed

    def ticks(*first: float) -> Iterator[float]:
        return itertools.chain(first, itertools.repeat(1.0))

    assert list(_timed(ticks(50.0, 5.0), 1000, 60.0)) == [1.0] * 60
    assert list(_timed(ticks(0.5, 0.5, 0.1), 1000, 3.0)) == [0.1, 1.0, 1.0, 1.0]
    assert list(_timed(ticks(9.0, 8.0), 1000, 3.0)) == [8.0]  # a step beyond the cap: once for warm-up, once for time
    assert list(_timed(ticks(9.0, 2.0), 1000, 3.0)) == [2.0, 1.0, 1.0]
    assert list(_timed(ticks(9.0), 1, 3.0)) == [9.0]  # a training of one step
    assert len(list(_timed(itertools.repeat(0.001), 10**6, 3.0))) == 200
    assert len(list(_timed(itertools.repeat(0.001), 50, 3.0))) == 48


def test_a_warm_up_counts_as_long_as_it_lasts(store: Store) -> None:
    from bench.jobs.worker import load_images
    from bench.progress.probing import _steps
    from bench.training.loop import Loop
    from bench.training.train import build

    settings = ["awp.warmup=0.25", "awp.base=pgd_at"]
    job = jobs_of(defense=["awp"], set=settings, attack=["clean"], train_n=64)[0]
    data = load_images(job.what, None, ROOT, torch.device("cpu"), lambda values: None)
    loop = Loop(*build(job.what, data), job.what, data, lambda values: None)
    list(itertools.islice(_steps(loop, torch.device("cpu")), 40))
    share = loop.defense.metrics(loop.net)["awp_share"]
    assert float(share) == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ((10, 4, 40), 2.0 + 6 * (0.5 - 0.04) + 4 * (5.0 - 0.4)),  # ten passes over all four images
        ((10, 4, 20), 2.0 + 6 * (0.25 - 0.02) + 4 * (2.5 - 0.2)),  # half of the images left at a time
        ((10, 4, 4000), 2.0 * 50 / 4),  # each pass holds 100 draws an image: there will be more passes
        ((0, 0, 0), 2.0 * 50 / 4),
    ],
)
def test_a_block_costs_what_its_passes_cost(passes: tuple[int, int, int], expected: float) -> None:
    from bench.progress.probing_images import _Try

    assert _Try(4, 2.0, 0, *passes).stretched(50, lambda m, back: m * (0.1 if back else 0.01)) == pytest.approx(
        expected
    )
    assert _Try(50, 2.0, 0, *passes).stretched(50, lambda m, back: 1.0) == 2.0


def test_what_the_attack_does_beside_its_passes_grows_too() -> None:
    from bench.progress.probing_images import _growth, _Try

    def cost(m: int, back: bool) -> float:
        return m * (0.1 if back else 0.01)

    one, more = _Try(1, 1.0 + 0.46, 0, 10, 4, 10), _Try(16, 2.5 + 16 * 0.46, 0, 10, 4, 160)
    assert (one.own(cost), more.own(cost)) == pytest.approx((1.0, 2.5))
    assert _growth([one, more], cost) == pytest.approx(0.1)
    assert _growth([more], cost) == 0.0
    assert _growth([one, more._replace(seconds=5.0)], cost) == 0.0
    assert _growth([one, more._replace(rows=1000)], cost) == 0.0  # draws of few images: all of it is counted as it is


def test_a_long_first_try_is_followed_by_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.progress import probing_images as probing

    now = [0.0]
    monkeypatch.setattr(probing.time, "perf_counter", lambda: now[0])
    seen = list[int]()

    def takes(first: float) -> list[int]:
        seen.clear()

        def work(m: int) -> int:
            seen.append(m)
            now[0] += first + 0.01 * m
            return 0

        list(probing._grow(work, probing._Passes(torch.nn.Flatten()), 100, 3.0))
        return list(seen)

    assert takes(0.0) == [1, 1, 4, 16, 64, 100]
    assert takes(0.3) == [1, 1, 4, 16, 64]
    assert takes(0.6) == [1, 1]  # four images could take four times as long
    assert takes(2.0) == [1, 16]
    assert takes(20.0) == [1]


def test_images_grow_until_the_next_ones_would_exceed_the_cap() -> None:
    from bench.progress.probing_images import _grow, _Passes

    seen = list[int]()

    def work(m: int) -> int:
        seen.append(m)
        return 7 * m

    tries = list(_grow(work, _Passes(torch.nn.Flatten()), 50, 60.0))
    assert seen == [1, 1, 4, 16, 50]  # the first one warms up
    assert [(one.images, one.made) for one in tries] == [(1, 7), (4, 28), (16, 112), (50, 350)]


def test_an_untrained_net_stands_to_the_end(store: Store) -> None:
    from bench.progress.probing import measure

    training, *evaluations = jobs_of(defense=["pgd_at"], attack=["pgd", "curve", "autoattack"], train_n=64)
    for job in evaluations:
        found = measure(task(job, training, store))
        assert 0 < found.low <= found.seconds <= found.high
        assert "an untrained net, all images standing" in found.how
        assert found.peaks["rss"] > 50


def test_all_images_stand_through_every_restart(store: Store) -> None:
    from bench.progress.probing_images import _case, _Passes, _work

    settings = ["pgd.steps=4", "pgd.rel_step_size=0.5", "pgd.restarts=3"]
    for attack, more, climbs in (("pgd", [], 3), ("curve", ["curve.steps=4", "curve.rel_step_size=0.5"], 3)):
        chosen = settings if attack == "pgd" else more
        eps = ["0.1", "0.3"]
        training, *jobs = jobs_of(defense=["pgd_at"], attack=[attack], train_n=64, set=chosen, eps=eps)
        case = _case(task(jobs[-1], training, store), training, torch.device("cpu"))
        assert not case.real
        _, work = _work(jobs[-1], case)
        assert work is not None
        with _Passes(case.model.net) as passes:
            kept = work(20)
        gradients = 4 * climbs
        assert passes.back == gradients
        assert passes.rows == 20 * passes.calls
        assert kept >= 20 * 64 * 4 * (attack == "pgd")  # the adversarial images


def test_trained_weights_are_used_as_they_are(bench: Bench, tmp_path: Path) -> None:
    from bench.progress.probing import measure
    from bench.progress.probing_images import _case

    assert bench(*tiny(defense="pgd_at", attack="clean")).code == 0
    store = Store(tmp_path / "results")
    trained = next(job for job in store.jobs().values() if job.kind == "train")
    other = next(job for job in store.jobs().values() if job.kind == "evaluate")
    case = _case(task(other, trained, store), trained, torch.device("cpu"))
    assert case.real
    assert not bool((case.model.predict(case.x) == case.y).all())  # one epoch on 64 digits
    assert "on trained weights" in measure(task(other, trained, store)).how


def test_probed_seconds_are_those_of_the_jobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of three on a machine that others use too; docs/performance.md has the real errors."""
    from bench.executors.driver import drive
    from bench.executors.local import Local

    monkeypatch.setattr(probe, "CAP", 1.0)
    jobs = jobs_of(defense=["pgd_at"], attack=["pgd"], n=360, epochs=4)
    estimator = Estimator(store, "cpu")
    estimator.know(jobs)
    lines = list(probe.probe(jobs, store, ROOT, [Slot("cpu")], estimator))
    assert lines[-1].startswith("probed    2 of 2 kinds of jobs in ")
    store.prepare()
    events = [event.kind for event in drive(Local(ROOT, [Slot("cpu")]), jobs, store)]
    assert events.count("ok") == 2
    predicted = sum(estimator.seconds(job) or 0.0 for job in jobs)
    took = sum((store.record(job.key) or {})["time"]["seconds"] for job in jobs)
    assert 1 / 3 < predicted / took < 3
