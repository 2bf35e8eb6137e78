"""The numbers of docs/findings/README.md on MNIST, from the records.

python docs/figures/mnist.py [RESULTS] writes docs/findings/mnist.md and draws docs/findings/mnist_autoattack.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from records import FINDINGS, ROOT, paired

from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.store import Store
from bench.results.evaluations import evaluations, frame
from bench.results.rows import Row, rows
from bench.tables.markdown import table

CE, MARGIN, AUTOATTACK = "pgd", "pgd (loss=cw, restarts=2, steps=40)", "autoattack"


HEAD = """# MNIST, lenet5: the numbers behind the findings

Written by `python docs/figures/mnist.py` from the records in `results/earlier/` (`bench run specs/earlier/mnist.yaml`).
Robust accuracy in percent, mean over seeds with the smallest and the largest. AutoAttack and the worst case are of seed
0 on the first 100 test images. Differences are in points, on the same images and with the net of the same
seed, with Newcombe's 95 % interval for paired shares. Training times were measured with two jobs on the machine.

![worst case against eps](mnist_autoattack.png)
"""


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results" / "earlier"))
    known = frame(store)
    keys = {job.key for job in plan(load(ROOT / "specs" / "earlier" / "mnist.yaml"), Path("no-data-needed"))}
    known = known[known["key"].isin(keys)]
    found = [row for row in rows(store, evaluations(store, keys).readable) if 0 in row.provenance.keys]
    header = [
        "defense", "train eps", "clean", "PGD-CE", "PGD margin", "AutoAttack", "worst case",
        "worst case - standard [95 %]", "PGD margin - standard, each seed", "PGD-CE - AutoAttack [95 %]",
        "train s / standard",
    ]  # fmt: skip
    text = HEAD
    for eps in sorted({row.eps for row in found if row.eps}, key=float):
        group = sorted((row for row in found if row.eps == eps), key=lambda row: -row.accuracy.worst.mean)
        standard = next(row for row in group if row.defense == "standard")
        text += f"\n## Linf eps {eps}\n\n"
        text += table(header, [line(store, known, row, standard) for row in group])
    text += certificates(found)
    origins = sorted({f"{row.provenance.device}, commit {row.provenance.commit}" for row in found})
    FINDINGS.mkdir(exist_ok=True)
    (FINDINGS / "mnist.md").write_text(f"{text}\n{'; '.join(origins)}.\n")
    draw(found, FINDINGS / "mnist_autoattack.png")


def certificates(found: list[Row]) -> str:
    """Certified accuracy of the smoothed models at each L2 radius."""
    smoothed = next((row for row in found if row.accuracy.certified), None)
    if smoothed is None:
        return ""
    cells = [seeds(cell) for cell in smoothed.accuracy.certified.values()]
    names = [f"L2 radius {radius:g}" for radius in smoothed.accuracy.certified]
    return f"\n## Certified accuracy of {smoothed.method}\n\n" + table(names, [cells])


def line(store: Store, known, row: Row, standard: Row) -> list[str]:
    ratio = f"{row.cost.ratio:.1f}"
    return [
        row.method, row.train_eps, seeds(row.accuracy.clean),
        *(seeds(row.accuracy.attacks[name]) for name in (CE, MARGIN, AUTOATTACK)), seeds(row.accuracy.worst),
        "-" if row is standard else difference(store, row.provenance.keys[0], standard.provenance.keys[0]),
        "-" if row is standard else by_seed(store, known, row, standard), gap(store, known, row), ratio,
    ]  # fmt: skip


def seeds(cell) -> str:
    """Mean over seeds and their range, in percent, and n."""
    values = [100 * v for v in cell.values.values()]
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * cell.mean:.1f}{spread}, n={cell.n}"


def difference(store: Store, a: tuple[str, ...], b: tuple[str, ...]) -> str:
    """Paired difference of two worst cases on the same images, in points."""
    found = paired(store, a, b)
    return f"{100 * found.difference:+.0f} [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"


def by_seed(store: Store, known, row: Row, standard: Row) -> str:
    """Paired difference to the standard net of the same seed under PGD on the margin, in points."""

    def keys(of: Row) -> dict[int, str]:
        mine = known[(known["config"] == of.config) & (known["eps"] == row.eps) & (known["attack_label"] == MARGIN)]
        mine = mine[mine["state"] == "done"]
        return dict(zip(mine["seed"], mine["key"], strict=True))

    a, b = keys(row), keys(standard)
    return ", ".join(difference(store, (a[seed],), (b[seed],)).split(" ")[0] for seed in sorted(a.keys() & b.keys()))


def gap(store: Store, known, row: Row) -> str:
    """Accuracy under PGD-CE minus that under AutoAttack, first seed, on the images that both attacked."""
    mine = known[(known["train_key"] == row.provenance.train_key) & (known["eps"] == row.eps)]
    keys = dict(zip(mine["attack_label"], mine["key"], strict=True))
    return difference(store, (keys[CE],), (keys[AUTOATTACK],))


def draw(found: list[Row], path: Path) -> None:
    """Worst case over all attacks against eps, one line per defense, with 95 % Wilson intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5))
    lines: dict[str, list[Row]] = {}
    for row in found:
        lines.setdefault(f"{row.method}, train eps {row.train_eps}".replace(", train eps –", ""), []).append(row)
    best = sorted(lines.items(), key=lambda item: -item[1][0].accuracy.worst.mean)
    styles = [(colour, mark) for mark in ("o-", "s--") for colour in plt.cm.tab10.colors]
    for (name, group), (colour, style) in zip(best, styles, strict=False):
        group = sorted(group, key=lambda row: row.eps_value)
        shift = 0.0006 * (len(best) / 2 - [b[0] for b in best].index(name))  # so that bars do not hide each other
        means = [100 * row.accuracy.worst.mean for row in group]
        spread = [
            [
                100 * abs(row.accuracy.worst.mean - bound)
                for row in group
                for bound in [row.accuracy.worst.interval()[k]]
            ]
            for k in (0, 1)
        ]
        xs = [row.eps_value + shift for row in group]
        axes.errorbar(xs, means, yerr=spread, fmt=style, color=colour, label=name, capsize=2, markersize=4, linewidth=1)
    axes.set(xlabel="Linf eps", ylabel="robust accuracy, worst case [%]", ylim=(-2, 102), xticks=[0.1, 0.15, 0.2])
    n = sorted({row.accuracy.worst.n for row in found})
    axes.set_title(f"MNIST, lenet5, 4 epochs, seed 0, n = {'/'.join(map(str, n))}, bars: 95 % Wilson", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
