"""GPUs without GPUs: the query is answered by the test; placement, packing, benching and what each worker was shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_jobs
import pytest
import torch
from fake_jobs import kinds, measured, says, starts, train
from harness import Bench, tiny

from bench.core import nvml
from bench.executors import devices
from bench.executors.base import Event
from bench.executors.clusters import Cluster, Machine, choose
from bench.executors.devices import Gpu, Slot, gpus, lanes, query, slots
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.executors.slot_pool import SlotPool
from bench.jobs import provenance
from bench.planning.job import Job
from bench.records.store import Store

TWO = [Gpu(str(k), f"GPU-{k}", "card", 80_000.0, 5.0) for k in range(2)]
# 3 is busy with a process of others, 5 is small, 6 is utilized by what shows no process, 7 holds memory of others
EIGHT = [Gpu(str(k), f"GPU-{k}", "card", 80_000.0, 5.0) for k in range(8)]
EIGHT[3] = Gpu("3", "GPU-3", "card", 80_000.0, 900.0, 0.0, 1)
EIGHT[5] = Gpu("5", "GPU-5", "small card", 6_000.0, 0.0)
EIGHT[6] = Gpu("6", "GPU-6", "card", 80_000.0, 5.0, 0.9)
EIGHT[7] = Gpu("7", "GPU-7", "card", 80_000.0, 30_000.0)


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def run(store: Store, jobs: list[Job], where: list[Slot]) -> list[Event]:
    return list(drive(Local(store.root.parent, where, work=fake_jobs.work), jobs, store))


def shown(places: list[Slot]) -> list[str]:
    return [slot.place for slot in places]


def places_of(root: Path, job: Job) -> list[str]:
    return [start["shown"]["CUDA_VISIBLE_DEVICES"] for start in starts(root, job)]


def test_a_slot_a_core_or_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots("cpu", 3) == [Slot("cpu")] * 3
    assert slots("cpu", None) == [Slot("cpu")] * 16
    assert slots("auto", 2, ask=list) == [Slot("cpu")] * 2
    assert lanes(slots("cpu", 3)) == 3
    with pytest.raises(ValueError, match="--device is 'gpu'; expected auto, cpu or cuda"):
        slots("gpu", 1)


def test_free_gpus_are_used_and_busy_ones_only_where_named() -> None:
    assert sorted(set(shown(slots("auto", None, ask=lambda: EIGHT)))) == ["0", "1", "2", "4", "5"]
    assert shown(slots("cuda", None, 1, ask=lambda: EIGHT)) == ["0", "1", "2", "4", "5"]
    assert shown(slots("auto", None, 1, ["2", "GPU-3"], lambda: EIGHT)) == ["2", "3"]
    with pytest.raises(ValueError, match="--gpus names 9; there are 0, 1"):
        slots("auto", None, 1, ["0", "9"], lambda: TWO)


def test_nothing_ends_on_the_cpu_unasked() -> None:
    with pytest.raises(ValueError, match="--device cuda, but no GPU was found"):
        slots("cuda", None, ask=list)
    with pytest.raises(ValueError, match="--gpus 0, but no GPU was found"):
        slots("auto", None, 1, ["0"], list)
    with pytest.raises(ValueError, match=r"every GPU is busy .GPU 3: 1 process; GPU 7: 30000 MB in use"):
        slots("auto", None, ask=lambda: [EIGHT[3], EIGHT[7]])


def test_gpus_are_filled_in_turn_and_as_often_as_asked() -> None:
    assert shown(slots("auto", None, 2, ask=lambda: TWO)) == ["0", "1", "0", "1"]
    assert slots("cuda", 3, 2, ask=lambda: TWO) == slots("auto", None, 2, ask=lambda: TWO)[:3]
    packed = slots("auto", None, ask=lambda: TWO)
    assert shown(packed) == ["0", "1"] * 8
    assert {slot.memory for slot in packed} == {79_995.0}
    assert lanes(packed) == 2
    assert dict(packed[0].environment)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # the tool's order, not CUDA's


def test_visible_devices_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1")
    assert gpus(lambda: EIGHT) == [EIGHT[5], replace(EIGHT[1], index="GPU-1")]
    # CUDA counts in another order than the tool unless it is told to, so a UUID stays one
    assert {slot.environment for slot in slots("auto", None, None, ["GPU-1"], lambda: EIGHT)} == {
        (("CUDA_VISIBLE_DEVICES", "GPU-1"),)
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert shown(slots("auto", None, ask=list)) == ["2", "5"]  # without the tool: one job each
    for written, seen in [("1,-1,0", ["1"]), ("1, 0", ["1", "0"]), ("0,,1", ["0"]), ("MIG-9/7/0,x,1", ["MIG-9/7/0"])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", written)
        assert shown(slots("auto", None, 1, ask=lambda: TWO)) == seen  # CUDA stops at the first that is none
    for hidden in ("", "-1", "NoDevFiles", "none", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert slots("auto", 2, ask=lambda: TWO) == [Slot("cpu")] * 2
        with pytest.raises(ValueError, match="--device cuda, but no GPU was found"):
            slots("cuda", None, ask=lambda: TWO)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a shell script in the place of the driver's tool. A test that asks for this has no other tool."""
    if os.name == "nt":
        pytest.skip("a shell script stands for the driver's tool")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def write(text: str, head: str = "#!/bin/sh") -> None:
        (tmp_path / "nvidia-smi").write_text(f"{head}\n{text}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


CARDS = """case "$1" in
--query-gpu=*) echo '0, GPU-a, Card X, 81559, 12, 0'; echo '1, GPU-b, Shared, [N/A], [N/A], 40';;
*) echo 'GPU-b, 17'; echo 'GPU-b, 18';;
esac"""
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it couldn\'t communicate with\nthe NVIDIA driver."; exit 9'


def test_the_driver_s_tool_is_asked(tool: Callable[..., None]) -> None:
    assert query() == []
    tool(CARDS)
    assert query() == [
        Gpu("0", "GPU-a", "Card X", 81559.0, 12.0, 0.0, 0),
        Gpu("1", "GPU-b", "Shared", None, 0.0, 0.4, 2),
    ]
    tool(CARDS.replace("echo 'GPU-b, 17'; echo 'GPU-b, 18'", "exit 3"))  # who uses them is not told
    assert [gpu.processes for gpu in query()] == [0, 0]


NVML = """
import time
from types import SimpleNamespace as Told

nvmlMemory_v2 = 2


class NVMLError(Exception):
    pass


def nvmlInit():
    INIT


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return 2


def nvmlDeviceGetHandleByIndex(place):
    return place


def nvmlDeviceGetHandleByUUID(uuid):
    return ["GPU-a", "GPU-b"].index(uuid)


def nvmlDeviceGetUUID(card):
    return "GPU-" + "ab"[card]


def nvmlDeviceGetName(card):
    return "Card " + "XY"[card]


def _of_the_first(card, told):
    if card:
        raise NVMLError("Not Supported")
    return told


def nvmlDeviceGetMemoryInfo(card, version=None):
    return _of_the_first(card, Told(total=80000 << 20, used=12 << 20))


def nvmlDeviceGetUtilizationRates(card):
    return _of_the_first(card, Told(gpu=40))


def nvmlDeviceGetComputeRunningProcesses(card):
    return [17, 18] if card else []


def nvmlDeviceGetTotalEnergyConsumption(card):
    return _of_the_first(card, 5250)
"""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a module in the place of nvidia-ml-py, whose first call does what it is given."""

    def write(init: str) -> None:
        (tmp_path / "nvml").mkdir()
        (tmp_path / "nvml" / "pynvml.py").write_text(NVML.replace("INIT", init))
        monkeypatch.syspath_prepend(tmp_path / "nvml")
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    return write


def test_nvml_is_asked_before_the_driver_s_tool(tool: Callable[..., None], library: Callable[[str], None]) -> None:
    tool(NO_DRIVER)
    library("pass")
    assert query() == [
        Gpu("0", "GPU-a", "Card X", 80000.0, 12.0, 0.4, 0),
        Gpu("1", "GPU-b", "Card Y", None, 0.0, 0.0, 2),  # of which memory and load are not told
    ]
    assert (nvml.joules("GPU-a"), nvml.joules("GPU-b")) == (5.25, None)


def test_where_nvml_has_no_driver_the_tool_is_asked(tool: Callable[..., None], library: Callable[[str], None]) -> None:
    tool(CARDS)
    library("raise NVMLError('Driver Not Loaded')")
    assert [gpu.name for gpu in query()] == ["Card X", "Shared"]
    assert nvml.joules("GPU-a") is None


def test_a_library_that_hangs_is_not_waited_for(
    tool: Callable[..., None], library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.2)
    library("time.sleep(3)")
    with pytest.raises(ValueError, match=r"^NVML did not answer within 0\.2 s$"):
        query()


def test_a_job_has_the_energy_of_a_gpu_that_it_had_alone(
    library: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch names the GPU as it would on one; no GPU is here."""
    library("pass")
    assert provenance.joules("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a"))
    assert provenance.joules("cuda") == 5.25
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())  # of another vendor
    assert provenance.joules("cuda") is None
    assert [provenance.energy(1.5, 5.25, sharing) for sharing in (1, 2)] == [3.75, None]
    assert provenance.energy(None, 5.25, 1) is None


