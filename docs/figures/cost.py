"""What robustness costs, with adversarial examples and without: the rows of the MNIST leaderboard against their work.

python docs/figures/cost.py [RESULTS] writes docs/findings/cost.md and draws docs/findings/cost.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from records import FINDINGS, ROOT

from bench.records.store import Store
from bench.results.rows import Row
from bench.results.significance import difference
from bench.tables.leaderboard import board
from bench.tables.markdown import table

DATASET, EPS, REFERENCE = "mnist", "0.1", "pgd_at"
# trained on images alone, or on bounds and derivatives at them
WITHOUT = {
    "standard", "noisy", "noisy_sampled", "jacobian_penalty", "logit_squeezing", "dual_margin",
    "input_gradient_penalty", "ibp", "crown_ibp",
}  # fmt: skip
XTICKS, YTICKS = (25, 50, 100, 200), (4, 5, 7, 10, 20, 30, 50, 70, 100)
HEAD = """# What robustness costs, with adversarial examples and without

Written by `python docs/figures/cost.py` from the records in `results/` (`bench run specs/mnist.yaml`,
`specs/mnist_silu.yaml` and `specs/mnist_noisy.yaml`, rows of Linf eps {eps}): {images} test images, {seeds}, {epochs}
epochs of one shared recipe, the training's budget equal to that of the attack. Work is counted in forward passes F of
the net over the training images, for the whole training; it does not depend on the machine. Robust: the worst case over
clean, PGD and AutoAttack (a screen of all images, the full suite on 300 of the survivors), with its 95 % interval,
which contains both errors. The last column is the row minus `pgd_at` on the same net (lenet5 or its SiLU form) and the
same images, in points, with the 95 % interval of the paired difference; it holds for these nets, not for other seeds.

![robust accuracy against work](cost.png)
"""


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
    found = [row for row in board(store) if (row.dataset, row.norm, row.eps) == (DATASET, "Linf", EPS)]
    found = [row for row in found if row.deploys == "deterministic" and row.accuracy.worst.values]
    found.sort(key=lambda row: (-row.accuracy.worst.mean, row.method))
    seeds = sorted({seed for row in found for seed in row.accuracy.worst.values})
    facts = {
        "eps": EPS, "images": found[0].accuracy.worst.n, "epochs": found[0].epochs,
        "seeds": "seed" + "s" * (len(seeds) > 1) + " " + ", ".join(map(str, seeds)),
    }  # fmt: skip
    header = [
        "",
        "Method",
        "Net",
        "Adversarial examples",
        "Work, F",
        "Clean",
        "Robust",
        "Verdict",
        f"minus {REFERENCE}",
    ]
    lines = [[str(place), *line(row, reference(row, found))] for place, row in enumerate(found, start=1)]
    devices = sorted({row.provenance.device for row in found})
    commits = sorted({commit for row in found for commit in row.provenance.commit.split("; ")})
    origin = f"{'; '.join(devices)}, commits {', '.join(commits)}."
    text = f"{HEAD.format(**facts)}\n{table(header, lines)}\n{origin}\n"
    (FINDINGS / "cost.md").write_text(text, encoding="utf-8")
    draw(found, FINDINGS / "cost.png")


def without(row: Row) -> bool:
    """Was it trained without adversarial examples?"""
    return row.defense in WITHOUT or "variant=penalty" in row.method


def reference(row: Row, found: list[Row]) -> Row:
    """Adversarial training of the same net."""
    return next(other for other in found if (other.method, other.model) == (REFERENCE, row.model))


def line(row: Row, other: Row) -> list[str]:
    """The cells of a row, and its difference to the reference."""
    low, high = row.accuracy.worst.interval()
    worst = f"{100 * row.accuracy.worst.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    pair = difference(row.accuracy.robust, other.accuracy.robust)
    assert pair is not None
    gap = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    return [
        row.method, row.model, "no" if without(row) else "yes", f"{row.cost.train_work:.0f}",
        f"{100 * row.accuracy.clean.mean:.1f}", worst,
        row.verdict, "" if row is other else gap,
    ]  # fmt: skip


def draw(found: list[Row], path: Path) -> None:
    """Error in the worst case against work: filled where no adversarial example was made, a square for the smooth net.
    Numbers beside the marks count the lines of the page's table and of the list at the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 0.17 * len(found) + 2.5))
    for number, row in enumerate(found, start=1):
        low, high = (100 * (1 - share) for share in row.accuracy.worst.interval())
        error, color = 100 * (1 - row.accuracy.worst.mean), "tab:blue" if without(row) else "tab:red"
        mark = "s" if "silu" in row.model else "o"
        axes.errorbar(
            row.cost.train_work, error, yerr=[[max(error - high, 0)], [max(low - error, 0)]],
            capsize=2, color=color, alpha=0.8,
            marker=mark, markerfacecolor=color if without(row) else "white", markersize=6, elinewidth=0.8,
        )  # fmt: skip
        axes.annotate(str(number), (row.cost.train_work, error), textcoords="offset points", xytext=(6, -3), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="work of the training, F per training image, all epochs")
    axes.set(ylabel="error in the worst case [%]", ylim=(100, 3))
    axes.set_xticks(XTICKS, list(map(str, XTICKS)))
    axes.set_yticks(YTICKS, list(map(str, YTICKS)))
    axes.minorticks_off()
    names = [f"{number}  {row.method}{' (SiLU)' * ('silu' in row.model)}" for number, row in enumerate(found, start=1)]
    axes.text(1.02, 1.0, "\n".join(names), transform=axes.transAxes, va="top", fontsize=8, linespacing=1.25)
    marks = [("o", "tab:red", "white", "on adversarial examples"), ("o", "tab:blue", "tab:blue", "without them")]
    for mark, color, face, text in (*marks, ("s", "0.3", "white", "lenet5 with SiLU")):
        axes.plot([], [], mark, color=color, markerfacecolor=face, label=text)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_title(f"{DATASET}, Linf eps {EPS}, {found[0].accuracy.worst.n} images; bars: 95 %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
