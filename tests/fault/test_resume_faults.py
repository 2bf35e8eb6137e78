"""F3, F9, F12, F14, F20, F26: kills during a resume, full disks, stale keys, duplicates, clocks that jump, torn logs.

Torch-free. Each test has a small part that always runs, and the number of trials below among those marked fault.
"""

from __future__ import annotations

import errno
import itertools
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import driver
import pytest
from fake_store import contents, matrix, run, told, work
from store_server import kill, leaderboard, lost, outcome, repeated, start, unparsable
from store_server import server as server

from bench import atomic
from bench.atomic import appending, write_atomic
from bench.commands.matrix import describe, prepare
from bench.planning import evaluations as evaluation_planner
from bench.planning import trainings
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.planning.typed import Options
from bench.records.leases import STALE, claim
from bench.records.store import Store

RESUME_KILLS = 100
TORN = 200
CHANGED, IRRELEVANT = 10, 5
LISTED, REPEATED = 100, 50
JUMPS = (-3600.0, 86_400.0)


@pytest.mark.parametrize("kills", [6, pytest.param(RESUME_KILLS, marks=pytest.mark.fault)])
def test_f03_a_driver_killed_while_it_resumes_can_always_resume(server: Any, tmp_path: Path, kills: int) -> None:
    """At a system call that the resume makes or at a random moment of it; every other time twice in a row."""
    calm = tmp_path / "calm"
    run(calm, matrix(2))
    expected, shown = outcome(calm), leaderboard(calm)
    draw, made, twice, rounds = random.Random(0), 0, 0, 0
    while made < kills:
        root, acks = tmp_path / f"results{rounds}", tmp_path / f"acks{rounds}"
        rounds += 1
        first = start(server, driver.drive, root, acks, 2, ("replace", "after", draw.randint(3, 20)))
        first.join()  # killed on the way: now there is something to resume
        hits = 0
        for _ in range(1 + rounds % 2):
            place = (draw.choice(driver.CALLS), draw.choice(("before", "after")), draw.randint(1, 3))
            again = start(server, driver.drive, root, acks, 2, place if rounds % 4 < 2 else None)
            if rounds % 4 >= 2:
                time.sleep(draw.uniform(0.005, 0.04))
                if again.exitcode is None:
                    kill(again)
            again.join()
            hits += again.exitcode != 0
            assert unparsable(root) == []
            assert lost(root, acks) == []
        made, twice = made + hits, twice + (hits == 2)
        last = start(server, driver.drive, root, acks, 2)
        last.join()
        assert (last.exitcode, repeated(acks)) == (0, [])
        assert outcome(root) == expected
        if rounds % 10 == 1:
            assert leaderboard(root) == shown
    assert twice >= kills // 4
    print(f"F3: {made} kills during a resume, {twice} times two in a row")


@pytest.mark.parametrize(
    ("code", "size", "needed"),
    [(errno.ENOSPC, 300, "300 bytes"), (errno.EFBIG, 3 * 2**20, "3 MB"), (errno.EDQUOT, 5 * 2**10, "5 KB")],
)
@pytest.mark.parametrize(("free", "left"), [(0, "0 bytes"), (340 * 2**20, "340 MB"), (75 * 2**30, "75.0 GB")])
def test_f09_a_full_disk_names_path_need_and_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, size: int, needed: str, free: int, left: str
) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    def refuse(*args: Any) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(atomic.os, "replace", refuse)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="cannot write") as error:
        write_atomic(path, lambda file: file.write(b"x" * size))
    assert f"cannot write {path}: " in str(error.value)
    assert f"; {needed} are needed, {left} are free there. Make room and run the same command again" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert path.read_text() == "old"


