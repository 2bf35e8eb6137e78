"""Do two revisions print the same numbers from the committed records? `python benchmarks/same_numbers.py REVISION`.

Runs leaderboard, timing, compare and report of REVISION and of this checkout, each on a copy of its own committed
records, and compares the numbers of every output: words may differ, numbers may not. Of CSV files and of the figures'
data each cell is compared, of other files the numbers in their order. Prints one line per file; exit code 1 if any
number differs.
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.#-])[-−+±≤]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")
COMPARED = (("2406598f7b61", "f47671c625d6"), ("c7340372d613", "f47671c625d6"))  # trainings of pgd_at on MNIST


def outputs(code: Path, folder: Path) -> dict[str, str]:
    """Every output of the code in a checkout, on a copy of its committed records, by the name of its file."""
    results = folder / "results"
    shutil.copytree(code / "results", results)
    env = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    printed: dict[str, str] = {}

    def bench(name: str, *words: object) -> None:
        command = [sys.executable, "-m", "bench", *map(str, words), "--results-dir", str(results)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
        printed[name] = done.stdout

    bench("", "leaderboard", "--output", folder / "leaderboard.md")
    bench("timing.json.txt", "timing", "--json")
    for a, b in COMPARED:
        bench(f"compare-{a}-{b}.txt", "compare", a, b, "--json")
    bench("", "report", "--output", folder / "report.html", "--figures", folder / "figures", "--no-images")
    files = [folder / "leaderboard.md", *sorted((results / "tables").iterdir()), *sorted(folder.glob("figures/*.csv"))]
    return {_name(path): path.read_text(encoding="utf-8") for path in files} | {k: v for k, v in printed.items() if k}


def _name(path: Path) -> str:
    """The name of a file; figures are named after section titles, whose spelling has changed."""
    return path.name.replace("randomised", "randomized")


def numbers(name: str, text: str) -> list[str]:
    """What is compared of a file: of CSV those of each cell, of other text each, in order."""
    if not name.endswith(".csv"):
        return NUMBER.findall(text)
    return [found for row in csv.reader(io.StringIO(text)) for cell in row for found in NUMBER.findall(cell)]


def main(revision: str) -> int:
    """Compare this checkout with a revision; gives the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(old), revision], cwd=ROOT, check=True)
        try:
            found = []
            for name, code in (("before", old), ("after", ROOT)):
                Path(folder, name).mkdir()
                found.append(outputs(code, Path(folder, name)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    before, after = found
    bad = 0
    for name in sorted(before | after):
        if name not in before or name not in after:
            print(f"{name}: only {'before' if name in before else 'after'}")
            bad += 1
            continue
        one, two = numbers(name, before[name]), numbers(name, after[name])
        moved = [line for line in difflib.unified_diff(one, two, lineterm="", n=0) if line[:1] in "+-"][2:]
        bad += bool(moved)
        print(f"{name}: {len(one)} numbers, {len(moved)} differ{': ' + ' '.join(moved[:12]) if moved else ''}")
    print(f"{len(before | after)} files, {bad} with differences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
