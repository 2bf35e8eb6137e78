"""Text for a person: counts, wrapped lines, and streams that cannot show a character or are closed."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Bench, states, tiny, write_plugins
from paths import ROOT

from bench.terminal import counted, wrapped

CLOSED = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'bench', 'list', 'models'])"


# Python's handler in the C locale is surrogateescape
@pytest.mark.parametrize(("encoding", "errors"), [("ascii", "surrogateescape"), ("latin-1", "strict")])
def test_characters_that_an_encoding_lacks_are_replaced(
    encoding: str, errors: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = io.BytesIO()
    words: list[tuple[object, ...]] = [("timing",), ("leaderboard",), ("compare", "plain", "plain"), ("status",)]
    words = [tuple(tiny(*write_plugins(tmp_path))), *words, ("list",), ("explain", "C15"), ("verify",)]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, errors=errors))
    codes = {each[0]: bench(*each).code for each in words}
    assert codes == dict.fromkeys(codes, 0)
    assert len(states(Path("results"))) == 3
    sys.stdout.flush()
    assert b" ?" in shown.getvalue()  # "× standard" and others


def test_a_closed_stream_shows_nothing_and_is_no_error() -> None:
    found = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(n, "job") for n in (0, 1, 2)] == ["0 jobs", "1 job", "2 jobs"]
    nouns = ("past record", "pass", "class", "batch", "query", "key", "epoch")
    assert [counted(2, noun) for noun in nouns] == [
        "2 past records", "2 passes", "2 classes", "2 batches", "2 queries", "2 keys", "2 epochs",
    ]  # fmt: skip
    assert (counted(0.5, "step"), counted(1_000_000, "byte")) == ("0.5 steps", "1000000 bytes")


def test_no_message_joins_a_count_of_its_own_to_a_plural() -> None:
    """`{len(found)} jobs` is wrong for one job; `counted` is right for all."""
    nouns = "jobs|records|evaluations|files|folders|epochs|slots|trainings|models|bytes|processes|keys|modules"
    found = re.compile(rf"(?<![/\w] )(?<!of )\{{(len\([^{{}}]+\)|count|size|total|missing|failed)\}} ({nouns})\b")
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "bench").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if found.search(line)
    ]
    # two shards or more, and a key that is ambiguous
    assert [line for line in lines if not line.startswith(("bench/records/maintenance.py", "bench/report/"))] == []


@pytest.mark.parametrize(
    ("line", "indent"),
    [
        ("data      digits, models mlp, cnn and vgg11, seeds 0", 10),
        ("time left about 4 s (2 s to 13 s), estimated from the cost model", 2),
        ("  noisy            (2 layers + 1)F    min CE under noise", 19),
        ("† worst case over 100 images, ranking needs 360 (all)", 2),
        ("    a line that is indented already, and long", 6),
    ],
)
def test_further_lines_are_indented_below_the_text(line: str, indent: int) -> None:
    first, *others = wrapped(line, 40).split("\n")
    assert others
    assert all(re.match(" *", other)[0] == " " * indent for other in others)  # type: ignore[index]
    assert max(map(len, (first, *others))) <= 40
    assert " ".join(wrapped(line, 40).split()) == " ".join(line.split())
    assert wrapped(line, None) == wrapped(line, len(line)) == line


def test_a_path_or_a_command_is_never_broken() -> None:
    path = "/a/folder-with-a-name/" + "long-" * 20
    assert path in wrapped(f"records   in {path} are new", 40).split()
