"""The streams of a command: none that cannot show a character, or is closed, changes what the command did."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Bench, states, tiny, write_plugins

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
