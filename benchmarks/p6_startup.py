"""P6: the start of a command, compared with importing torch.

    python benchmarks/p6_startup.py                 # pass the gate, measure, store, write docs/performance.md
    python benchmarks/p6_startup.py --write-docs    # write the page again without measuring

CPU time (user and system) of whole processes: commands alternate with `python -c "import torch"` and with an empty
interpreter, ten times each, medians. Gate: no command imports torch, NumPy, SciPy or pandas.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMES = 10
HEAVY = ("torch", "numpy", "scipy", "pandas")
BENCH = [sys.executable, "-m", "bench"]
COMMANDS = {
    "an empty interpreter": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "bench --help": [*BENCH, "--help"],
    "bench list": [*BENCH, "list"],
    "bench status": [*BENCH, "status"],
    "bench run --dry-run": [*BENCH, "run", "--defense", "noisy", "--eps", "8/255", "--dry-run"],
    "bench plan specs/mnist.yaml": [*BENCH, "plan", str(ROOT / "specs" / "mnist.yaml")],
}
Record = dict[str, Any]


def cpu(command: list[str], folder: Path) -> float:
    """CPU seconds of one process in a folder. Raises SystemExit where it fails."""
    before = os.times()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def gate(folder: Path) -> None:
    """Refuse to time commands that import what they should not."""
    for name, command in COMMANDS.items():
        if name.startswith("bench"):
            told = subprocess.run(
                [command[0], "-X", "importtime", *command[1:]], cwd=folder, capture_output=True, text=True
            )
            found = [heavy for heavy in HEAVY if re.search(rf"\| +{heavy}$", told.stderr, re.MULTILINE)]
            if told.returncode or found or "bench.cli" not in told.stderr:
                raise SystemExit(f"gate failed: {name} imports {', '.join(found) or 'nothing: it failed'}")


def measure() -> Record:
    import paired

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run(
            [*BENCH, "run", "--dataset", "digits", "--defense", "standard", "--attack", "clean", "--epochs", "1", "-q"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        gate(folder)
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(TIMES):
            for name, command in COMMANDS.items():
                seconds[name].append(cpu(command, folder))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**paired.conditions("p6_startup"), "clock": "CPU time of the process", "times": TIMES, "seconds": medians}


def written(record: Record) -> str:
    import paired

    seconds = record["seconds"]
    slow, ours = seconds["import torch"], seconds["bench --help"]
    bars = [
        {"bar": "bench --help: CPU seconds, at most 0.15", "value": ours, "met": ours <= 0.15},
        {"bar": "import torch / bench --help, at least 10", "value": slow / ours, "met": slow / ours >= 10},
    ]
    lines = [[f"`{name}`", f"{value:.3f}", f"{slow / max(value, 1e-3):.1f}"] for name, value in seconds.items()]
    told = paired.table(["command", "CPU s", "import torch / command"], lines)
    return f"{paired.heading(record)}{paired.bar_table(bars)}\n{told}\nMedians of {record['times']} processes each.\n"


def main() -> None:
    import paired

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write-docs", action="store_true", help="measure nothing")
    if not options.parse_args().write_docs:
        paired.store(measure(), "p6_startup.json")
    paired.write_docs("p6_startup", written)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
