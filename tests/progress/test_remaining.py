"""Time left: after a resume, while jobs run, for stopped jobs, and from which records."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import toy_job
from fake_jobs import evaluate, measured, train
from harness import Bench, tiny, write_plugins

from bench.atomic import write_json
from bench.executors.base import Event
from bench.executors.devices import Slot
from bench.executors.local import Local
from bench.executors.sbatch import Request
from bench.executors.slurm import Slurm
from bench.planning.evaluations import shard_of
from bench.planning.job import Job, TrainJob
from bench.progress import live
from bench.progress.forecast import hours
from bench.progress.forecast import time as forecast
from bench.progress.live import View
from bench.progress.remaining import TimeLeft, left, together
from bench.progress.saved import kept, saved_seconds
from bench.progress.status import lines as status_lines
from bench.progress.status import survey
from bench.records.leases import claim
from bench.records.record import EvaluationMetrics, Provenance, Record, Time, TrainMetrics
from bench.records.runtime_estimate import WIDER, Estimator
from bench.records.store import Store

OLD, NEW = train(0), train(1)
OF_OLD, OF_NEW = evaluate(OLD), evaluate(NEW)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Holds one training of 100 s."""
    found = Store(tmp_path / "results")
    found.prepare()
    measured(found, OLD, 100.0)
    found.add(NEW)
    return found


def says(store: Store, job: Job, **values: float) -> None:
    """The progress that a worker with the lease of a job reported a moment ago."""
    claim(store, job.key)
    write_json(store.folder(job.key) / "progress.json", {"now": time.time(), **values})


def record(store: Store, job: Job, device: str = "CPU x", wall: float | None = None, **metrics: float) -> None:
    store.add(job)
    kind = TrainMetrics if isinstance(job, TrainJob) else EvaluationMetrics
    store.put(job, Record("done", kind(**metrics), provenance=Provenance(device=device), time=Time(seconds=wall)))


def test_the_speed_of_this_attempt_leaves_out_earlier_attempts(store: Store) -> None:
    says(store, NEW, share=0.6, began=time.time() - 2, earlier=118.0)
    found = left(store, NEW, Estimator(store))
    assert found.running
    assert found.seconds == pytest.approx(120 * 0.4 / 0.6, abs=1)  # without `earlier` it would be 1.3 s
    says(store, NEW, share=0.02, began=time.time() - 1, earlier=0.0)
    assert left(store, NEW, Estimator(store)).seconds == pytest.approx(99, abs=1)  # too early: as others did


def test_a_job_longer_than_its_estimate_is_never_about_to_end(store: Store) -> None:
    estimator = Estimator(store)
    says(store, NEW, share=0.02, began=time.time() - 500)  # 100 s were expected
    assert left(store, NEW, estimator).seconds == pytest.approx(500 * 49, rel=0.01)
    says(store, NEW, share=0.0, began=time.time() - 500)  # nothing reported: as long again
    assert left(store, NEW, estimator).seconds == pytest.approx(500, abs=1)
    store.add(OF_OLD)
    now = time.time()  # half of its stages took 8 s, and it has not reported for half an hour
    says(store, OF_OLD, share=0.5, began=now - 1808, now=now - 1800)
    assert left(store, OF_OLD, estimator).seconds == pytest.approx(1808, abs=1)
    says(store, OF_OLD, share=0.0, began=now - 9)  # neither an estimate nor a report
    assert together(store, [OF_OLD], estimator, 2) == TimeLeft(0.0, 0.0, 0.0, 0, 0, 1)
    assert together(store, [OF_OLD], estimator, 2).describe() == "1 job of unknown length"


def test_the_share_of_an_attack_is_trusted_only_without_a_record(store: Store) -> None:
    estimator = Estimator(store)
    store.add(OF_OLD)
    says(store, OF_OLD, share=0.5, began=time.time() - 10)  # two of four stages, which take a fifth of the time
    assert left(store, OF_OLD, estimator).seconds == pytest.approx(10, abs=1)
    measured(store, evaluate(OLD, n=200), 80.0)
    assert left(store, OF_OLD, Estimator(store)).seconds == pytest.approx(30, abs=1)


def test_time_since_the_last_report_is_subtracted(store: Store) -> None:
    now = time.time()
    says(store, NEW, share=0.5, began=now - 50, now=now - 20)
    assert left(store, NEW, Estimator(store)).seconds == pytest.approx(30 - 20, abs=1)


