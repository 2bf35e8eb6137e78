"""Which job is next, without processes: urgency, determinism, the bound, and what a failure leads to."""

from __future__ import annotations

import random

import pytest
from factories import toy_job
from fake_jobs import evaluate, train

from bench.executors.schedule import Queue, bound, expected, simulate, urgencies
from bench.jobs.retries import Fault, classify, entry, fault, halvings, step
from bench.planning.job import Job
from bench.records.record import JobError, PeakMemory, Record, Retry


def keys(jobs: list[Job]) -> list[str]:
    return [job.key for job in jobs]


def test_the_longest_job_goes_first_and_equal_ones_as_planned() -> None:
    jobs = [train(seed) for seed in range(4)]
    seconds = dict(zip(keys(jobs), (1.0, 3.0, 2.0, 3.0), strict=True))
    assert keys(Queue(jobs, seconds, 2).ready()) == [jobs[k].key for k in (1, 3, 2, 0)]


def test_a_short_training_with_long_evaluations_goes_before_a_long_one_without() -> None:
    short, long = train(0), train(1)
    judged = evaluate(short)
    jobs = [long, short, judged]
    seconds = {long.key: 5.0, short.key: 1.0, judged.key: 6.0}
    queue = Queue(jobs, seconds, 2)
    assert keys(queue.ready()) == [short.key, long.key]
    assert simulate(jobs, seconds, 2) == 7.0
    assert simulate(jobs, seconds, 2, {short.key: 1.0, long.key: 5.0, judged.key: 0.0}) == 7.0
    assert simulate(jobs, seconds, 1) == 12.0


def test_an_evaluation_goes_before_a_training_when_it_shortens_the_whole() -> None:
    first, second = train(0), train(1)
    judged, other = evaluate(first), evaluate(second, attack="fgsm")
    jobs = [first, second, judged, other]
    seconds = {first.key: 1.0, second.key: 2.0, judged.key: 9.0, other.key: 1.0}
    queue = Queue(jobs, seconds, 1)
    queue.start(first)
    queue.over(first)
    assert keys(queue.ready()) == [judged.key, second.key]
    assert simulate(jobs, seconds, 2) == 10.0
    even = {**seconds, judged.key: 3.0}  # as much as the training with what follows: what ends a row goes first
    queue = Queue(jobs, even, 1)
    queue.start(first)
    queue.over(first)
    assert keys(queue.ready()) == [judged.key, second.key]


def test_much_work_behind_a_job_counts_as_a_chain_does() -> None:
    busy, lone = train(0), train(1)
    many = [evaluate(busy, n) for n in range(1, 9)]
    seconds = {busy.key: 1.0, lone.key: 3.0, **{job.key: 1.0 for job in many}}
    found = urgencies([lone, busy, *many], seconds, 2)
    assert found[busy.key] == 5.0
    assert found[lone.key] == 3.0
    assert found[many[0].key] == 1.0


def test_work_that_two_jobs_wait_for_counts_once() -> None:
    trained = train(0)
    first, second = evaluate(trained, 1), evaluate(trained, 2)
    audit = toy_job("audit", {"part": "images", "level": "quick", "n": 1}, (trained.key, first.key, second.key))
    seconds = {trained.key: 1.0, first.key: 1.0, second.key: 2.0, audit.key: 4.0}
    assert urgencies([trained, first, second, audit], seconds, 1)[trained.key] == 8.0
    assert urgencies([trained, first, second, audit], seconds, 9)[trained.key] == 7.0
    assert bound([trained, first, second, audit], seconds, 9) == 7.0
    assert bound([trained, first, second, audit], seconds, 1) == 8.0


def test_a_job_of_unknown_length_is_as_long_as_the_longest_of_its_kind() -> None:
    jobs = [train(seed) for seed in range(3)]
    judged = evaluate(jobs[0])
    known = {jobs[0].key: 2.0, jobs[1].key: 7.0}
    found = expected([*jobs, judged], lambda job: known.get(job.key))
    assert found[jobs[2].key] == 7.0
    assert found[judged.key] == 60.0


