"""Outputs on a pseudo-terminal: what a user's terminal receives, byte by byte."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from itertools import pairwise
from pathlib import Path

import pytest

RUN = (
    # trainings of a second or more, as the table is drawn four times a second
    *("run", "--defense", "standard,logit_squeezing", "--attack", "clean,fgsm", "--n", "20", "--epochs", "30"),
    *("--checks", "off", "--device", "cpu"),
)


def output(
    words: tuple[str, ...], folder: Path, term: str, columns: int, stop: str = "", code: int = 0, **variables: str
) -> str:
    """All that `bench` writes to a terminal of this kind and width. Ctrl-C is typed once `stop` is to be read there."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        stdin=side, stdout=side, stderr=side, cwd=folder, env={**environment, "TERM": term, **variables},
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
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
        if stop and re.search(stop, b"".join(parts).decode(errors="replace")):
            os.write(main, b"\x03")
            stop = ""
    os.close(main)
    assert process.wait() == code
    return b"".join(parts).decode()


def plain(text: str) -> list[str]:
    """Lines without what steers the terminal."""
    found = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "\x1b" not in found
    return re.split(r"[\r\n]+", found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the results of a run of two defenses, seen on a terminal of 80 columns: `run.txt`."""
    path = tmp_path_factory.mktemp("terminal")
    (path / "run.txt").write_text(output(RUN, path, "xterm-256color", 80), newline="")
    return path


def test_the_live_table_is_drawn_and_removed(folder: Path) -> None:
    text = (folder / "run.txt").read_bytes().decode()
    assert "\x1b[2K" in text  # the table is drawn over itself
    assert " [2K" not in text  # and not as letters
    lines = plain(text)
    assert max(map(len, lines)) <= 80
    order = ("^data ", "^devices ", "^time  |^checking models", "training standard seed 0", "^6 jobs run, 0 already")
    places = [next(place for place, line in enumerate(lines) if re.search(each, line)) for each in order]
    assert places == sorted(places)
    first = next(place for place, line in enumerate(lines) if re.match(r"\d of 6 jobs done; ", line))
    end = next(place for place in range(first, len(lines)) if lines[place].split()[:2] == ["job", "progress"])
    for line, after in pairwise(lines[first:end]):  # the heading is as wide as the terminal allows
        assert len(line.rstrip()) + len(after.split()[0]) >= 80
    assert "\x1b[35mNOT CHECKED" in text  # in color
    assert re.search(r"\x1b\[1m[\d.]+ ±", text)  # the best value


@pytest.mark.slow
@pytest.mark.parametrize(("term", "columns"), [("screen", 140), ("tmux-256color", 80), ("dumb", 80)])
def test_a_run_is_readable_on_every_terminal(tmp_path: Path, term: str, columns: int) -> None:
    text = output(RUN, tmp_path, term, columns)
    assert " [2K" not in text
    assert max(map(len, plain(text))) <= columns
    assert "6 jobs run" in text


OUTPUTS = {
    "status": ("status",), "compare": ("compare", "standard", "logit_squeezing"), "timing": ("timing",),
    "list": ("list", "defenses"), "one": ("list", "pgd_at"), "explain": ("explain",), "check": ("explain", "C28"),
    "leaderboard": ("leaderboard",), "plan": (RUN[0], *RUN[1:], "--dry-run"),
}  # fmt: skip
TERMINALS = [("xterm-256color", 80), ("screen", 140), ("tmux-256color", 80)]


@pytest.mark.parametrize(
    ("name", "term", "columns"),
    [
        pytest.param(name, *terminal, marks=[pytest.mark.slow] * (name not in ("compare", "plan") or place > 0))
        for name in OUTPUTS
        for place, terminal in enumerate(TERMINALS)
    ],
)
def test_an_output_fits_the_terminal(folder: Path, name: str, term: str, columns: int) -> None:
    text = output(OUTPUTS[name], folder, term, columns)
    lines = plain(text)
    assert not re.search(r"\[\d*[mK]", "".join(lines))  # no escape as letters
    assert max(map(len, lines)) <= columns
    assert any(line.strip() for line in lines)


def test_an_error_is_broken_between_words(tmp_path: Path) -> None:
    lines = plain(output(("run", "--defense", "nosy"), tmp_path, "xterm-256color", 80, code=2))
    told = " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= 80
    assert "Did you mean 'noisy'? Known: at_mixture, awp, crown_ibp, dual_margin, " in told
    assert all(line.startswith("  ") for line in lines[1:] if line)


def test_no_color_is_respected(folder: Path) -> None:
    text = output((*RUN, "-q"), folder, "xterm-256color", 80, NO_COLOR="1")
    assert "NOT CHECKED" in text
    assert not re.search(r"\x1b\[[0-9;]*3\dm", text)


@pytest.mark.slow
def test_ctrl_c_says_what_each_job_has_kept(tmp_path: Path) -> None:
    words = (*RUN, "--no-baseline", "--no-check", "--epochs", "2000")
    said = " ".join(plain(output(words, tmp_path, "xterm-256color", 80, stop="epoch [1-9]", code=130)))
    kept = r"training standard seed 0.*?: \d+ of 2000 epochs kept"
    assert re.search(kept, said), said[-500:]
    assert re.search("stopping: (1 job|2 jobs) may save", said)
    assert "Resume with:" in said
    assert re.search("stopped   " + kept, " ".join(plain(output(("status",), tmp_path, "xterm-256color", 80))))
