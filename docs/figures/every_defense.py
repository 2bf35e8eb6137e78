"""Every defense once on MNIST: the numbers of the findings, from the records.

python docs/figures/every_defense.py [RESULTS] writes docs/findings/defenses.md and draws
docs/findings/defenses.png from the runs of specs/earlier/mnist_defenses.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

from records import FINDINGS, ROOT, Training, paired, trainings

from bench.records.store import Store
from bench.tables.markdown import table

HEAD = """# Every defense once on MNIST

Written by `python docs/figures/every_defense.py` from the records in `results/earlier/` (`bench run
specs/earlier/mnist_defenses.yaml`). lenet5, 4 epochs, seed 0, one shared recipe; defenses that take a budget
train at Linf eps 0.2, with a warm-up over the first quarter. Accuracy in percent with its 95 % Wilson interval. One
seed and 100 images under AutoAttack: differences of a few points are not significant. Stochastic models (`pni`, `rse`,
`smoothing`) were attacked by AutoAttack's randomized version and are scored by their own vote; the protocol for them
was not run, so their numbers are upper bounds. Seconds were measured with other jobs on the machine;
`docs/performance.md` has times of an idle one.

![AutoAttack accuracy of every defense](defenses.png)
"""
BUDGETS = ("0.1", "0.2")
PAIRS = [
    ("rat", "trades"), ("rat (sigma=0.1)", "rat"), ("rat (sigma=0.3)", "rat"), ("rat_release", "trades"),
    ("awp (base=trades)", "trades"), ("awp (base=pgd_at)", "pgd_at"), ("awp (base=rat)", "rat"),
    ("trades", "pgd_at"), ("mart", "trades"), ("free_at (replays=4)", "pgd_at"), ("fast_at", "pgd_at"),
    ("pni", "pgd_at"), ("at_mixture", "at_mixture (rel_step_size=0.25, start=uniform, steps=10)"),
    ("at_mixture (rel_step_size=0.25, start=uniform, steps=10)", "pgd_at"), ("robust_training", "fast_at"),
    ("robust_training (variant=penalty)", "robust_training"), ("lsa", "robust_training"),
    ("jacobian_penalty", "noisy (sigma=1.1)"), ("logit_squeezing", "standard"), ("rse", "standard"),
]  # fmt: skip


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results" / "earlier"))
    found = sorted(trainings(store, "mnist_defenses"), key=lambda t: t.worse("autoattack", "0.2"))
    text = HEAD
    for eps in BUDGETS:
        rows = [
            [t.name, t.cell("clean"), *(t.cell(k, eps) for k in ("ce", "cw", "autoattack")), seconds(t)] for t in found
        ]
        text += f"\n## Linf eps {eps}\n\n"
        text += table(["defense", "clean", "PGD-20 CE", "PGD-40 margin", "AutoAttack", "train s"], rows)
    text += differences(store, {short(t.name): t for t in found}) + terms(found)
    (FINDINGS / "defenses.md").write_text(text)
    draw(found, FINDINGS / "defenses.png")


def differences(store: Store, found: dict[str, Training]) -> str:
    """Paired differences on the same images under PGD on the margin, in points."""
    rows = []
    for a, b in PAIRS:
        cells = [a, b]
        for eps in BUDGETS:
            pair = paired(store, (found[a].keys["cw", eps],), (found[b].keys["cw", eps],))
            cells.append(f"{100 * pair.difference:+.1f} [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]")
        rows.append(cells)
    text = "\n## Differences on the same images\n\n"
    text += "PGD-40 margin, 1000 images, one net each: first minus second in points, with Newcombe's 95 % interval for "
    text += "paired shares. The interval is that of these two nets and does not cover other seeds.\n\n"
    return text + table(["first", "second", *(f"eps {eps}" for eps in BUDGETS)], rows)


def terms(found: list[Training]) -> str:
    """Each Taylor term in the loss of rat, mean of the last epoch."""
    rows = [
        [
            short(t.name),
            *(f"{(t.metrics.final_terms or {}).get(name, 0):.2g}" for name in ("ce", "kl", "first", "second")),
        ]
        for t in found
        if t.defense in ("rat", "rat_release")
    ]
    text = "\n## Terms of the loss of rat in the last epoch\n\n"
    return text + table(["defense", "cross-entropy", "zeroth (KL)", "first", "second"], rows)


def seconds(t: Training) -> str:
    return f"{t.metrics.train_seconds:.0f}"


def draw(found: list[Training], path: Path) -> None:
    """One line per defense: clean, and AutoAttack at both budgets with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.27 * len(found) + 1.2))
    order = list(reversed(found))
    kinds = [
        ("clean", "", "0.4", "|"),
        *zip(("autoattack",) * 2, BUDGETS, ("tab:blue", "tab:red"), "os", strict=True),
    ]
    for kind, eps, colour, mark in kinds:
        for place, t in enumerate(order):
            share = t.share(kind, eps)
            if share is not None:
                mean, low, high = share
                known = {"label": f"{kind} {eps}".replace("autoattack", "AutoAttack, eps")} if place == 0 else {}
                spread = [[max(mean - low, 0)], [max(high - mean, 0)]]  # at 100 % rounding makes -0
                axes.errorbar(mean, place, xerr=spread, fmt=mark, color=colour, capsize=2, markersize=5, **known)
    axes.set_yticks(range(len(order)), [short(t.name) for t in order], fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set(xlabel="accuracy [%]", xlim=(-2, 102))
    what = "MNIST, lenet5, 4 epochs, seed 0, trained at eps 0.2; AutoAttack on 100 images, bars: 95 % Wilson"
    figure.suptitle(what, fontsize=9)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def short(name: str) -> str:
    """The name without the budget that all of them share."""
    return name.replace(", train_eps=0.2", "").replace(" (train_eps=0.2)", "")


if __name__ == "__main__":
    main()
