"""Plants one fault at a time into a temporary copy of the tree, runs the nearest tests there, and says which faults
they miss. The table is tests/fault_table.py.

    python tests/planted_faults.py                  # all of them; faults that were run before at this commit are kept
    python tests/planted_faults.py --only stats,awp # those whose file, texts or tests contain one of these words

A fault is found if a named test fails with it; each selection of tests must pass without a fault first. The record is
written after each fault, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fault_table import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "planted_faults.json"
COPIED = ("bench", "attacks", "defenses", "tests", "specs", "docs", "pyproject.toml", "README.md", "Makefile")
LIMIT = 900.0  # seconds for one selection of tests
# what the tests import and no fault changes: once for all of them, as a fork starts with it
PRELOADED = ("numpy", "torch._dynamo", "pandas", "pydantic", "typer", "rich.live", "scipy.stats", "pytest")
WORDS = {0: "survived", 1: "found"}  # by pytest's exit code; with any other one the tests did not run


class Task(NamedTuple):
    """A selection of tests, with a fault planted or with none, which must pass."""

    tests: str
    fault: Fault | None


def main() -> int:
    """Run the faults; returns 1 if one survived or could not be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="words, separated by commas, of which a fault must contain one")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the outcomes are kept")
    parser.add_argument("--sample", type=int, default=0, help="run this many of them, drawn at random")
    parser.add_argument("--keep", action="store_true", help="keep outcomes of other commits too")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    chosen = [fault for fault in FAULTS if not words or any(word in " ".join(fault) for word in words)]
    chosen = random.sample(chosen, options.sample) if options.sample else chosen
    commit = _commit()
    known = _known(options.record, None if options.keep else commit)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads do not survive a fork
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copies = [_copied(Path(folder, str(number))) for number in range(options.workers)]
        todo = [fault for fault in chosen if _id(fault) not in known]
        passing = _passing(list(dict.fromkeys(fault.tests for fault in todo)), copies)
        planted = [Task(fault.tests, fault) for fault in todo if fault.tests in passing]
        for task, code in _run(planted, copies):
            assert task.fault is not None
            outcome = {"outcome": WORDS.get(code, f"exit code {code}"), "commit": commit}
            known[_id(task.fault)] = {**task.fault._asdict(), **outcome}
            done = sum(_id(fault) in known for fault in chosen)
            print(f"[{done}/{len(chosen)}] {known[_id(task.fault)]['outcome']:9} {_title(task.fault)}", flush=True)
            _write(options.record, known)
    counts = Counter(known[_id(fault)]["outcome"] if _id(fault) in known else "not run" for fault in chosen)
    print(f"{counts['found']} of {len(chosen)} found")
    for fault in chosen:
        if known.get(_id(fault), {}).get("outcome") != "found":
            print(f"not found: {_title(fault)}  ({fault.tests})")
    return int(counts["found"] < len(chosen))


def _passing(selections: list[str], copies: list[Path]) -> set[str]:
    """The selections of tests that pass without a fault: all at once, and one by one if they do not."""
    together = [Task(" ".join(selections[k :: len(copies)]), None) for k in range(min(len(copies), len(selections)))]
    codes = [code for _, code in _run(together, copies)]
    if not any(codes):
        return set(selections)
    found = set()
    for task, code in _run([Task(selection, None) for selection in selections], copies):
        if code:
            print(f"without a fault: exit code {code} of {task.tests}", flush=True)
        else:
            found.add(task.tests)
    return found


def _title(fault: Fault) -> str:
    return f"{fault.file}: {' '.join(fault.old.split())!r} -> {' '.join(fault.new.split())!r}"


def _id(fault: Fault) -> str:
    return hashlib.sha256("\0".join(fault).encode()).hexdigest()[:12]


def _commit() -> str:
    """The commit of the tree, with a mark where bench, attacks, defenses or tests differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *COPIED[:4])
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _known(record: Path, commit: str | None) -> dict[str, dict[str, str]]:
    """The outcomes of faults by id that were run at this commit, or at any one."""
    entries = json.loads(record.read_text(encoding="utf-8"))["faults"] if record.is_file() else []
    kept = [entry for entry in entries if commit in (None, entry["commit"])]
    return {_id(Fault(*(entry[name] for name in Fault._fields))): entry for entry in kept}


def _write(record: Path, known: dict[str, dict[str, str]]) -> None:
    entries = [known[_id(fault)] for fault in FAULTS if _id(fault) in known]
    counts = Counter(entry["outcome"] for entry in entries)
    content = {"planted": len(entries), "found": counts["found"], "faults": entries}
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _copied(target: Path) -> Path:
    """A copy of the tree, compiled: unchanged files then load from caches that are checked by hash, not by time."""
    target.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z", *COPIED], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    compiled = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *COPIED[:4]]
    subprocess.run([sys.executable, *compiled], cwd=target, check=True)
    return target


def _run(tasks: list[Task], copies: list[Path]) -> Iterator[tuple[Task, int]]:
    """Each task with the exit code of its tests (-1 over the time limit), as they end; one at a time in each copy."""
    waiting, running = list(tasks), dict[int, tuple[Task, Path, float]]()
    while waiting or running:
        for copy in [copy for copy in copies if copy not in {held for _, held, _ in running.values()}]:
            if waiting:
                task = waiting.pop(0)
                running[_start(task, copy)] = task, copy, time.monotonic() + LIMIT
        time.sleep(0.05)
        for pid, (task, copy, until) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() < until:
                continue
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            if task.fault is not None:
                shutil.copy(ROOT / task.fault.file, copy / task.fault.file)
            yield task, os.waitstatus_to_exitcode(status) if ended else -1


def _start(task: Task, copy: Path) -> int:
    """Plant the fault and fork a process that runs the tests in the copy; returns its id, which is also its group's."""
    if task.fault is not None:
        path = copy / task.fault.file
        text = path.read_text(encoding="utf-8")
        if text.count(task.fault.old) != 1:
            raise ValueError(f"{_title(task.fault)}: the old text is there {text.count(task.fault.old)} times")
        path.write_text(text.replace(task.fault.old, task.fault.new), encoding="utf-8")
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(copy)
        log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        here = {str(ROOT), str(ROOT / "tests")}
        sys.path[:] = [str(copy), *(path for path in sys.path if path not in here)]
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        del sys.modules["fault_table"]
        code = int(
            importlib.import_module("pytest").main(["-x", "-p", "no:cacheprovider", "--timeout=0", *task.tests.split()])
        )
    finally:
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
