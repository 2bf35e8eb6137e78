"""Are the minima of rat flatter than those of TRADES, and does it matter: loss around the weights beside AutoAttack.

python docs/figures/flatness.py [RESULTS] writes docs/findings/flatness.md and draws docs/findings/flatness.png from the
run of specs/questions/flatness.yaml.
"""

from __future__ import annotations

import numpy as np
from question import Question, bars, clean, figure, robust, versus

from bench.planning.job import EvaluateJob
from bench.records.store import Store

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
    asked = Question("flatness")
    around = {
        job.needs[0]: job.key for job in asked.jobs if isinstance(job, EvaluateJob) and job.attack.name == "flatness"
    }
    rises = [risen(asked.store, around[row.provenance.train_key]) for row in asked.rows]
    base = next(row for row in asked.rows if row.method.startswith(BASE))
    header = ["", "Method", "Clean", "Robust", "Verdict", f"minus {BASE}", "Work, F", *RISES.values()]
    lines = [
        [
            str(k), row.method, clean(row), robust(row), row.verdict, versus(row, base), f"{row.cost.train_work:.0f}",
            *("{:.3f} ±{:.3f}".format(*rise) for rise in own.values()),
        ]
        for k, (row, own) in enumerate(zip(asked.rows, rises, strict=True), start=1)
    ]  # fmt: skip
    asked.write(HEAD, header, lines)
    draw(asked, [own["adversarial_rise"][0] for own in rises])


def risen(store: Store, key: str) -> dict[str, tuple[float, float]]:
    """Each of RISES in an evaluation: its mean over the images, and half its 95 % interval."""
    of = store.samples(key)
    far = of["adversarial_loss_0.25"].mean(axis=1) - of["adversarial_loss"]
    columns = {name: of.get(name, far) for name in RISES}
    return {name: (float(c.mean()), 1.96 * float(c.std(ddof=1)) / np.sqrt(len(c))) for name, c in columns.items()}


def draw(asked: Question, rises: list[float]) -> None:
    """Robust accuracy against the rise of the adversarial loss at the worst weights; numbers are lines of the table."""
    drawing, ((axes,),) = figure(9, 4.6)
    for number, (row, rise) in enumerate(zip(asked.rows, rises, strict=True), start=1):
        if row.defense == OUTLIER:  # far from all others in both
            continue
        mean, reach = bars(row)
        axes.errorbar(rise, mean, yerr=reach, fmt="o", capsize=2)
        axes.annotate(str(number), (rise, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    names = "\n".join(f"{number}  {row.method}" for number, row in enumerate(asked.rows, start=1))
    axes.text(1.02, 1.0, names, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.3)
    axes.set(xlabel="rise of the adversarial loss at the worst weights", ylabel="robust accuracy [%]", xlim=(0, None))
    axes.set_title(f"robust accuracy against sharpness; bars: 95 %; {OUTLIER} is far outside", fontsize=9)
    axes.grid(alpha=0.3)
    asked.save(drawing)


if __name__ == "__main__":
    main()
