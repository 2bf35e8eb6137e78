"""Are the minima of rat flatter than those of TRADES, and does it matter: loss around the weights beside AutoAttack.

python docs/figures/flatness.py [RESULTS] writes docs/findings/flatness.md and draws docs/findings/flatness.png from the
run of specs/questions/flatness.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from records import FINDINGS, ROOT

from bench.planning.job import EvaluateJob, TrainJob
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.store import Store
from bench.results.rows import Row
from bench.results.significance import difference
from bench.tables.leaderboard import board
from bench.tables.markdown import table

SPEC = "specs/questions/flatness.yaml"
BASE, OUTLIER = "trades", "standard"
# mean rise of a loss from the weights to: the worst of a small ball, or random ones at a quarter of the weights' size
RISES = {
    "adversarial_rise": "adversarial rise, worst weights",
    "clean_rise": "clean rise, worst weights",
    "random": "adversarial rise, random directions",
}
HEAD = """# Are rat's minima flatter, and does it matter

The claim of `rat` (arXiv 2303.10653) is that training under random weights, expanded by Taylor, finds flatter minima
and that these are more robust. Measured by `flatness`: by how much the mean clean and adversarial loss rise at the
worst weights within 0.5 % of each layer's norm (what AWP trains against), and the adversarial loss along
filter-normalized random directions at distance 0.25; ± is half a 95 % interval over images. Lower is flatter. Robust is
the worst case over clean, PGD and AutoAttack (a screen of all images, the full suite on 300 of the survivors), with its
95 % interval. Differences are paired by image, in points, and hold for these nets, not for other seeds.

![robust accuracy against the rise of the loss](flatness.png)
"""


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results" / "questions"))
    # of the data sets that the project knows, the planner needs no image
    jobs = plan(load(ROOT / SPEC), Path("no-data-needed"))
    order = {job.key: place for place, job in enumerate(jobs) if isinstance(job, TrainJob)}
    found = sorted(board(store), key=lambda row: order[row.provenance.train_key])
    around = {job.needs[0]: job.key for job in jobs if isinstance(job, EvaluateJob) and job.attack.name == "flatness"}
    rises = [risen(store, around[row.provenance.train_key]) for row in found]
    base = next(row for row in found if row.method.startswith(BASE))
    header = ["", "Method", "Clean", "Robust", "Verdict", f"minus {BASE}", "Work, F", *RISES.values()]
    lines = [[str(k), *line(row, base, own)] for k, (row, own) in enumerate(zip(found, rises, strict=True), start=1)]
    worst, devices = found[0].accuracy.worst, sorted({row.provenance.device for row in found})
    commits = sorted({commit for row in found for commit in row.provenance.commit.split("; ")})
    origin = (
        f"`bench run {SPEC}`, records in `results/questions/`, page by `python docs/figures/flatness.py`. "
        f"{found[0].dataset}, {found[0].model}, {found[0].epochs} epochs, {found[0].norm} eps {found[0].eps}, "
        f"{worst.n} test images, training seed {', '.join(map(str, worst.values))}; {'; '.join(devices)}, commits "
        f"{', '.join(commits)}."
    )
    (FINDINGS / "flatness.md").write_text(f"{HEAD}\n{table(header, lines)}\n{origin}\n", encoding="utf-8")
    draw(found, [own["adversarial_rise"][0] for own in rises], FINDINGS / "flatness.png")


def risen(store: Store, key: str) -> dict[str, tuple[float, float]]:
    """Each of RISES in an evaluation: its mean over the images, and half its 95 % interval."""
    of = store.samples(key)
    far = of["adversarial_loss_0.25"].mean(axis=1) - of["adversarial_loss"]
    columns = {name: of.get(name, far) for name in RISES}
    return {name: (float(c.mean()), 1.96 * float(c.std(ddof=1)) / np.sqrt(len(c))) for name, c in columns.items()}


def line(row: Row, base: Row, rises: dict[str, tuple[float, float]]) -> list[str]:
    """The cells of a row."""
    low, high = row.accuracy.worst.interval()
    pair = difference(row.accuracy.robust, base.accuracy.robust)
    assert pair is not None
    gap = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    return [
        row.method, f"{100 * row.accuracy.clean.mean:.1f}",
        f"{100 * row.accuracy.worst.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})", row.verdict,
        "" if row is base else gap, f"{row.cost.train_work:.0f}",
        *("{:.3f} ±{:.3f}".format(*rise) for rise in rises.values()),
    ]  # fmt: skip


def draw(found: list[Row], rises: list[float], path: Path) -> None:
    """Robust accuracy against the rise of the adversarial loss at the worst weights; numbers are lines of the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.6))
    for number, (row, rise) in enumerate(zip(found, rises, strict=True), start=1):
        if row.defense == OUTLIER:  # far from all others in both
            continue
        low, high = row.accuracy.worst.interval()
        mean = row.accuracy.worst.mean
        axes.errorbar(rise, 100 * mean, yerr=[[100 * (mean - low)], [100 * (high - mean)]], fmt="o", capsize=2)
        axes.annotate(str(number), (rise, 100 * mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    names = "\n".join(f"{number}  {row.method}" for number, row in enumerate(found, start=1))
    axes.text(1.02, 1.0, names, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.3)
    axes.set(xlabel="rise of the adversarial loss at the worst weights", ylabel="robust accuracy [%]", xlim=(0, None))
    axes.set_title(f"robust accuracy against sharpness; bars: 95 %; {OUTLIER} is far outside", fontsize=9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