@pytest.mark.parametrize("said", ["echo No devices were found", "echo 'No devices were found' >&2; exit 6"])
def test_a_tool_that_finds_no_gpu_is_believed(tool: Callable[..., None], said: str) -> None:
    tool(said)
    assert slots("auto", 2) == [Slot("cpu")] * 2


@pytest.mark.parametrize(
    ("script", "head", "found"),
    [
        (NO_DRIVER, "#!/bin/sh", "nvidia-smi failed with exit code 9 .NVIDIA-SMI has .* with the NVIDIA driver.*"),
        ("exit 15", "#!/bin/sh", "nvidia-smi failed with exit code 15 .no message."),
        (f"{CARDS}; exit 15", "#!/bin/sh", "nvidia-smi failed with exit code 15 .*"),
        ("exec /bin/sleep 60", "#!/bin/sh", "nvidia-smi did not answer within 0.5 s"),
        ("", "#!/nowhere", "nvidia-smi cannot be run: .*"),
    ],
)
def test_a_tool_that_fails_is_not_taken_for_no_gpu(
    tool: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    head: str,
    found: str,
) -> None:
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.5)
    tool(script, head)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=rf"^{found}; repair the driver, or use --device cpu, or [^\n]*$"):
            slots(device, None)
    assert slots("cpu", 1) == [Slot("cpu")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ValueError, match="repair the driver"):
        slots("auto", None)
    assert capsys.readouterr().err == ""
    assert shown(slots("cuda", None)) == ["1"]
    assert re.fullmatch(rf"{found}; CUDA_VISIBLE_DEVICES is used as it is\n", capsys.readouterr().err)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert slots("auto", 1) == [Slot("cpu")]  # nobody was asked


