"""P9: the tables and the report of 10 000 evaluations of 10 000 images.

    python benchmarks/p9_tables.py                  # make the folder, measure, store, write docs/performance.md
    python benchmarks/p9_tables.py --folder FOLDER  # measure a folder that benchmarks/synthetic.py wrote
    python benchmarks/p9_tables.py --write-docs     # write the page again without measuring

`bench leaderboard` twice and `bench report` once, each as a separate process: wall time, CPU time (user and system) and
peak resident memory of the whole process. Gate: both leaderboards are the same bytes and hold every configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EVALUATIONS, IMAGES = 10_000, 10_000
TOOL = Path(sys.executable).with_name("bench")
Record = dict[str, Any]


def timed(*words: object) -> Record:
    """One command: seconds on the wall and on the CPU, peak memory in MB. Raises SystemExit where it fails."""
    began = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, str(TOOL), [str(TOOL), *map(str, words)])
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"bench {words[0]} failed with status {status}")
    unit = 1024 if sys.platform != "darwin" else 1024**2
    return {"wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / unit}


def measure(folder: Path) -> Record:
    import paired

    from bench.records.store import Store

    counts = {"train": 0, "evaluate": 0, "audit": 0}
    configs = set()
    for job in Store(folder).jobs().values():
        counts[job.kind] += 1
        if job.kind == "train":
            configs.add(str(sorted(job.without_seed().items())))
    record: Record = {**paired.conditions("p9_tables"), "clock": "wall", "jobs": counts}
    record |= {"images": IMAGES, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as place:
        board = Path(place) / "leaderboard.md"
        runs = []
        for _ in range(2):
            runs.append(timed("leaderboard", "--results-dir", folder, "--output", board) | {"text": board.read_bytes()})
        report = Path(place) / "report.html"
        record["report"] = timed("report", "--results-dir", folder, "--output", report)
        record["report"]["page_mb"] = report.stat().st_size / 2**20
    first, second = (run.pop("text") for run in runs)
    rows = sum(line.startswith(b"| ") for line in first.splitlines())
    if first != second or rows < len(configs):
        raise SystemExit("gate failed: the two leaderboards differ, or rows are missing")
    record["leaderboard"] = min(runs, key=lambda run: float(run["wall_s"]))
    return record


def written(record: Record) -> str:
    import paired

    lines = [
        [f"`bench {name}`", f"{one['cpu_s']:.1f}", f"{one['wall_s']:.1f}", f"{one['peak_mb']:.0f}"]
        for name in ("leaderboard", "report")
        for one in [record[name]]
    ]
    jobs, board, report = record["jobs"], record["leaderboard"], record["report"]
    bars = [
        ("leaderboard: seconds by the clock, at most 10", board["wall_s"], 10.0),
        ("leaderboard: peak memory in MB, at most 1000", board["peak_mb"], 1000.0),
        ("report: seconds by the clock, at most 60", report["wall_s"], 60.0),
    ]
    return (
        paired.heading(record)
        + paired.bar_table([{"bar": text, "value": value, "met": value <= most} for text, value, most in bars])
        + "\n"
        + paired.table(["command", "CPU s", "wall s", "peak MB"], lines)
        + f"\n{jobs['evaluate']} evaluations of {record['images']} images each, {jobs['train']} trainings and "
        f"{jobs['audit']} audits; the page has {record['report']['page_mb']:.1f} MB. Load average at the start: "
        f"{record['load_average']:.1f}; where this is above the number of cores, the wall time is that of a machine "
        "with other work to do.\n"
    )


def main() -> None:
    import paired

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="results that benchmarks/synthetic.py wrote")
    options.add_argument("--write-docs", action="store_true", help="measure nothing")
    asked = options.parse_args()
    if not asked.write_docs:
        with tempfile.TemporaryDirectory() as place:
            if asked.folder is None:
                import synthetic

                os.fsync = lambda descriptor: None  # type: ignore[assignment]  # no power fails here
                synthetic.write(Path(place) / "results", EVALUATIONS, IMAGES)
            paired.store(measure(asked.folder or Path(place) / "results"), "p9_tables.json")
    paired.write_docs("p9_tables", written)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