def test_one_long_job_is_not_shared_among_slots(store: Store) -> None:
    assert together(store, [NEW], Estimator(store), 4) == TimeLeft(100.0, 80.0, 125.0, 1, 0, 0)
    assert together(store, [NEW, train(2)], Estimator(store), 1) == TimeLeft(200.0, 160.0, 250.0, 1, 0, 0)
    measured(store, OF_OLD, 40.0)
    estimator = Estimator(store)
    estimator.know([NEW, OF_NEW])
    assert together(store, [NEW, OF_NEW], estimator, 4).seconds == 140.0  # it waits for its training


def test_the_view_knows_the_evaluations_of_a_running_training(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    measured(store, OF_OLD, 40.0)
    says(store, NEW, share=0.5, began=time.time() - 50)
    view = View(Console(), store, [OF_NEW, NEW], "quiet", 2)
    assert view._left() == "about 1 min 30 s (1 min 12 s to 1 min 52 s), estimated from 2 past records"


def test_the_view_uses_records_of_its_device(store: Store) -> None:
    from rich.console import Console

    record(store, train(5, defense="trades"), device="GPU y", train_seconds=1.0)
    record(store, train(6, defense="trades"), device="CPU x", train_seconds=600.0)
    asked = train(7, defense="trades")
    told = [View(Console(), store, [asked], "quiet", 1, device)._left() for device in ("cpu", "cuda")]
    assert told == [
        "about 10 min 00 s (8 min 00 s to 12 min 30 s), estimated from 1 past record",
        "about 1 s, estimated from 1 past record",
    ]


def test_status_uses_records_of_the_device_of_the_running_jobs(store: Store) -> None:
    record(store, train(5, defense="trades"), device="GPU y", train_seconds=1.0)
    record(store, train(6, defense="trades"), device="CPU x", train_seconds=600.0)
    like = train(5, defense="trades")
    running, waiting = (replace(like, threat=None, seed=seed) for seed in (7, 8))
    for job in (running, waiting):
        store.add(job)
    seconds = []
    for device in ("cpu", "cuda"):
        write_json(store.folder(running.key) / "progress.json", {"now": time.time(), "share": 0.0, "device": device})
        claim(store, running.key)
        found = survey(store, {job.key: job for job in (running, waiting)}, store.jobs(), Path("no-data"))
        seconds.append(found["seconds_left"])
    assert seconds == [pytest.approx(1200, abs=1), pytest.approx(2, abs=1)]


def test_a_run_uses_records_of_its_device(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins, attack="clean")).code == 0
    results = Store(Path("results"))
    trained, judged = sorted(results.jobs().values(), key=lambda job: job.kind, reverse=True)
    on_gpu = replace(trained, seed=7)
    record(results, on_gpu, device="GPU y", train_seconds=1e7)
    record(results, replace(judged, needs=(on_gpu.key,)), device="GPU y", attack_seconds=1e7)
    monkeypatch.setattr(live, "LINE_EVERY", (0.0, 0.0))  # plain lines at every tick
    monkeypatch.setattr("bench.executors.driver.TICK", 0.01)  # of which the shortest job has several
    shown = bench(*tiny(*plugins, "--seeds", "1", attack="clean")).out
    lines = [line for line in shown.splitlines() if "] time left about " in line]
    assert lines
    assert not [line for line in lines if " h " in line]


def test_the_time_in_checkpoints_is_subtracted(store: Store) -> None:
    torch = pytest.importorskip("torch")
    from bench.jobs.block_cache import BlockCache as KeptBlocks
    from bench.training.resume import PLACE
    from bench.training.resume import Checkpointer as KeptTraining

    KeptTraining(store.folder(NEW.key) / PLACE, lambda: "this").write({"loop": {}, "now": 62.5, "lines": []})
    assert saved_seconds(store, NEW) == 62.5
    assert left(store, NEW, Estimator(store)) == (37.5, 62.5, False)
    store.add(OF_OLD)
    blocks = KeptBlocks(store.folder(OF_OLD.key) / "blocks", "this")
    for number, seconds in enumerate((1.5, 2.25)):
        blocks.write(f"block-{number:06d}", {"correct": torch.zeros(3)}, seconds)
    assert saved_seconds(store, OF_OLD) == 3.75
    (store.folder(OF_OLD.key) / "blocks" / "block-000000.safetensors").write_bytes(b"\xff" * 40)
    assert saved_seconds(store, OF_OLD) == 2.25
    assert kept(store, NEW) == "nothing kept"
    blocks.write("block-000001", {"label": torch.zeros(40), "correct": torch.zeros(40)}, 1.0)
    assert kept(store, OF_OLD) == "40 of 100 images kept"
    blocks.write("block-000040-state", {"x_adv": torch.zeros(3)}, 1.0)
    assert kept(store, OF_OLD) == "40 of 100 images kept, and the attack on the next ones so far"
    lines = forecast([NEW], store, Estimator(store), 2)[0]
    assert lines == [
        "time      about 38 s (30 s to 47 s) on 2 slots, estimated from 1 past record",
        "saved     1 min 02 s (not counted above) in the checkpoints of 1 job",
    ]


