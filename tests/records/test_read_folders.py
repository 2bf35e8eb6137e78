"""A folder read once says what the store says, array by array, and never what the store would refuse."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import evaluated, trained

from bench.records.npz import Reader
from bench.records.store import Store
from bench.results.evaluations import frame
from bench.tables.leaderboard import write_leaderboard


def packed(compressed: bool = True, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


ARRAYS = {
    "index": np.arange(50), "label": np.arange(50) % 10, "correct": np.arange(50) % 3 == 0,
    "stage": np.full(50, -1, np.int8), "share": np.linspace(0, 1, 50, dtype=np.float32),
    "at": np.arange(100.0).reshape(50, 2), "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "none": np.zeros((0, 4)),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [True, False])
def test_columns_are_what_numpy_reads(compressed: bool) -> None:
    data = packed(compressed, **ARRAYS)
    found, others = Reader().unpack(data, None)
    assert others == frozenset()
    assert list(found) == list(ARRAYS)
    with np.load(io.BytesIO(data)) as expected:
        for name, values in found.items():
            assert (values.dtype, values.shape) == (expected[name].dtype, expected[name].shape)
            np.testing.assert_array_equal(values, expected[name])
            assert not values.flags.writeable


def test_what_is_not_asked_for_is_named_and_shared_columns_are_one_array() -> None:
    reader = Reader()
    first, others = reader.unpack(packed(**ARRAYS), ("index", "label", "correct"))
    assert others == frozenset(ARRAYS) - {"index", "label", "correct"}
    second, _ = reader.unpack(packed(**{**ARRAYS, "correct": ~ARRAYS["correct"]}), ("index", "label", "correct"))
    assert first["label"] is second["label"]
    assert (first["correct"] != second["correct"]).all()
    third, _ = reader.unpack(packed(**{**ARRAYS, "label": ARRAYS["label"][::-1]}), ("label",))
    np.testing.assert_array_equal(third["label"], ARRAYS["label"][::-1])


def test_damage_and_objects_are_refused() -> None:
    data = packed(correct=ARRAYS["correct"], index=ARRAYS["index"])
    turned = data[:120] + bytes([data[120] ^ 1]) + data[121:]  # within the first column
    stored = packed(False, correct=ARRAYS["correct"])
    place = stored.index(ARRAYS["correct"].tobytes())
    flipped = stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :]
    for bad in (b"", b"PK", data[:-1], turned, flipped, b"x" * 100, data[-22:]):
        with pytest.raises(ValueError, match=r"npz|damaged|NumPy"):
            Reader().unpack(bad, None)
    for values in (np.array([{}, []], dtype=object), np.array(["a"]), np.array(3.5), np.zeros(2, complex)):
        with pytest.raises(ValueError, match=r"Python objects|expected numbers, a row for each image"):
            Reader().unpack(packed(bad=values), None)


def test_every_way_of_asking_gives_what_the_store_gives(store: Store) -> None:
    columns = {"radius": np.array([0.5, 0.1, 0.0]), "mine": np.arange(3)}
    key = evaluated(store, trained(store), "certify", [1, 0, 1], columns=columns)
    for only in (None, ("correct",), ("correct", "radius"), ("mine",), ("correct", "mine"), ("nothing",)):
        for first in (None, ("correct",)):
            once = Store(store.root, read_only=True)
            once.samples(key, first)  # what was asked before changes nothing
            found, expected = once.samples(key, only), store.samples(key, only)
            assert found.keys() == expected.keys()
            assert all((found[name] == expected[name]).all() for name in found)
    assert once.job(key) == store.job(key)
    assert once.record(key) == store.record(key)


def test_a_file_is_read_once_and_a_new_reader_sees_what_changed(store: Store) -> None:
    key = evaluated(store, trained(store), "steep", [1, 0, 1])
    once = store.snapshot()
    assert once.snapshot() is once
    assert frame(once)["accuracy"].tolist() == [2 / 3]
    path = store.folder(key) / "samples.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert once.samples(key, ("correct",))["correct"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="does not match its record"):
        Store(store.root, read_only=True).samples(key, ("correct",))
    assert frame(Store(store.root, read_only=True))["state"].tolist() == ["unreadable"]


def test_columns_beyond_the_limit_are_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [evaluated(store, trained(store, seed=seed), "steep", [seed % 2] * 100) for seed in range(4)]
    monkeypatch.setattr("bench.records.npz._MOST", 250)  # two columns of 100 flags
    once = Store(store.root, read_only=True)
    for _ in range(2):
        assert [bool(once.samples(key, ("correct",))["correct"][0]) for key in keys] == [False, True, False, True]
    assert len(once._columns._held) == 2


def test_tables_read_each_file_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        train = trained(store, seed=seed)
        evaluated(store, train, "clean", [1, 1, 0])
        for eps in ("0.1", "0.2", "0.3"):
            evaluated(store, train, "steep", [1, 0, 0], eps=eps)
    read: dict[str, int] = {}
    own = os.open

    def counted(path: Any, *flags: Any, **more: Any) -> int:
        read[str(path)] = read.get(str(path), 0) + 1
        return own(path, *flags, **more)

    monkeypatch.setattr(os, "open", counted)
    write_leaderboard(store, tmp_path / "board.md", tmp_path)
    samples = {path: count for path, count in read.items() if path.endswith(f"{os.sep}samples.npz")}
    assert set(samples.values()) == {1}
    assert len(samples) == 8
