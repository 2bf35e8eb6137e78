"""The results of the full battery on seven models on MNIST, from the records.

python docs/figures/battery.py [RESULTS] writes docs/findings/battery.md and draws docs/findings/battery.png.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from records import FINDINGS, ROOT

from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.store import Store
from bench.results.evaluations import evaluations, frame
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.soundness.verdicts import judged_rows
from bench.tables.markdown import table
from bench.tables.ranking import flags

HEAD = """# The full battery on MNIST, lenet5

Written by `python docs/figures/battery.py` from the records in `results/earlier/`
(`bench run specs/earlier/mnist_battery.yaml`). Accuracies in percent under the model's own prediction rule; one
training seed. AutoAttack of a stochastic model is its suite `rand`. Worst case: for a deterministic model the minimum
of each image over all attacks; for a stochastic one, the attack that fools the model in most of one set of draws,
evaluated on another set. [The findings](README.md) discuss the results.

![worst case and single attacks](battery.png)
"""
COLUMNS = {
    "FGSM": "fgsm", "PGD-CE": "pgd", "PGD margin": "pgd (loss=cw, steps=40)", "MI-FGSM": "torchattacks",
    "VMI-FGSM": "torchattacks (method=VMIFGSM)", "AutoAttack": "autoattack", "Square": "square",
    "closed form": "closed_form", "EOT-CE, S to 16": "eot (base=pgd, draws=[1, 4, 16])",
    "EOT margin, S=4": "eot (base=pgd (loss=cw), draws=[4])", "transfer": "transfer", "curve": "curve",
}  # fmt: skip


class Shown(NamedTuple):
    """Share of correct single draws of each of the first images, and the passes per image."""

    share: np.ndarray
    passes: float


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results" / "earlier"))
    keys = {job.key for job in plan(load(ROOT / "specs" / "earlier" / "mnist_battery.yaml"), Path("no-data-needed"))}
    found = judged_rows(store, split=None, known=evaluations(store, keys))
    order = {"deterministic": 0, "randomised": 1, "smoothed": 2}
    found.sort(key=lambda row: (row.eps_value, order[row.deploys], -row.accuracy.worst.mean))
    budgets = [row for row in found if row.eps]
    text = HEAD
    for eps in sorted({row.eps for row in budgets}, key=float):
        group = [row for row in budgets if row.eps == eps]
        header = ["defense", "clean", *COLUMNS, "worst case", "single draw", "verdict"]
        text += f"\n## Linf eps {eps}\n\n" + table(header, [line(row) for row in group])
    text += adaptive(store, budgets) + certificates(budgets) + flatness(frame(store), keys) + checks(budgets)
    origins = sorted({f"{row.provenance.device}, commit {row.provenance.commit}" for row in budgets})
    (FINDINGS / "battery.md").write_text(f"{text}\n{'; '.join(origins)}.\n")
    draw(budgets, FINDINGS / "battery.png")


def line(row: Row) -> list[str]:
    attacks = [share(row.accuracy.attacks.get(label)) for label in COLUMNS.values()]
    verdict = row.verdict + (f" ({', '.join(marks)})" if (marks := codes(row)) else "")
    return [
        name(row),
        share(row.accuracy.clean),
        *attacks,
        share(row.accuracy.worst),
        share(row.accuracy.single),
        verdict,
    ]


def name(row: Row) -> str:
    return f"{row.method}, train eps {row.train_eps}".replace(", train eps –", "")


def share(cell: SeedValues | None) -> str:
    if cell is None or not cell.values:
        return "-"
    return f"{100 * cell.mean:.1f}, n={cell.n}"


def codes(row: Row) -> list[str]:
    return [mark for mark in [flags(row)] if mark not in ("", "–", "none", "not checked")]


def shown(store: Store, row: Row, label: str, n: int) -> Shown | None:
    """Single draws under one attack of the first seed, None where it was not run."""
    entry = row.provenance.entries.get(label, {}).get(row.seeds[0])
    if entry is None or entry.state != "done":
        return None
    samples = store.samples(entry.key)
    correct = samples["share"] if "share" in samples else samples["correct"].astype(float)
    return Shown(correct[:n], float(samples["forwards"].mean() + samples["backwards"].mean()))


def adaptive(store: Store, found: Iterable[Row]) -> str:
    """The closed form against EOT, and for deterministic models against PGD on the margin."""
    header = ["defense", "eps", "attack", "correct single draws, %", "passes per image", "minus closed form [95 %]"]
    lines = []
    for row in found:
        own = shown(store, row, "closed_form", 500)
        if own is None:
            continue
        noisy = row.deploys != "deterministic"
        against = ["EOT-CE, S to 16", "EOT margin, S=4", "AutoAttack"] if noisy else ["PGD-CE", "PGD margin"]
        for title in ["closed form", *against]:
            other = shown(store, row, COLUMNS[title], 500)
            if other is None:
                continue
            n = min(len(own.share), len(other.share))
            gap = 100 * (other.share[:n] - own.share[:n])
            half = 1.96 * float(gap.std(ddof=1)) / math.sqrt(n)
            low, high = gap.mean() - half, gap.mean() + half
            versus = "" if title == "closed form" else f"{gap.mean():+.1f} [{low:+.1f}, {high:+.1f}], n={n}"
            value = f"{100 * other.share[:n].mean():.1f}"
            lines.append([name(row), str(row.eps), title, value, f"{other.passes:.0f}", versus])
    return (
        "\n## Closed form against EOT\n\nSingle draws on the same images, none of them used by the attack; for a "
        "deterministic model, accuracy. If the difference is positive, the closed form is the stronger attack. Passes "
        "are forward and backward passes through the model, as counted.\n\n" + table(header, lines)
    )


def certificates(found: Iterable[Row]) -> str:
    """Certified accuracy and average radius of the smoothed models."""
    seen = {row.method: row for row in found if row.accuracy.certified}
    if not seen:
        return ""
    radii = list(next(iter(seen.values())).accuracy.certified)
    header = ["defense", *(f"L2 radius {radius:g}" for radius in radii), "average certified radius"]
    lines = [
        [method, *(share(cell) for cell in row.accuracy.certified.values()), f"{row.accuracy.acr.mean:.3f}"]
        for method, row in seen.items()
    ]
    return "\n## Certificates\n\n" + table(header, lines)


def flatness(known, keys: set[str]) -> str:  # type: ignore[no-untyped-def]
    """The rise of the adversarial loss around the weights."""
    mine = known[known["key"].isin(keys) & known["measures"].notna() & (known["state"] == "done")]
    if mine.empty:
        return ""
    lines = [
        [e.defense_label, e.eps, f"{e.measured:.3f}"] for e in mine.sort_values(["eps_value", "measured"]).itertuples()
    ]
    return "\n## Flatness of the weight-loss landscape\n\n" + table(
        ["defense", "eps", "rise of the adversarial loss at the worst weights"], lines
    )


def checks(found: Iterable[Row]) -> str:
    """Every finding that is a flag or worse."""
    lines = []
    for row in found:
        for seeds in row.findings.values() if isinstance(row.findings, dict) else [row.findings]:
            for finding in seeds:
                if finding.level in ("F", "U", "X"):
                    value = "" if finding.value is None else f"{finding.value:.4g}"
                    lines.append([name(row), str(row.eps), f"{finding.code} {finding.level}", value, finding.note])
    unique = list(dict.fromkeys(map(tuple, lines)))
    return "\n## Flags\n\n" + table(["defense", "eps", "check", "value", "note"], [list(one) for one in unique])


def draw(found: list[Row], path: Path) -> None:
    """Accuracy of every row under every attack, one panel a budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets = sorted({row.eps for row in found}, key=float)
    figure, panels = plt.subplots(1, len(budgets), figsize=(8 * len(budgets), 4.5), squeeze=False, layout="constrained")
    columns = {"clean": None, **COLUMNS, "worst case": None}
    for axes, eps in zip(panels[0], budgets, strict=True):
        group = [row for row in found if row.eps == eps]
        values = np.full((len(group), len(columns)), np.nan)
        for k, row in enumerate(group):
            cells = [
                row.accuracy.clean,
                *(row.accuracy.attacks.get(label) for label in COLUMNS.values()),
                row.accuracy.worst,
            ]
            values[k] = [100 * cell.mean if cell is not None and cell.values else np.nan for cell in cells]
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for (k, j), value in np.ndenumerate(values):
            text = "" if np.isnan(value) else f"{value:.0f}"
            axes.text(j, k, text, ha="center", va="center", fontsize=7, color="black" if value > 55 else "white")
        axes.set_xticks(range(len(columns)), list(columns), rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(group)), [name(row) for row in group], fontsize=8)
        axes.set_title(f"MNIST, lenet5, Linf {eps}: accuracy in %, deployed rule", fontsize=9)
    figure.colorbar(image, ax=panels[0].tolist(), shrink=0.8)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
