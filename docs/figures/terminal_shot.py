"""Picture of a terminal of 80 columns for docs/: `python docs/figures/terminal_shot.py` runs README's first command.

Writes docs/terminal.svg: the command as it prints when it is typed again, with all jobs done.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile

from records import DOCS, ROOT
from rich.console import Console
from rich.text import Text

COMMAND = ["run", "--defense", "noisy", "--eps", "8/255"]
WIDTH = 80


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _typed(folder)
        plan, devices, rest = _typed(folder).partition("devices   cpu\r\n")
    printed = plan + devices + rest[rest.index("┏") :]  # without the lines that are drawn and erased in between
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"$ bench {' '.join(COMMAND)}"))
    console.print(Text.from_ansi(printed.replace("\r\n", "\n")))
    picture = console.export_svg(title="bench")
    # a page of documentation loads nothing from elsewhere
    (DOCS / "terminal.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S), encoding="utf-8")


def _typed(folder: str) -> str:
    """What the command prints on a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    words = [sys.executable, "-m", "bench", *COMMAND]
    running = subprocess.Popen(words, cwd=folder, env=environment, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    running.wait()
    os.close(ours)
    return b"".join(parts).decode()


if __name__ == "__main__":
    main()