BASE: dict[str, Any] = {
    "data": {"name": "digits", "test": 32, "train": 128},
    "models": [{"name": "mlp", "set": {"width": 16}}],
    "threat": {"norm": "Linf", "eps": "0.1"},
    "train": {"epochs": 2, "lr": 0.01},
    "defenses": [{"name": "pgd_at"}],
    "attacks": [{"name": "pgd", "set": {"steps": 20}}],
    "checks": "off",
}
KEY_INPUTS: dict[str, dict[str, Any]] = {
    "images judged": {"data": {"name": "digits", "test": 31, "train": 128}},
    "images trained on": {"data": {"name": "digits", "test": 32, "train": 127}},
    "architecture": {"models": [{"name": "mlp", "set": {"width": 17}}]},
    "norm": {"threat": {"norm": "L2", "eps": "0.1"}},
    "budget": {"threat": {"norm": "Linf", "eps": "0.11"}},
    "epochs": {"train": {"epochs": 3, "lr": 0.01}},
    "learning rate": {"train": {"epochs": 2, "lr": 0.02}},
    "defense's setting": {"defenses": [{"name": "pgd_at", "set": {"steps": 9}}]},
    "attack's setting": {"attacks": [{"name": "pgd", "set": {"steps": 21}}]},
    "seed": {"seeds": [1]},
}
NO_KEY_INPUTS: dict[str, dict[str, Any]] = {
    "name of the run": {"name": "another"},
    "spelling of a number": {"threat": {"norm": "linf", "eps": 0.1}},
    "a default written out": {"recipe": "shared", "train": {"epochs": 2, "lr": 0.01, "momentum": 0.9}},
    "shards": {"attacks": [{"name": "pgd", "set": {"steps": 20}, "shards": 1}]},
    "order of keys": {"defenses": [{"set": {}, "name": "pgd_at"}]},
}


def begun(root: Path, acks: Path, changed: dict[str, Any], data: Path | None = None) -> int:
    """Jobs of the changed spec that were done anew on the folder of the unchanged one. `data`: where images lie."""
    before = len(acks.read_text().splitlines()) if acks.exists() else 0
    run(root, plan(build({**BASE, **changed}), data or root), told(acks))
    return sum(line.startswith("begin") for line in acks.read_text().splitlines()[before:])


def test_f12_what_a_result_depends_on_is_recomputed_and_nothing_else_is(tmp_path: Path) -> None:
    root, acks = tmp_path / "results", tmp_path / "acks"
    assert begun(root, acks, {}) == 2
    stale = [name for name, change in KEY_INPUTS.items() if begun(root, acks, change) == 0]
    needless = [name for name, change in NO_KEY_INPUTS.items() if begun(root, acks, change) > 0]
    assert (stale, needless) == ([], [])
    assert (len(KEY_INPUTS), len(NO_KEY_INPUTS)) == (CHANGED, IRRELEVANT)


def test_f12_images_of_a_folder_that_changed_make_new_jobs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "pets" / part / name).mkdir(parents=True)
        image.new("L", (14, 14), len(name + part)).save(tmp_path / "pets" / part / name / "1.png")
    root, acks = tmp_path / "results", tmp_path / "acks"
    pets = {"data": {"name": "folder:pets"}}
    assert begun(root, acks, pets, tmp_path) == 2
    assert begun(root, acks, pets, tmp_path) == 0
    image.new("L", (14, 14), 99).save(tmp_path / "pets" / "test" / "dog" / "1.png")
    assert begun(root, acks, pets, tmp_path) == 2
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pets").rename(tmp_path / "elsewhere" / "pets")
    assert begun(root, acks, pets, tmp_path / "elsewhere") == 0


@pytest.mark.parametrize(
    ("owner", "revision"), [(trainings, "TRAIN_REVISION"), (evaluation_planner, "EVALUATE_REVISION")]
)
def test_f12_a_newer_engine_recomputes_what_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, revision: str
) -> None:
    root, acks = tmp_path / "results", tmp_path / "acks"
    assert begun(root, acks, {}) == 2
    monkeypatch.setattr(owner, revision, getattr(owner, revision) + 1)
    assert begun(root, acks, {}) == (2 if owner is trainings else 1)