def test_the_plan_shows_the_running_jobs(store: Store) -> None:
    says(store, NEW, share=0.5, began=time.time() - 50)
    lines = forecast([NEW, evaluate(NEW, attack="unheard")], store, Estimator(store), 2)[0]
    assert lines == [
        "time      about 50 s (40 s to 1 min 02 s) on 2 slots, estimated from 1 past record; plus 1 job with "
        "neither a past record nor a declared cost",
        "running   1 of these jobs now",
    ]


def test_a_stopped_job_is_not_running_and_its_checkpoints_count(store: Store) -> None:
    torch = pytest.importorskip("torch")
    from bench.jobs.block_cache import BlockCache

    lease = claim(store, NEW.key)
    assert lease is not None
    BlockCache(store.folder(NEW.key) / "blocks", "this").write("block-000000", {"correct": torch.zeros(3)}, 62.5)
    says(store, NEW, share=0.6, began=time.time() - 60)
    assert left(store, NEW, Estimator(store)).running
    lease.release()  # as a stop does; what the worker said a moment ago stays
    assert left(store, NEW, Estimator(store)) == (37.5, 62.5, False)
    spared = "saved     1 min 02 s (not counted above) in the checkpoints of 1 job"
    assert forecast([NEW], store, Estimator(store), 1)[0] == [
        "time      about 38 s (30 s to 47 s) on 1 slot, estimated from 1 past record",
        spared,
    ]


def test_seconds_besides_the_work_count_once_and_long_jobs_weigh_more(store: Store) -> None:
    record(store, train(5, 1000), wall=530.0, train_seconds=500.0, check_seconds=10.0, checkpoint_seconds=10.0)
    record(store, train(6, 100), wall=20.0, train_seconds=60.0, resumed=1)  # ended by another process
    rate = (100 + 520 + 60) / (100 + 1000 + 100)
    assert Estimator(store).seconds(train(7, 300)) == pytest.approx(300 * rate + 10)


def test_assembled_shards_are_not_counted_twice(store: Store) -> None:
    shard = shard_of(OF_OLD, 0, 50)
    whole = replace(OF_OLD, parts=(shard.key,))
    record(store, shard, attack_seconds=20.0)
    record(store, whole, wall=0.5, attack_seconds=20.0)
    estimator = Estimator(store)
    assert estimator.seconds(whole) == 0.0
    assert estimator.seconds(evaluate(OLD, n=100)) == pytest.approx(40.0)
    assert estimator.estimate(whole) == (0.0, 0.0, 0.0, (), 0)


def test_records_of_a_gpu_are_not_used_for_the_cpu(store: Store) -> None:
    record(store, train(5, defense="trades"), device="GPU y", train_seconds=1.0)
    record(store, train(6, defense="rat"), device="CPU x", train_seconds=50.0)
    gpu, cpu = train(8, defense="trades"), train(8, defense="rat")
    seen = [(Estimator(store, d).seconds(gpu), Estimator(store, d).seconds(cpu)) for d in (None, "cpu", "cuda")]
    assert seen == [(1.0, 50.0), (None, 50.0), (1.0, None)]


def test_disk_grows_with_the_images_of_an_evaluation(store: Store) -> None:
    def leaves(job: Job, size: int) -> None:
        store.add(job)
        (store.folder(job.key) / "samples.npz").write_bytes(bytes(size))
        store.put(job, Record("done", files={"samples.npz": "hash"}))

    trained, asked = train(5, 1000), evaluate(OLD, n=10_000)
    leaves(trained, 50_000)
    leaves(evaluate(OLD, n=1000), 1_200_000)
    leaves(evaluate(OLD, n=10), 40_000)  # headers, which so few images say the most of
    shards = [shard_of(asked, first, first + 1000) for first in range(0, 10_000, 1000)]
    estimator = Estimator(store)
    assert estimator.disk([asked]) == (12_000_000, 0)
    assert estimator.disk(shards) == (12_000_000, 0)
    assert estimator.disk([train(6, 4000), evaluate(OLD, n=500), train(7, defense="trades")]) == (650_000, 1)