def test_a_run_says_what_it_runs_on_or_that_nobody_can_tell(bench: Bench, tool: Callable[..., None]) -> None:
    words = tiny(defense="standard", attack="clean")
    plan = ["plan", *words[1:]]
    auto = [*plan, "--device", "auto"]
    tool(CARDS)
    assert "devices   GPU 0" in bench(*auto).out.splitlines()  # 1 is in use
    assert "devices   GPU 0, GPU 1" in bench(*auto, "--gpus", "0,1").out.splitlines()
    tool(NO_DRIVER)
    assert "devices   cpu" in bench(*plan).out.splitlines()
    for command in (auto, ["run", *auto[1:]]):
        done = bench(*command)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert done.err.startswith("error: nvidia-smi failed with exit code 9 (NVIDIA-SMI has failed")
    assert not Path("results").exists()
    assert "devices   cpu" in bench(*words, "--executor", "local").out.splitlines()


def test_in_this_process_the_chosen_gpu_is_the_one_shown(
    tool: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool(CARDS)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    made = choose("debug", tmp_path, Machine(gpus="1"), Cluster())
    assert made.devices() == "cuda, in this process"
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def take(places: SlotPool, *needs: float | None) -> list[str | None]:
    """Where jobs of these needs go in one round."""
    places.begin()
    found = [places.take(need) for need in needs]
    return [lease.slot.place if lease else None for lease in found]


def test_jobs_are_packed_by_memory_and_the_first_of_a_kind_has_a_device_alone() -> None:
    two = slots("auto", None, ask=lambda: TWO)
    assert take(SlotPool(two), 30_000.0, 30_000.0, 30_000.0, 30_000.0, 30_000.0) == ["0", "1", "0", "1", None]
    assert take(SlotPool(two), None, 10.0, 10.0, None) == ["0", "1", "1", None]
    assert take(SlotPool(two), 10.0, 10.0, None, 10.0, 10.0) == [
        "0",
        "1",
        None,
        "1",
        "1",
    ]  # 0 is kept until it is empty


def test_a_device_is_shared_again_after_a_job_that_was_alone() -> None:
    places = SlotPool(slots("auto", None, None, ["0"], lambda: TWO))
    alone = places.take(None)
    assert alone is not None
    assert take(places, 10.0) == [None]
    places.give(alone)
    assert take(places, 10.0, 10.0) == ["0", "0"]


def test_two_different_jobs_without_a_success_between_them_bench_a_device() -> None:
    places = SlotPool(slots("auto", None, None, ["0"], lambda: TWO))
    assert [places.broke("0", key) for key in ("a", "a")] == [False, False]
    places.well("0")
    assert not places.broke("0", "b")
    assert places.usable
    assert places.broke("0", "c")
    assert not places.usable


def test_a_small_device_takes_small_jobs_and_a_large_job_is_not_starved() -> None:
    both = slots("auto", None, None, ["0", "5"], lambda: EIGHT)
    assert take(SlotPool(both), 50_000.0, 50_000.0, 5_000.0) == ["0", None, "5"]
    assert take(SlotPool(both), 90_000.0, 1_000.0) == ["0", "5"]  # measured elsewhere: the largest, alone
    places = SlotPool(both)
    small = [places.take(10_000.0) for _ in range(3)]
    assert [lease.slot.place for lease in small if lease] == ["0"] * 3
    for lease in small:
        assert take(places, 75_000.0, 10_000.0) == [None, None]
        assert lease is not None
        places.give(lease)
    assert take(places, 75_000.0, 10_000.0) == ["0", None]


def test_each_worker_is_shown_its_device_and_told_who_shares_it(store: Store, tmp_path: Path) -> None:
    past = train(9)
    measured(store, past, 1.0, cuda=1000.0)
    jobs = [train(seed) for seed in range(4)]
    for job in jobs:
        says(tmp_path, job, "ok 1")
    run(store, jobs, slots("auto", None, ask=lambda: TWO))
    told = [starts(tmp_path, job)[0] for job in jobs]
    assert sorted(start["shown"]["CUDA_VISIBLE_DEVICES"] for start in told) == ["0", "0", "1", "1"]
    assert {start["device"] for start in told} == {"cuda"}
    assert {start["shown"]["CUDA_DEVICE_ORDER"] for start in told} == {"PCI_BUS_ID"}
    assert sorted(start["workers"] for start in told) == [1, 1, 2, 2]  # the first two are told while they run:
    assert [path.name for path in store.root.glob("*/shared")] == []  # and nothing of that is left


def test_who_came_first_hears_of_who_came_later(store: Store, tmp_path: Path) -> None:
    jobs = [train(seed) for seed in range(2)]
    for job in jobs:
        says(tmp_path, job, "ok 1.5")
    seen: dict[str, str] = {}
    where = slots("auto", None, 2, ["0"], lambda: TWO)
    for _ in drive(Local(tmp_path, where, work=fake_jobs.work), jobs, store):
        seen |= {path.parent.name: path.read_text() for path in store.root.glob("*/shared")}
    assert seen == {jobs[0].key: "2"}


def test_jobs_of_unknown_memory_are_measured_alone_then_packed(store: Store, tmp_path: Path) -> None:
    jobs = [train(seed) for seed in range(6)]
    for job in jobs:
        says(tmp_path, job, "ok 0.5")
    run(store, jobs, slots("auto", None, None, ["0"], lambda: TWO))
    beside = [starts(tmp_path, job)[0]["workers"] for job in jobs]
    assert beside[0] == 1
    assert max(beside[1:]) == 5


def test_a_device_that_breaks_two_jobs_is_benched(store: Store, tmp_path: Path) -> None:
    jobs = [train(seed) for seed in range(6)]
    for job in jobs[:2]:
        says(tmp_path, job, "device", "ok")
    for job in jobs[2:]:
        says(tmp_path, job, "ok 0.2")
    events = run(store, jobs, slots("auto", 1, 1, ["0"], lambda: TWO) + slots("auto", 1, 1, ["1"], lambda: TWO))
    assert [kinds(events, job)[-1] for job in jobs] == ["ok"] * 6
    for job in jobs[:2]:
        first, second = places_of(tmp_path, job)
        assert first != second  # elsewhere
        record: dict[str, Any] = store.record(job.key) or {}
        assert [(each.step, each.type) for each in record.retries] == [("elsewhere", "AcceleratorError")]


def test_when_every_device_is_benched_the_rest_is_blocked_and_not_run_on_the_cpu(store: Store, tmp_path: Path) -> None:
    jobs = [train(seed) for seed in range(3)]
    for job in jobs[:2]:
        says(tmp_path, job, "device")
    events = run(store, jobs, slots("auto", None, 1, ["0"], lambda: TWO))
    assert kinds(events, jobs[0]) == ["started", "retried", "started", "retried", "started", "error"]
    assert kinds(events, jobs[1])[-1] == "blocked"
    assert kinds(events, jobs[2]) == ["blocked"]
    reason = next(event.message for event in events if event.job == jobs[2])
    assert reason == "every GPU was benched after errors of its own; no job moves to the CPU"
    assert {start["device"] for job in jobs for start in starts(tmp_path, job)} == {"cuda"}


def test_one_bad_job_does_not_bench_a_device_and_a_good_one_clears_it(store: Store, tmp_path: Path) -> None:
    bad, good, worse, last = (train(seed) for seed in range(4))
    says(tmp_path, bad, "device")
    says(tmp_path, worse, "device")
    events = run(store, [bad, good, worse, last], slots("auto", None, 1, ["0"], lambda: TWO))
    assert [kinds(events, job)[-1] for job in (bad, good, worse, last)] == ["error", "ok", "error", "ok"]
