"""The log of a running training: read back, in the live view, and in the tracker."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import train_job, trained
from harness import Bench, outcomes, tiny, write_plugins
from rich.console import Console

from bench.executors.base import Event
from bench.planning.job import TrainJob
from bench.progress import tracker
from bench.progress.live import View
from bench.records import training_log as curves
from bench.records.store import Store


def logged(store: Store, key: str, *lines: object) -> Path:
    path = store.folder(key) / curves.LOG
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_an_incomplete_last_line_of_a_log_is_ignored(tmp_path: Path) -> None:
    key = "0" * 12
    path = tmp_path / key / curves.LOG
    assert curves.read(Store(tmp_path), key) == []
    path.parent.mkdir()
    path.write_text(
        '{"epoch": 1, "ce": 0.5, "name": "x", "flag": true, "gone": null}\n[1]\n{"ce": 2}\n'
        '{"epoch": 2, "ce": NaN, "adv": 1e999}\n{"epoch": 3, "ce": 0.2'
    )
    assert curves.read(Store(tmp_path), key) == [{"epoch": 1.0, "ce": 0.5}, {"epoch": 2.0}]


def test_the_loss_is_the_sum_of_all_terms_or_nan() -> None:
    line = {"epoch": 1.0, "ce": 0.5, "kl": 0.25, "sigma": 9.0}
    assert curves.total(line, ("ce", "kl")) == 0.75
    assert curves.total({**line, "total": 3.0}, ("ce", "kl")) == 3.0
    assert math.isnan(curves.total(line, ("ce", "penalty")))
    assert math.isnan(curves.total(line))


def test_bars_go_from_the_lowest_to_the_highest() -> None:
    assert curves.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert curves.sparkline([5, math.nan, 1]) == "█ ▁"
    assert curves.sparkline([2, 2]) == "▁▁"
    assert curves.sparkline([math.nan]) == curves.sparkline([]) == ""
    assert curves.sparkline([9, *range(12)]) == curves.sparkline(list(range(12)))


def test_the_live_view_shows_the_finished_epochs(store: Store) -> None:
    job, other = train_job("guard", 0), train_job("slow", 1)
    for one in (job, other):
        store.add(one)
    file = io.StringIO()
    view = View(Console(file=file, width=200, color_system=None), store, [job, other], "quiet", 2)
    view.follow(iter([Event("started", job), Event("started", other)]))
    lines = [{"epoch": k + 1, "total": loss, "validation": v} for k, (loss, v) in enumerate([(2.0, 0.2), (0.5, 0.9)])]
    logged(store, job.key, *lines, '{"epoch": 3, "to')
    view.console.print(view._table())
    assert "loss █▁ 0.5" in file.getvalue()
    assert "val ▁█ 90.0%" in file.getvalue()
    assert file.getvalue().count("loss") == 1  # the other has no epoch yet


def test_a_training_writes_the_sum_of_its_terms(bench: Bench, tmp_path: Path) -> None:
    outcome = bench(*tiny(defense="rat", attack="clean"), "--eps", "0.1", "--executor", "debug")
    assert outcome.code == 0, outcome.err
    results = Store(Path("results"))
    ((key, record),) = [(job.key, r) for job, r in results.records() if job.kind == "train"]
    (line,) = curves.read(results, key)
    terms = record.metrics.final_terms
    assert len(terms) > 1
    assert line["total"] == pytest.approx(sum(terms.values()), rel=1e-6)
    assert curves.total({k: v for k, v in line.items() if k != "total"}, terms) == pytest.approx(line["total"])


def test_an_unknown_or_missing_tracker_is_an_error_of_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = write_plugins(tmp_path)
    refusal = bench(*tiny(*plugins), "--tracker", "abacus")
    assert (refusal.code, refusal.err.count("\n")) == (2, 1)
    assert "'abacus'; expected tensorboard" in refusal.err
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    absent = bench(*tiny(*plugins), "--tracker", "tensorboard")
    assert (absent.code, absent.err.count("\n")) == (3, 1)
    assert 'pip install "defense-bench[tensorboard]"' in absent.err
    assert not Path("results").exists()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event as Record

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for raw in RawEventFileLoader(str(path)).Load():
            record = Record.FromString(raw)
            for value in record.summary.value:
                found.setdefault(value.tag, []).append((record.step, value.simple_value))
    return found


@pytest.mark.slow  # with the tests that `make test-full` runs, after CI has installed the extra
def test_tensorboard_gets_the_numbers_of_the_log_and_keys_do_not_depend_on_it(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard on this machine")
    plugins = write_plugins(tmp_path)
    plain = [*tiny(*plugins, attack="clean"), "--epochs", 3]
    assert bench(*plain, "--results-dir", "without").code == 0
    outcome = bench(*plain, "--tracker", "tensorboard")
    assert outcome.code == 0, outcome.err
    assert outcomes(Path("results")) == outcomes(Path("without"))
    results = Store(Path("results"))
    assert results.keys() == Store(Path("without")).keys()
    (job,) = [job for job in results.jobs().values() if job.kind == "train"]
    (folder,) = (results.root / tracker.FOLDER).iterdir()
    assert folder.name == f"plain-seed-0-{job.key}"
    log = curves.read(results, job.key)
    told = scalars(folder)
    assert set(told) == {"ce", "loss", "seconds"}
    assert told["ce"] == [(k + 1, pytest.approx(line["ce"], rel=1e-6)) for k, line in enumerate(log)]
    assert [step for step, _ in told["loss"]] == [1, 2, 3]
    bench(*plain, "--tracker", "tensorboard")  # nothing is trained again, nor told twice
    assert scalars(folder) == told
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    bench(*plain, "--tracker", "tensorboard")
    assert scalars(folder) == told


@pytest.mark.slow
def test_the_scalars_of_a_restarted_training_are_written_again(store: Store) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard on this machine")
    job = trained(store, "Guard <b>/../x")
    logged(store, job.key, {"epoch": 1, "total": 4.0})
    follower = tracker.tracker("tensorboard", store)
    assert follower is not None

    def events() -> object:
        yield Event("started", job)
        logged(store, job.key, {"epoch": 1, "total": 4.0}, {"epoch": 2, "total": 3.0})
        follower.last = 0.0
        yield Event("tick")
        yield Event("retried", job)
        logged(store, job.key, {"epoch": 1, "total": 2.0})
        yield Event("started", job)
        follower.last = 0.0
        yield Event("tick")
        logged(store, job.key, {"epoch": 1, "total": 2.0}, {"epoch": 2, "total": 1.0})
        yield Event("error", job)

    seen = [event.kind for event in follower.follow(events())]  # type: ignore[arg-type]
    assert seen == ["started", "tick", "retried", "started", "tick", "error"]
    folder = follower.folder(job)
    assert folder.parent == store.root / tracker.FOLDER
    assert scalars(folder) == {"loss": [(1, 2.0), (2, 1.0)]}  # each once


def test_a_tracker_that_fails_is_named_once_and_stops_no_job(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    job = trained(store, "guard")
    follower = tracker.TensorBoard(store)
    (store.root / tracker.FOLDER).write_text("a file where the folder should be")
    sent = [Event("started", job), Event("ok", job), Event("tick"), Event("started", job)]
    assert list(follower.follow(iter(sent))) == sent
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("warning: --tracker tensorboard failed and gets nothing more (")


def wandb_scalars(root: Path, job: Any) -> dict[str, list[tuple[int, float]]]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at the end of a process: until then its service may hold the last lines

    (folder,) = root.glob(f"wandb/offline-run-*-{job.key}")
    data, found = (folder / f"run-{job.key}.wandb").read_bytes(), dict[str, list[tuple[int, float]]]()
    assert (data[:4], len(data) < 32768) == (b":W&B", True)  # one block of LevelDB's log format
    at = 7
    while at < len(data):  # checksum of 4 bytes, length of 2, kind (1: a whole record), record
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1
        record = Record.FromString(data[at + 7 : at + 7 + length])
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in [name for name in items if not name.startswith("_")]:
            found.setdefault(name, []).append((items["_step"], items[name]))
        at += 7 + length
    return found


def mlflow_scalars(root: Path, job: Any) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with sqlite3.connect(root / "mlflow.db") as base:
        query = """select m.key, m.step, m.value from metrics m join tags t on t.run_uuid = m.run_uuid
            join runs r on r.run_uuid = m.run_uuid
            where t.key = 'bench.key' and t.value = ? and r.lifecycle_stage = 'active' order by m.step"""
        for name, step, value in base.execute(query, (job.key,)):
            found.setdefault(name, []).append((step, value))
    base.close()
    return found


READERS = {"wandb": wandb_scalars, "mlflow": mlflow_scalars}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_wandb_and_mlflow_get_the_numbers_of_the_log_offline(
    name: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"no {name} on this machine")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    plain = [*tiny(*write_plugins(tmp_path), attack="clean"), "--epochs", 3]
    outcome = bench(*plain, "--tracker", name)
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    results = Store(Path("results"))
    (job,) = [job for job in results.jobs().values() if isinstance(job, TrainJob)]
    told, log = READERS[name](results.root, job), curves.read(results, job.key)
    assert set(told) == {"ce", "loss", "seconds"}
    assert told["ce"] == [(k + 1, pytest.approx(line["ce"])) for k, line in enumerate(log)]
    bench(*plain, "--tracker", name)  # nothing is trained again, nor told twice
    assert READERS[name](results.root, job) == told
    follower = tracker.tracker(name, results)
    assert follower is not None
    assert list(follower.follow(iter([Event("started", job), Event("ok", job)])))  # as after a restart
    assert READERS[name](results.root, job) == told
