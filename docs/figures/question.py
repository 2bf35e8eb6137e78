"""What the pages of specs/questions/ share: the rows of a question, their cells, and where the numbers come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from records import FINDINGS, ROOT

from bench.planning.job import Job, TrainJob
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.store import Store
from bench.results.rows import Row
from bench.results.significance import difference
from bench.tables.leaderboard import board
from bench.tables.markdown import table


class Question:
    """The rows of a spec of specs/questions/ whose worst case is known, in its order, and all its jobs. The records are
    those of the project, or of a folder that the command line names."""

    def __init__(self, name: str) -> None:
        self.name, self.store = name, Store(Path((*sys.argv[1:], ROOT / "results" / "questions")[0]))
        # of the data sets that the project knows, the planner needs no image
        self.jobs: list[Job] = plan(load(ROOT / "specs" / "questions" / f"{name}.yaml"), Path("no-data-needed"))
        order = {job.key: place for place, job in enumerate(self.jobs) if isinstance(job, TrainJob)}
        mine = [row for row in board(self.store) if row.provenance.train_key in order and row.accuracy.worst.values]
        self.rows = sorted(mine, key=lambda row: order[row.provenance.train_key])
        if not self.rows:
            raise SystemExit(f"no records of specs/questions/{name}.yaml in {self.store.root}; run it, then bench pack")

    def settings(self, row: Row) -> dict[str, Any]:
        """All settings of the row's defense."""
        job = self.store.job(row.provenance.train_key)
        assert isinstance(job, TrainJob)
        return job.defense.settings

    def write(self, head: str, header: list[str], lines: list[list[str]], tail: str = "") -> None:
        """Write the page: head, table, tail, and where the numbers come from."""
        worst, first = self.rows[0].accuracy.worst, self.rows[0]
        devices = sorted({row.provenance.device for row in self.rows})
        commits = sorted({commit for row in self.rows for commit in row.provenance.commit.split("; ")})
        seeds = sorted({seed for row in self.rows for seed in row.accuracy.worst.values})
        origin = (
            f"`bench run specs/questions/{self.name}.yaml`, records in `results/questions/`, page by `python "
            f"docs/figures/{self.name}.py`. {first.dataset}, {first.model}, {first.epochs} epochs, {first.norm} eps "
            f"{first.eps}, {worst.n} test images, training seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
            f"{'; '.join(devices)}, commits {', '.join(commits)}."
        )
        text = f"{head}\n{table(header, lines)}\n{tail}{origin}\n"
        (FINDINGS / f"{self.name}.md").write_text(text, encoding="utf-8")

    def save(self, figure: Any) -> None:
        """Write the figure of the page."""
        figure.tight_layout()
        figure.savefig(FINDINGS / f"{self.name}.png", dpi=110, metadata={"Software": None})


def figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure of panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=(width, height), squeeze=False)


def clean(row: Row) -> str:
    """Accuracy in percent without an attack."""
    return f"{100 * row.accuracy.clean.mean:.1f}"


def robust(row: Row) -> str:
    """The worst case in percent: the mean over the seeds, its interval over images, and the seeds' own values."""
    worst = row.accuracy.worst
    low, high = worst.interval()
    own = f"; seeds {', '.join(f'{100 * v:.1f}' for v in worst.values.values())}" if len(worst.values) > 1 else ""
    return f"{100 * worst.mean:.1f} ({100 * low:.1f} to {100 * high:.1f}{own})"


def bars(row: Row) -> tuple[float, list[list[float]]]:
    """The worst case in percent, and how far its interval reaches below and above, for matplotlib."""
    low, high = row.accuracy.worst.interval()
    mean = row.accuracy.worst.mean
    return 100 * mean, [[100 * max(mean - low, 0)], [100 * max(high - mean, 0)]]


def versus(row: Row, other: Row) -> str:
    """The paired difference of the worst cases in points, on the images and seeds that both have; empty for itself."""
    if row is other:
        return ""
    pair = difference(row.accuracy.robust, other.accuracy.robust)
    assert pair is not None
    return f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