def test_the_range_is_that_of_the_records(store: Store) -> None:
    record(store, train(5, 100), train_seconds=140.0)
    record(store, train(6, 1), train_seconds=10.0)  # all warm-up
    estimator = Estimator(store)
    found = estimator.estimate(train(7, 50))
    assert found is not None
    assert (found.low, found.high, found.records) == pytest.approx((50.0 / WIDER, 70.0 * WIDER, 3))
    expected = "about 1 min 02 s (40 s to 1 min 28 s) on 1 slot, estimated from 3 past records"
    assert forecast([train(7, 50)], store, estimator, 1)[0] == [f"time      {expected}"]


def test_progress_holds_the_seconds_of_earlier_attempts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from bench.jobs.progress_file import ProgressFile

    progress = ProgressFile(tmp_path / "progress.json", "cuda")
    told_at = []
    for values in ({"share": 0.0}, {"share": 0.5, "earlier": 30.0}, {"share": 0.6}):
        progress.last = -1.0  # as if half a second went by
        progress(values)
        told_at.append(_read(tmp_path))
    assert [one["earlier"] for one in told_at] == [0.0, 30.0, 30.0]
    assert {one["device"] for one in told_at} == {"cuda"}
    progress({"share": 0.7, "earlier": 31.0})  # too soon to be written, not to be remembered
    assert (_read(tmp_path)["share"], progress.earlier) == (0.6, 31.0)


