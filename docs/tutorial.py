"""Run docs/tutorial.md: every file, edit and command in its order, in an empty folder.

    python docs/tutorial.py          # runs it; exit code 1 and the first difference where the page shows something else
    python docs/tutorial.py --write  # runs it and puts the real outputs into the page

A `console` block holds commands behind `$ ` and what they print. A fence below `<!-- file: PATH -->` is written to
PATH; a `diff` fence below `<!-- edit: PATH -->` is applied to it. Numbers, widths of tables, keys and the device may
differ from the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
_FENCE = re.compile(r"(?:<!-- (file|edit): (\S+) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Step(NamedTuple):
    """A `file` or `edit` of a path, or a `command` with what the page shows for it."""

    kind: str
    what: str
    text: str


def steps(page: str) -> list[Step]:
    """All that the page asks for, in order."""
    found: list[Step] = []
    for kind, path, language, body in _FENCE.findall(page):
        if kind:
            found.append(Step(kind, path, body))
        elif language == "console":
            parts = re.split(r"^\$ (.*)\n", body, flags=re.MULTILINE)[1:]
            found += [Step("command", *pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return found


def edited(text: str, diff: str) -> str:
    """`text` with a diff without line numbers applied. Raises ValueError where its lines are not there just once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    if text.count(old) != 1:
        raise ValueError(f"the lines to edit are there {text.count(old)} times, expected once")
    return text.replace(old, new)


def run(todo: list[Step], folder: Path) -> Iterator[tuple[Step, str, int]]:
    """Do each step in the folder; gives each command, what it printed (both streams) and its exit code."""
    kept = ""  # `export` lines hold for all commands that follow
    for step in todo:
        path = folder / step.what
        if step.kind == "file":
            path.write_text(step.text, encoding="utf-8")
        elif step.kind == "edit":
            path.write_text(edited(path.read_text(encoding="utf-8"), step.text), encoding="utf-8")
        else:
            done = subprocess.run(
                ["bash", "-c", kept + step.what],
                cwd=folder,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=900,
            )
            kept += f"{step.what}\n" if step.what.startswith("export ") else ""
            yield step, done.stdout, done.returncode


def environment() -> dict[str, str]:
    """This checkout and this Python's `bench`; nothing of the user's settings."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BENCH_")}
    paths = os.pathsep.join([str(Path(sys.executable).parent), plain.get("PATH", "")])
    return plain | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def masked(text: str) -> list[str]:
    """Lines without what may differ between machines: numbers, their signs and marks, spaces, widths, the device,
    the fronts that a row is on."""
    plain = re.sub(r"\b[0-9a-f]{12}\b", "#", text)
    plain = re.sub(r"(?<![\w.])<?[-+±]?\d+(\.\d+)?", "#", plain)
    plain = re.sub(r"(# h )?(# min )?# s\b", "# s", plain)
    plain = re.sub(r"(digits, mlp, (?:# training images, )?).*", r"\1DEVICE", plain)
    plain = re.sub(r"(?m)^devices .*", "devices DEVICE", plain)
    plain = re.sub(r"; Pareto fronts: [a-z, ]+", "", plain)  # they count seconds
    plain = re.sub(r" \*(?= )", "", re.sub(r"([━─])\1*", r"\1", plain))
    return [" ".join(line.split()) for line in plain.splitlines()]


def difference(shown: str, printed: str) -> str:
    """The first line in which the page and the truth differ but for `masked`, or nothing."""
    page, truth = masked(shown), masked(printed)
    for place in range(max(len(page), len(truth))):
        a, b = ((lines[place : place + 1] or ["nothing"])[0] for lines in (page, truth))
        if a != b:
            return f"the page shows '{a}', printed was '{b}'"
    return ""


def main(words: list[str]) -> int:
    """Run the page; write it or compare."""
    if words not in ([], ["--write"]):
        print("error: the only option is --write", file=sys.stderr)
        return 2
    page, place = PAGE.read_text(encoding="utf-8"), 0
    with tempfile.TemporaryDirectory() as folder:
        for step, printed, code in run(steps(page), Path(folder)):
            told = difference(step.text, printed)
            if code or (told and not words):
                print(f"$ {step.what}\n{printed if code else told}", file=sys.stderr)
                return 1
            place = page.index(f"$ {step.what}\n{step.text}", place) + len(f"$ {step.what}\n")
            page = page[:place] + (printed if words else step.text) + page[place + len(step.text) :]
    if words:
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
