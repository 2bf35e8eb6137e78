"""Shared by all tests: one thread, a private cache, no results folder of the user's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Bench, Outcome

from bench import cli
from bench.planning import catalog
from bench.records.store import Store

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job, whose children would be deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("BENCH_RESULTS", raising=False)


@pytest.fixture
def seeded() -> None:
    """torch's generator at seed 0, for a module whose tests draw."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def mnist_root() -> Path:
    """The folder with real MNIST, where BENCH_DATA names one."""
    root = Path(os.environ.get("BENCH_DATA", ""))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("needs real MNIST: set BENCH_DATA to a folder in torchvision's layout")
    return root


@pytest.fixture
def fresh_catalog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plug-ins from outside, before and after: the catalog remembers files by name."""
    monkeypatch.delenv("BENCH_PLUGINS", raising=False)
    catalog.get.cache_clear()
    yield
    monkeypatch.undo()
    catalog.get.cache_clear()


@pytest.fixture
def bench(
    fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Bench]:
    """`bench("list", "defenses")` in this process, from an empty folder: exit code and both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENCH_DATA", raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Outcome:
        os.environ.pop("BENCH_PLUGINS", None)  # of the call before; monkeypatch would put it back after the test
        catalog.get.cache_clear()
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        code = stop.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)
    os.environ.pop("BENCH_PLUGINS", None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty results folder, without fsync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of small files; no power fails here
    store = Store(tmp_path / "results")
    store.prepare()
    return store