def test_each_pass_of_an_attack_is_reported_between_its_own_reports(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bench.jobs.progress_file import ProgressFile

    net = torch.nn.Identity()
    progress = ProgressFile(tmp_path / "progress.json", "cpu")
    progress.count(net)
    progress({"share": 0.25, "note": "apgd-t"})
    net(torch.zeros(30, 2))
    progress.last = -1.0  # as if half a second went by
    net(torch.zeros(40, 2))
    found = _read(tmp_path)
    assert (found["share"], found["note"], found["passes"]) == (0.25, "apgd-t", 70)


def test_plain_lines_come_soon_and_then_less_often(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    says(store, NEW, share=0.41, began=time.time() - 41, epoch=9, epochs=20, step=40, steps=390)
    view = View(Console(), store, [NEW], "plain", 1)
    pauses = []
    view._handle(Event("started", NEW))
    for _ in range(6):
        pauses.append(view.pause)
        view._handle(Event("tick"))  # too soon for another line
        view.last_line -= view.pause
        view._handle(Event("tick"))
    assert pauses == [2, 4, 8, 16, 30, 30]
    start, *lines = capsys.readouterr().out.splitlines()
    assert start.startswith("start  #1 training standard seed 1 (")
    assert lines[:2] * 6 == lines
    assert lines[0] == "   41% training standard seed 1: epoch 9 of 20, step 40 of 390"
    assert lines[1].startswith("[0/1] time left about 59 s")


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return found


def test_a_resumed_evaluation_reports_earlier_seconds(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bench.core.classifier import Classifier
    from bench.data.images import load
    from bench.jobs.block_cache import BlockCache
    from bench.jobs.evaluate import evaluate as run

    data = load("digits", root=tmp_path, device=torch.device("cpu"), test=60)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    settings = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-dlr"], "batch_size": 20, "block_size": 20}
    attack = {"name": "autoattack", "set": settings}
    what = toy_job("evaluate", {"attack": attack, "threat": {"norm": "Linf", "eps": "0.0001"}, "n": 60}, ("0" * 12,))

    class Killed(Exception):
        """Stands for a kill within the last block."""

    class Stopping(BlockCache):
        def write(self, name: str, tensors: Any, seconds: float) -> None:
            super().write(name, tensors, seconds)
            if name == "block-000040-state":
                raise Killed

    first = list[dict[str, Any]]()
    with pytest.raises(Killed):
        run(what, Classifier(net).eval(), data, first.append, Stopping(tmp_path / "blocks", "this"))
    assert {values["earlier"] for values in first} == {0.0}
    kept = BlockCache(tmp_path / "blocks", "this")
    for name, seconds in (("block-000000", 100.0), ("block-000020", 40.0), ("block-000040-state", 7.0)):
        kept.write(name, kept.read(name, torch.device("cpu"))[0], seconds)
    again = list[dict[str, Any]]()
    run(what, Classifier(net).eval(), data, again.append, kept)
    by_share = {round(values["share"], 2): round(values["earlier"]) for values in again}
    assert by_share == {0.0: 0, 0.33: 100, 0.67: 140, 1.0: 147}  # the second attack on the third block is done here


def test_a_resumed_training_reports_earlier_seconds(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from bench.data.images import load
    from bench.planning.plan import plan
    from bench.planning.spec import build
    from bench.training.resume import Checkpointer
    from bench.training.train import train as run

    class Killed(Exception):
        """Stands for a kill after the second epoch."""

    threat, about = {"eps": 0.1}, {"epochs": 3, "batch_size": 16}
    values = {"data": {"train": 64, "test": 16}, "threat": threat, "train": about, "attacks": ["clean"]}
    what = plan(build({**values, "defenses": ["standard"]}), tmp_path)[0]
    data = load("digits", root=tmp_path, device=torch.device("cpu"), train=64, test=16)

    def kept() -> Checkpointer:
        return Checkpointer(tmp_path / "training.safetensors", lambda: "this", every=1e9, at_end=0.0, share=1e9)

    def stop(values: dict[str, Any]) -> None:
        if values["share"] > 0.6:
            raise Killed

    with pytest.raises(Killed):
        run(what, data, tmp_path / "train.jsonl", stop, kept())
    said = list[dict[str, Any]]()
    found = run(what, data, tmp_path / "train.jsonl", said.append, kept())
    assert found.metrics.resumed == 1
    # each step is reported, not only each epoch
    assert [(values["epoch"], values["step"], values["steps"]) for values in said if values["epoch"] == 3][:-1] == [
        (3, step, 4) for step in (0, 0, 1, 2, 3)
    ]
    resumed = [values for values in said if "earlier" in values]
    assert len(resumed) == 1
    assert resumed[0]["share"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert resumed[0]["earlier"] >= sum(line["seconds"] for line in lines[:2]) > 0


def test_the_plan_of_a_half_finished_run_counts_the_remaining_jobs(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plugins = write_plugins(tmp_path)
    (tmp_path / "wobble.todo").write_text("raise")
    assert bench(*tiny(*plugins)).code == 1
    shown = bench(*tiny(*plugins, "--dry-run")).out
    assert "2 done, 1 to do" in shown
    assert "time      unknown: 1 job with neither a past record nor a declared cost" in shown


def test_device_hours_are_summed_over_jobs_with_their_range(store: Store) -> None:
    jobs = [OLD, NEW, train(2), train(3)]
    local = Local(Path("no-data"), [Slot("cpu")] * 4)
    found = hours(jobs[1:], jobs, store, Estimator(store, "cpu"), local)
    seconds = (100 + 300, 100 + 240, 100 + 375, 100)  # the fixture's training is done; the range is that of the others
    assert found[1:5] == pytest.approx([each / 3600 for each in seconds])
    assert str(found) == "about 0.11 CPU hours (0.094 to 0.13), of which 0.028 are spent"
    record(store, train(4), device="GPU y", train_seconds=7200.0)
    also = hours(jobs[1:], [*jobs, train(4)], store, Estimator(store, "cpu"), local)
    assert str(also) == f"{found}; 2.0 GPU hours besides"
    assert str(hours([], [OLD], store, Estimator(store, "cpu"), local)) == "0.028 CPU hours, all of them spent"


def test_work_of_a_running_and_of_an_unheard_job_in_device_hours(store: Store) -> None:
    says(store, NEW, share=0.5, began=time.time() - 180)
    jobs = [NEW, evaluate(NEW, attack="unheard")]
    found = hours(jobs, jobs, store, Estimator(store, "cpu"), Local(Path("no-data"), [Slot("cpu")]))
    assert found.unknown == 1
    assert found.spent == pytest.approx(180 / 3600, rel=0.01)
    assert found.expected == pytest.approx(360 / 3600, rel=0.01)  # the other half takes as long
    assert "+ 1 job of unknown length, of which 0.050 are spent" in str(found)


def test_slots_of_one_gpu_share_its_hours_and_a_task_of_slurm_takes_all_it_asks_for(store: Store) -> None:
    record(store, train(5), device="GPU y", train_seconds=3600.0)
    estimator = Estimator(store, "cuda")
    gpus = [Slot("cuda", (("CUDA_VISIBLE_DEVICES", name),)) for name in "01"]
    asked = Request(("gres=lustre:4,gpu:a100:2", "cpus-per-task=8"), {"evaluate": ("gpus-per-node=1",)})
    backends = {
        "alone": Local(Path(), gpus),
        "two a GPU": Local(Path(), gpus * 2),
        "slurm": Slurm(Path(), asked, "cuda"),
    }
    found = {name: hours([NEW], [NEW], store, estimator, each).expected for name, each in backends.items()}
    whole = (estimator.seconds(NEW) or 0.0) / 3600
    assert found == pytest.approx({"alone": whole, "two a GPU": whole / 2, "slurm": 2 * whole})
    assert [asked.devices(kind, "cuda") for kind in ("train", "evaluate")] == [2, 1]
    assert [asked.devices("train", "cpu"), Request().devices("train", "cuda")] == [8, 1]


def test_the_plan_as_json(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins)).code == 0
    told = bench(*tiny(*plugins, "--dry-run", "--json", "--seeds", "0,1"))
    assert (told.code, told.err) == (0, "")
    found = json.loads(told.out)
    assert {name: found[name] for name in ("jobs", "kinds", "done", "todo", "device")} == {
        "jobs": 6, "kinds": {"train": 2, "evaluate": 4}, "done": 3, "todo": 3, "device": "cpu",
    }  # fmt: skip
    low, mean, high = (found[f"device_hours{end}"] for end in ("_low", "", "_high"))
    assert 0 < found["device_hours_spent"] < low <= mean <= high
    assert 3600 * (mean - found["device_hours_spent"]) >= found["seconds_left"] > 0  # on one slot or on several
    unheard = json.loads(bench(*tiny("--dry-run", "--json", *plugins, "--results-dir", "none", attack="wobble")).out)
    assert (unheard["seconds_left"], unheard["device_hours"], unheard["device_hours_spent"]) == (None, None, 0.0)
    text = bench(*tiny(*plugins, "--dry-run", "--seeds", "0,1")).out.splitlines()
    (cost,) = (line for line in text if line.startswith("cost      "))
    assert " CPU hours (" in cost
    assert cost.endswith(" are spent")


def test_jobs_that_wait_for_a_run_that_ended_are_not_in_the_time_left(store: Store) -> None:
    gone, running, waiting = (train(seed) for seed in (7, 8, 9))
    for jobs in ([gone], [running, waiting]):  # the first run is abandoned, the second goes on
        for job in jobs:
            store.add(job)
        store.mark_run(job.key for job in jobs)
    says(store, running, share=0.0)
    everything = {**store.jobs()}
    found = survey(store, {}, everything, Path("no-data"))
    assert found["seconds_left"] == pytest.approx(200, abs=1)
    assert found["waiting_of_ended_runs"] == 2  # and the training of the fixture, which no run has had to do
    shown = "\n".join(status_lines(store.root, {**found, "unreadable": 0}))
    assert "estimated from 1 past record; 2 waiting jobs of a run that has ended not counted\n" in shown + "\n"
    of_spec = {job.key: job for job in (gone, running)}
    assert survey(store, of_spec, everything, Path("no-data"))["seconds_left"] == pytest.approx(200, abs=1)


def test_a_run_marks_the_jobs_that_it_has_to_do(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plugins = write_plugins(tmp_path)
    assert bench(*tiny(*plugins)).code == 0
    results = Store(Path("results"))
    first = {results.run_of(key) for key in results.keys()}
    assert len(first) == 1
    assert bench(*tiny(*plugins, "--seeds", "0,1")).code == 0
    marks = [results.run_of(key) for key in results.keys()]
    assert marks.count(*first) == 3  # finished jobs keep the mark of the run that did them
    assert len(set(marks)) == 2


def test_no_time_left_is_shown_when_all_jobs_are_done(store: Store) -> None:
    from rich.console import Console

    view = View(Console(), store, [OLD, NEW], "live", 1)
    view._handle(Event("skipped", OLD))
    assert str(view._table().renderables[0]).startswith("1 of 2 jobs done; time left about")
    view._handle(Event("ok", NEW))
    assert str(view._table().renderables[0]) == "2 of 2 jobs done"
