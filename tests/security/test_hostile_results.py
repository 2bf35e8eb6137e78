"""One damaged or hostile job never stops a command: its file is named, and every other job is used as before."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import FLOOR, audited, evaluated, sound, trained
from fake_store import matrix, run
from harness import Bench

from bench.atomic import file_hash
from bench.jobs.verify import checked
from bench.planning.job import KEYS
from bench.records.leases import claim
from bench.records.store import IMAGES, JOB, RECORD, SAMPLES, Store, checksum

N = 40  # images of an evaluation
RESULTS = Path("results")
LOG, WEIGHTS = "train.jsonl", "weights-last.safetensors"
Damage = Callable[[Path], object]  # of the folder of a job
DEEP = "[" * 200_000 + "]" * 200_000


def forge(folder: Path, **values: Any) -> None:
    """Another record, of whatever files lie beside it and with the checksum that belongs to it."""
    record = {**json.loads((folder / RECORD).read_text()), **values}
    if "files" not in values:
        record["files"] = {name: file_hash(folder / name) for name in record["files"]}
    (folder / RECORD).write_text(json.dumps({**record, "checksum": checksum(record)}))


def field(**values: Any) -> Damage:
    return lambda folder: forge(folder, **values)


def number(text: str) -> Damage:
    """A number that `json.dumps` would not write, in a record whose checksum belongs to it."""

    def change(folder: Path) -> None:
        record = {**json.loads((folder / RECORD).read_text()), "retries": 7}
        record.pop("checksum")
        content = json.dumps(record, sort_keys=True).replace('"retries": 7', f'"retries": {text}')
        check = hashlib.sha256(content.encode()).hexdigest()[:16]
        (folder / RECORD).write_text(f'{content[:-1]}, "checksum": "{check}"}}')

    return change


def metrics(**values: Any) -> Damage:
    return lambda folder: forge(folder, metrics={**json.loads((folder / RECORD).read_text())["metrics"], **values})


def columns(**changed: Any) -> Damage:
    def change(folder: Path) -> None:
        held = {**dict(np.load(folder / SAMPLES)), **changed}
        np.savez(folder / SAMPLES, **{name: values for name, values in held.items() if values is not None})
        forge(folder)

    return change


def header(text: str) -> Damage:
    """samples.npz with one column of this header."""

    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / SAMPLES, "w") as file:
            head = f"{text}\n".encode()
            file.writestr("correct.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(N))
        forge(folder)

    return change


def bomb(folder: Path) -> None:
    """A column of 1 GiB and more in a file of 1 MB."""
    with zipfile.ZipFile(folder / SAMPLES, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("correct.npy", bytes(2**20))
    data = bytearray((folder / SAMPLES).read_bytes())
    for place, offset in ((data.index(b"PK\x03\x04"), 22), (data.index(b"PK\x01\x02"), 24)):
        data[place + offset : place + offset + 4] = (2**31).to_bytes(4, "little")
    (folder / SAMPLES).write_bytes(data)
    forge(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def pickled(name: str) -> Damage:
    def change(folder: Path) -> None:
        import pickle

        content = io.BytesIO()
        np.save(content, np.array([Evil()] * N, dtype=object))
        (folder / name).write_bytes(content.getvalue() if name == SAMPLES else pickle.dumps(Evil()))
        forge(folder, files={name: file_hash(folder / name)})

    return change


def other_job(**content: Any) -> Damage:
    """Another job, under the key that belongs to it and with a record that fits."""

    def change(folder: Path) -> None:
        job = json.loads((folder / JOB).read_text())
        what = {**job["what"], **content}
        text = json.dumps([KEYS, job["kind"], what, job["needs"]], sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        place = folder.rename(folder.parent / key)
        (place / JOB).write_text(json.dumps({**job, "what": what, "key": key}))
        forge(place, key=key)

    return change


def bound(path: Path) -> None:
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as end:
        os.chdir(path.parent)  # the address of a socket holds 108 bytes
        end.bind(path.name)
        os.chdir(here)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


ODD: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "socket": bound,
    "1 TB": sparse,
}


def odd(name: str, kind: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        ODD[kind](folder / name)

    return change


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def unfinished(*others: Damage) -> Damage:
    """A job that a process runs now."""

    def change(folder: Path) -> None:
        (folder / RECORD).unlink()
        for other in others:
            other(folder)
        claim(Store(folder.parent), folder.name)

    return change


def moved(folder: Path) -> None:
    shutil.move(folder, "elsewhere")
    folder.symlink_to(Path("elsewhere").absolute())


def attack(name: str, **settings: Any) -> Damage:
    return other_job(attack={"name": name, "set": settings, "revision": 1})


def threat(norm: Any, eps: Any) -> Damage:
    return other_job(threat={"norm": norm, "eps": eps})


EVERY = [(name, kind) for name in (RECORD, JOB, SAMPLES) for kind in ODD]
EVERY += [(name, "FIFO") for name in (LOG, "log.txt", "progress.json", "attempts.json", "retries.json", IMAGES)]
EVERY += [("lease-000001.json", kind) for kind in ("FIFO", "folder", "link")]
EVALUATION: dict[str, Damage] = {
    **{f"{kind} {name}": odd(name, kind) for name, kind in EVERY},
    "deep record": text(RECORD, DEEP),
    "deep job": text(JOB, DEEP),
    "deep objects": text(RECORD, '{"a":' * 900 + "1" + "}" * 900),
    "link in place of the folder": moved,
    "file in place of the folder": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "state is a list": field(state=["done"]),
    "state is unknown": field(state="fine"),
    "metrics are a list": field(metrics=[1]),
    "seconds are text": metrics(attack_seconds="x"),
    "seconds are huge": metrics(attack_seconds=1e308, forwards_per_image=1e308),
    "time is huge": field(time={"started": "x", "seconds": 1e308}),
    "n is negative": metrics(n=-1),
    "integer of 5000 digits": number("1" * 5000),
    "integer of 400 digits": number("1" * 400),
    "NaN": number("NaN"),
    "1e999": number("1e999"),
    "half a surrogate pair": field(reason="\ud800"),
    "kind of another job": field(kind="audit"),
    "file elsewhere": field(files={"../../x": "0" * 64}),
    "zip bomb": bomb,
    "pickle": pickled(SAMPLES),
    "pickle as images": pickled(IMAGES),
    "deep header": header("(" * 9000),
    "long header": header("-" * 9000 + "1"),
    "open header": header("{'descr': '''"),
    "negative shape": header(f"{{'descr': '|b1', 'fortran_order': False, 'shape': (-{N},), }}"),
    "huge shape": header("{'descr': '|b1', 'fortran_order': False, 'shape': (99999999999999999999,), }"),
    "empty type": header(f"{{'descr': '|V0', 'fortran_order': False, 'shape': ({N},), }}"),
    "no outcomes": columns(correct=None),
    "outcomes in two dimensions": columns(correct=np.ones((N, 2), bool)),
    "outcomes are text": columns(correct=np.array(["a"] * N)),
    "columns of two lengths": columns(correct=np.ones(3, bool)),
    "no images": columns(correct=np.zeros(0, bool), index=np.zeros(0, int)),
    "images out of range": columns(index=np.arange(N) * 10**15),
    "negative images": columns(index=-np.arange(N)),
    "images are NaN": columns(index=np.full(N, np.nan)),
    "n is text": other_job(n="x"),
    "n is zero": other_job(n=0),
    "n is huge": other_job(n=10**15),
    "seed is a list": other_job(seed=[1]),
    "weights elsewhere": other_job(weights="../../x"),
    "eps is a word": threat("Linf", "abc"),
    "eps divides by zero": threat("Linf", "1/0"),
    "norm is a number": threat(5, "0.1"),
    "norm is unknown": threat("L7", "0.1"),
    "attack is text": other_job(attack="x"),
    "name is a list": other_job(attack={"name": ["x"], "set": {}, "revision": 1}),
    "name of control characters": attack("\x1b[2J<script>", **{"\x1b]0;": 1}),
    "budgets are a number": attack("curve", budgets=5),
    "budgets are words": attack("curve", budgets=["a"]),
    "settings of other types": attack("pgd", steps="x", restarts=[1], eot={}, loss=[1]),
    "draws are a number": attack("eot", draws=5),
    "draws are words": attack("eot", draws=["a", 1]),
    "progress is deep": unfinished(text("progress.json", DEEP)),
    "progress of other types": unfinished(
        text("progress.json", '{"share": "x", "began": [1], "device": ["a"], "epochs": 5}')
    ),
    "progress is huge": unfinished(
        text("progress.json", '{"share": 1e-300, "began": -1e308, "now": 1e308, "device": "cpu", "earlier": 1e308}')
    ),
    "lease of other types": text("lease-000001.json", '{"token": 5, "machine": [], "pid": 99999999999, "began": {}}'),
    "FIFO among the blocks": lambda folder: (
        (folder / RECORD).unlink(),
        (folder / "blocks").mkdir(),
        os.mkfifo(folder / "blocks" / "block-000000.safetensors"),
    ),
}
TRAINING: dict[str, Damage] = {
    **{f"training: {kind} {name}": odd(name, kind) for name in (RECORD, JOB) for kind in ("FIFO", "folder", "1 TB")},
    "training: FIFO among the logs": odd(LOG, "FIFO"),
    "training: deep log": text(LOG, f'{DEEP}\n{{"epoch": 1, "total": {"9" * 400}}}\n[]\n{{"epoch": "x"}}'),
    "training: seconds are text": metrics(train_seconds="x"),
    "training: seconds are huge": metrics(train_seconds=1e308, seconds_per_epoch=1e308, inference_ms_per_image=1e308),
    "training: seconds are zero": metrics(train_seconds=0.0, seconds_per_epoch=0.0, inference_ms_per_image=0.0),
    "training: seconds are negative": metrics(train_seconds=-1.0, inference_ms_per_image=-1.0, parameters=-5),
    "training: predictor is unknown": metrics(deploys="oracle"),
    "training: no settings": other_job(train={}),
    "training: epochs are text": other_job(train={"epochs": "x"}),
    "training: epochs are huge": other_job(train={"epochs": 10**18}),
    "training: data set is a number": other_job(data={"name": 5, "train": 1, "validation": 0, "size": 8}),
    "training: base is a number": other_job(defense={"name": "victim", "set": {"base": 5}, "revision": 1}),
    "training: threat without eps": other_job(threat={"norm": "Linf"}),
}
AUDIT: dict[str, Damage] = {
    "audit: findings are text": metrics(findings="x"),
    "audit: finding of no check": metrics(findings=[{"code": "C999", "level": "X", "eps": "abc", "attack": 5}]),
    "audit: finding without a check": metrics(findings=[{"code": "C999", "level": "X"}]),
    "audit: eps is a word": metrics(findings=[{"code": "C1", "level": "F", "eps": "abc"}]),
    "audit: zip bomb": bomb,
    "audit: no columns": columns(index=None),
    "audit: outcomes are text": columns(index=np.array(["a"])),
    "audit: level is unknown": other_job(level="deep"),
    "audit: threats are a number": other_job(threats=5),
}
DAMAGES = {**EVALUATION, **TRAINING, **AUDIT}
COMMANDS = {
    "verify": 4,
    "leaderboard": 0,
    "status": 0,
    "status --json": 0,
    "report --no-images": 0,
    "compare pgd_at trades": 0,
    "timing": 0,
    "plan --defense pgd_at --attack clean,pgd --n 40": 0,
    "merge results --results-dir into": 1,
    "retry --failed": 0,
    "gc": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound methods, and for each damage a method with one training, evaluations and an audit."""
    store = Store(tmp_path_factory.mktemp("whole") / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        store.prepare()
        for name in ("pgd_at", "trades"):
            sound(store, name=name)
        for number in range(len(DAMAGES)):
            train = trained(store, f"victim{number}")
            evaluated(store, train, "clean", [1] * N)
            evaluated(store, train, "pgd", [1] * 30 + [0] * 10, FLOOR)
            audited(store, train)
    return store.root


def damaged(whole: Path) -> None:
    """A copy of the folder, in which every method but the two has its damage."""
    shutil.copytree(whole, RESULTS)
    jobs = Store(RESULTS).jobs().values()
    names = {job.key: job.defense.name for job in jobs if job.kind == "train"}
    keys = {(names[job.model_key], job.kind): job.key for job in jobs if job.kind != "evaluate" or job.threat}
    for number, (name, damage) in enumerate(DAMAGES.items()):
        kind = "train" if name in TRAINING else "audit" if name in AUDIT else "evaluate"
        damage(RESULTS / keys[f"victim{number}", kind])


def regular(root: Path) -> dict[str, bytes]:
    """Every small regular file of the jobs."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in sorted(root.iterdir())
        if len(folder.name) == 12 and not folder.is_symlink() and folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_and_passes_over_every_damage(command: str, whole: Path, bench: Bench) -> None:
    damaged(whole)
    lines, before = Store(RESULTS).damages(), regular(RESULTS)
    outcome = bench(*command.split())
    assert (outcome.code, "Traceback" in outcome.err) == (COMMANDS[command], False), outcome.err
    assert not Path("pwned").exists()
    if command == "verify":
        problems = checked(Store(RESULTS)).problems
        assert all(any(line.removeprefix("results/")[:12] in problem for problem in problems) for line in lines)
    elif command.startswith("merge"):
        assert all(line.removeprefix("results/")[:12] in outcome.out for line in lines)
        assert not Path("into").exists()
    else:
        assert all(f"warning: {line}\n" in outcome.err for line in lines)
    if command == "compare pgd_at trades":
        assert outcome.out == bench(*command.split(), "--results-dir", whole).out
    if command == "leaderboard":
        tables = "".join(path.read_text() for path in RESULTS.glob("tables/*.csv"))
        assert {"pgd_at", "trades"} <= set(re.findall(r"\w+", tables))
    if not command.startswith("retry"):
        assert regular(RESULTS) == before


JOBS = matrix(1, 3)
BROKEN = [
    name
    for name in EVALUATION
    if not re.match("progress|n is|seed|weights|eps|norm|attack|name|budgets|settings|draws", name)
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_sets_the_damage_aside_and_does_the_job_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run(RESULTS, JOBS)
    expected = outcomes(RESULTS)
    EVALUATION[name](RESULTS / JOBS[2].key)
    damage = Store(RESULTS).damages()
    run(RESULTS, JOBS)
    store = Store(RESULTS)
    assert store.damages() == []
    assert all(store.done(job.key) for job in JOBS)
    if damage:
        assert outcomes(RESULTS) == expected
        assert {one["key"] for one in store.quarantined()} == {JOBS[2].key}


def outcomes(root: Path) -> dict[str, object]:
    return {job.key: (record.state, record.files) for job, record in Store(root).records()}