def test_a_queue_lets_nothing_start_early_and_forgets_nothing() -> None:
    trained = train(0)
    judged = evaluate(trained)
    queue = Queue([judged, trained], {trained.key: 1.0, judged.key: 9.0}, 1)
    assert keys(queue.ready()) == [trained.key]
    queue.start(trained)
    assert (queue.ready(), len(queue)) == ([], 1)
    queue.again(trained)
    assert (keys(queue.ready()), len(queue)) == ([trained.key], 2)
    queue.start(trained)
    assert queue.over(trained) == [judged]
    assert (keys(queue.ready()), len(queue), set(queue.pending)) == ([judged.key], 1, {judged.key})
    assert queue.over(judged) == []  # given up without a start
    assert len(queue) == 0


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_simulated_runs_come_near_the_bound_and_beat_the_order_of_the_spec(lanes: int) -> None:
    draw, near, plain = random.Random(lanes), [], []
    for _ in range(60):
        jobs = [train(seed) for seed in range(8 * lanes)]
        seconds = {job.key: draw.lognormvariate(0.0, 1.0) for job in jobs}
        least = bound(jobs, seconds, lanes)
        near.append(simulate(jobs, seconds, lanes) / least)
        plain.append(simulate(jobs, seconds, lanes, dict.fromkeys(seconds, 1.0)) / least)
        assert near[-1] >= 1.0 - 1e-9
    assert sum(near) / len(near) <= 1.05
    assert sum(plain) / len(plain) >= sum(near) / len(near) + 0.05


def test_the_order_is_the_same_each_time() -> None:
    jobs = [train(seed) for seed in range(30)]
    jobs += [evaluate(job, n) for job in jobs[:10] for n in (1, 2)]
    seconds = {job.key: float(place % 4) for place, job in enumerate(jobs)}

    def run() -> list[str]:
        queue, order = Queue(jobs, seconds, 1), []
        while queue:
            job = queue.ready()[0]
            queue.start(job)
            queue.over(job)
            order.append(job.key)
        return order

    assert run() == run()
    assert sorted(run()) == sorted(keys(jobs))


OOM, DIED = Fault("oom", "OutOfMemoryError", ""), Fault("died", "WorkerDied", "")
BROKEN = Fault("device", "AcceleratorError", "")


def trail(what: Fault, job: Job, shared: bool = False) -> list[str]:
    """Every step until the job is given up."""
    before: list[Retry] = []
    while (chosen := step(what, job, before, shared)) != "give up":
        before.append(entry(what, chosen))
    return [str(each.step) for each in before]


def test_what_is_tried_again_and_how_often() -> None:
    trained = train(0)
    judged = evaluate(trained)
    assert trail(DIED, trained) == ["again"] * 2
    assert trail(BROKEN, judged) == ["elsewhere"] * 2
    assert trail(OOM, judged) == ["halve"] * 3
    assert trail(OOM, judged, shared=True) == ["alone", "halve", "halve", "halve"]
    assert trail(OOM, trained) == []  # half a batch would be another training
    assert trail(OOM, trained, shared=True) == ["alone"]
    assert trail(Fault("raised", "ValueError", ""), judged) == []
    assert trail(Fault("timeout", "Timeout", ""), judged) == []
    assert trail(Fault("oom", "FixedBatch", ""), judged) == []
    assert halvings([entry(OOM, "halve"), entry(DIED, "again"), entry(OOM, "halve")]) == 2


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate", "oom"),
        ("MemoryError", "", "oom"),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "oom"),
        ("AcceleratorError", "CUDA error: out of memory", "oom"),
        ("AcceleratorError", "CUDA error: unspecified launch failure", "device"),
        ("RuntimeError", "No CUDA GPUs are available", "device"),
        ("AcceleratorError", "CUDA error: device-side assert triggered", "raised"),  # a label that does not exist
        ("RuntimeError", "shapes do not match", "raised"),
    ],
)
def test_errors_are_told_apart(name: str, message: str, kind: str) -> None:
    assert classify(name, message) == kind
    record = Record("oom" if kind == "oom" else "error", error=JobError(name, message))
    found = fault(record, 1, None, False, None)
    assert found is not None
    assert found.kind == kind


def test_an_end_without_a_record_is_a_death_or_the_kernel_s_or_ours() -> None:
    def kind(code: int | None, late: float | None, kernel: bool) -> str:
        found = fault(None, code, late, kernel, 12.0)
        assert found is not None
        assert found.peak == PeakMemory(rss=12.0)
        return found.kind

    assert kind(-9, None, False) == "died"
    assert kind(-9, None, True) == "oom"
    assert kind(-11, None, True) == "died"
    assert kind(1, None, True) == "died"
    assert kind(-9, 3.0, True) == "timeout"
    assert fault(Record("done"), -9, 3.0, True, None) is None  # it was over before it was killed
    assert fault(Record("diverged"), 0, None, False, None) is None