def test_f14_duplicates_are_done_once_and_told_once(tmp_path: Path) -> None:
    sigmas = [f"0.{number:03}" for number in range(100, 100 + LISTED - REPEATED)] * 2
    random.Random(0).shuffle(sigmas)
    listed = [{"name": "noisy", "set": {"sigma": sigma}} for sigma in sigmas]
    listed[7]["set"]["learn_sigma"] = False  # a default written out is the same defense
    file = tmp_path / "spec.yaml"
    file.write_text(json.dumps({**BASE, "defenses": listed, "attacks": ["clean", {"name": "clean", "n": 32}]}))
    matrix = prepare(Options(spec=file), None)
    lines = [line for line in describe(matrix) if "repeat" in line]
    assert lines == [f"chosen    {REPEATED} of {LISTED} defenses repeat another; each is done once"]
    counts = run(tmp_path / "results", matrix.jobs, told(tmp_path / "acks"))
    begins = [line for line in (tmp_path / "acks").read_text().splitlines() if line.startswith("begin")]
    assert len(begins) == len(set(begins)) == counts["ok"]
    assert sum(job.kind == "train" for job in matrix.jobs) == LISTED - REPEATED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attacks": ["pgd", {"name": "pgd", "shards": 1}]}, "1 of 2 attacks"),
        ({"attacks": [{"name": "pgd", "grid": {"steps": [20, 40, 20]}}]}, "1 of 3 attacks"),
        ({"seeds": [0, 1, 0, 0]}, "2 of 4 seeds"),
        ({"models": ["mlp", "mlp"], "seeds": [3, 3]}, "1 of 2 models and 1 of 2 seeds"),
        ({"defenses": [{"name": "pgd_at", "train_eps": [0.1, 0.2]}, {"name": "pgd_at"}]}, None),
        ({"attacks": ["pgd", {"name": "pgd", "n": 20}]}, None),
    ],
)
def test_f14_every_list_of_a_spec_is_looked_at(tmp_path: Path, change: dict[str, Any], says: str | None) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(json.dumps({**BASE, **change}))
    notes = prepare(Options(spec=file), None).notes
    assert notes == ([f"{says} repeat another; each is done once"] if says else [])


class Clock:
    """A wall clock that jumps, in place of `time.time`."""

    def __init__(self) -> None:
        self.ahead, self.real = 0.0, time.time

    def __call__(self) -> float:
        return self.real() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "time", made)
    return made


@pytest.mark.parametrize("jump", JUMPS)
def test_f20_a_clock_that_jumps_changes_no_result_and_no_order(tmp_path: Path, clock: Clock, jump: float) -> None:
    jobs, calm, order = matrix(2), list[str](), list[str]()
    root = tmp_path / "results"
    noting = told(tmp_path / "acks")

    def steady(folder: Path, key: str, *rest: Any) -> str:
        calm.append(key)
        return work(folder, key, *rest)

    run(tmp_path / "calm", jobs, steady)

    def jumping(folder: Path, key: str, *rest: Any) -> str:
        clock.ahead += jump / len(jobs)
        order.append(key)
        return noting(folder, key, *rest)

    counts = run(root, jobs, jumping)
    assert order == calm
    assert counts == {"started": 8, "ok": 8}
    assert contents(root) == contents(tmp_path / "calm")
    assert leaderboard(root) == leaderboard(tmp_path / "calm")
    assert run(root, jobs) == {"skipped": 8}


@pytest.mark.parametrize("jump", JUMPS)
def test_f20_a_lease_goes_by_the_clock_of_the_file_system(tmp_path: Path, clock: Clock, jump: float) -> None:
    store, job = Store(tmp_path / "results"), matrix(1)[0]
    store.prepare()
    store.add(job)
    held = claim(store, job.key)
    assert held is not None
    clock.ahead = jump
    assert claim(store, job.key) is None
    assert held.beat()
    assert held.path.stat().st_mtime < clock.real() + STALE
    held.release()
    again = claim(store, job.key)
    assert again is not None
    again.release()


@pytest.mark.parametrize("tears", [20, pytest.param(TORN, marks=pytest.mark.fault)])
def test_f26_a_torn_line_swallows_no_other(tmp_path: Path, tears: int) -> None:
    """Whole lines, one cut anywhere (within a character too, or only its end lost), then three more."""
    draw = random.Random(0)
    for number in range(tears):
        path, good = tmp_path / f"{number}.jsonl", draw.randint(0, 4)
        lines = [
            json.dumps({"line": line, "text": "ü\u2028\U0001f600"}, ensure_ascii=False) for line in range(good + 4)
        ]
        whole, cut = "".join(f"{line}\n" for line in lines[:good]).encode(), lines[good].encode()
        path.write_bytes(whole + cut[: draw.randint(0, len(cut))])
        for line in lines[good + 1 :]:  # as a training does: the file is opened for each line
            with appending(path) as file:
                file.write(f"{line}\n")
        read = [line.decode(errors="replace") for line in path.read_bytes().split(b"\n")]
        assert [line for line in lines[:good] + lines[good + 1 :] if line not in read] == []
        assert read[-1] == ""
        assert len(read) <= len(lines) + 1


def test_f26_a_log_that_is_whole_or_absent_is_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    for text in ("one\n", "two\n"):
        with appending(path) as file:
            file.write(text)
    assert path.read_text() == "one\ntwo\n"
