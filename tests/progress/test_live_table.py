"""The live table on a pseudo-terminal: what a user's terminal receives, byte by byte."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

RUN = (
    *("run", "--defense", "standard", "--no-baseline", "--attack", "clean", "--n", "20", "--epochs", "1"),
    *("--train-n", "200", "--checks", "off", "--device", "cpu"),
)


def output(words: tuple[str, ...], folder: Path, term: str, columns: int) -> str:
    """All that `bench` writes to a terminal of this kind and width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        stdin=side, stdout=side, stderr=side, cwd=folder, env={**environment, "TERM": term},
    )  # fmt: skip
    os.close(side)
    parts = []
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(main)
    assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("term", "columns"),
    [
        ("xterm-256color", 80),
        pytest.param("screen", 140, marks=pytest.mark.slow),
        pytest.param("tmux-256color", 80, marks=pytest.mark.slow),
    ],
)
def test_the_live_table_is_drawn_and_removed(tmp_path: Path, term: str, columns: int) -> None:
    text = output(RUN, tmp_path, term, columns)
    assert "\x1b[2K" in text  # the table is drawn over itself
    assert " [2K" not in text  # and not as letters
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\x1b" not in plain
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= columns
    assert "training" in plain
    assert re.search(r"2 jobs run", plain)
