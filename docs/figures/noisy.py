"""The effect of sigma on closed-form noise, and a search for its best form, from the records.

python docs/figures/noisy.py [RESULTS] writes docs/findings/noisy.md and draws docs/findings/noisy_sigma.png from the
runs of specs/earlier/noisy_sigma.yaml, noisy_search.yaml, noisy_search_recipe.yaml, noisy_search_batch.yaml,
noisy_best.yaml and noisy_best_batch.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from records import FINDINGS, ROOT, Training, trainings

from bench.records.store import Store
from bench.tables.markdown import table

EPS = "0.1"
ATTACKS = {"clean": "clean", "ce": "PGD-20 CE", "cw": "PGD-40 margin", "autoattack": "AutoAttack"}
# the first was logged until the next two replaced it
SCALES = {
    "snr": "signal / noise", "t_median": "median d / sqrt q", "gap_constant": "constant share of |d|",
    "w1_norm": "norm of W1", "floor_hits": "pairs at the floor",
}  # fmt: skip
HEAD = """# Closed-form noise on MNIST: sigma, and the best form

Written by `python docs/figures/noisy.py` from the records in `results/earlier/`. lenet5, seed 0, Linf eps 0.1; accuracy
in percent with its 95 % Wilson interval. Work is that of one training step in forward passes F per image, as counted;
times are not shown, since several jobs shared the machine (`docs/performance.md` has times of an idle one).

![accuracy against sigma, and learned sigma over training](noisy_sigma.png)
"""


def number(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


def sweep(found: list[Training]) -> str:
    """Accuracy by fixed or learned sigma, the derivatives by sigma, and the error of the closed form."""
    rows = [[t.name, number(t.logged.get("sigma")), *(t.cell(*at(kind)) for kind in ATTACKS), t.work] for t in found]
    text = "\n## Sigma at the first layer, fixed and learned\n\n"
    text += table(["defense", "sigma at the end", *ATTACKS.values(), "work, F"], rows)
    noisy = [t for t in found if t.defense == "noisy"]
    pulls = [f"d{term}_dsigma_{side}" for term in ("mse", "prob") for side in ("correct", "wrong")]
    text += (
        "\nDerivative of the loss by sigma on 64 training images at the end of training, by term, for correct and for "
        "wrong images: a positive one decreases sigma, a negative one increases it.\n\n"
    )
    header = ["defense", "squared error, correct", "squared error, wrong", "probability, correct", "probability, wrong"]
    scales = {name: title for name, title in SCALES.items() if any(name in t.logged for t in noisy)}
    rows = [[t.name, *(number(t.logged.get(p)) for p in (*pulls, *scales))] for t in noisy]
    text += table([*header, *scales.values()], rows)
    checks = ["mc_mean_shift", "mc_trace_ratio", "mc_win", "mc_win_genz", "mc_win_product", "mc_win_min"]
    text += (
        "\nThe closed form against 256 draws of the noise on 64 training images in the last epoch: relative distance "
        "of the noise-free logits from the mean of the noisy ones, ratio of the traces, and the share of draws that "
        "the true class wins, compared with the closed form's (Genz's integral of its Gaussian, the product of pairs "
        "that is trained, the smallest pair).\n\n"
    )
    header = ["defense", "shift of the mean", "trace / draws'", "wins, draws", "Genz", "product", "smallest pair"]
    return text + table(header, [[t.name, *(number(t.logged.get(c)) for c in checks)] for t in noisy])


def search(found: list[Training], title: str, note: str) -> str:
    """Every form tried, best under AutoAttack first."""
    if not found:
        return ""
    found = sorted(found, key=lambda t: t.worse("autoattack", EPS))
    kinds = [kind for kind in ATTACKS if any(at(kind) in t.hits for t in found)]
    rows = [
        [t.name, *(t.cell(*at(kind)) for kind in kinds), t.work, str(t.train["epochs"]), f"{t.total:.0f}"]
        for t in found
    ]
    header = ["defense", *(ATTACKS[kind] for kind in kinds), "work, F per step", "epochs", "F in total"]
    return f"\n## {title}\n\n{note}\n\n" + table(header, rows)


def draw(found: list[Training], path: Path) -> None:
    """Accuracy against the final sigma, and sigma over the epochs from each start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    fixed = [t for t in found if t.defense == "noisy" and not t.settings["learn_sigma"]]
    learned = [t for t in found if t.defense == "noisy" and t.settings["learn_sigma"]]
    for (kind, name), colour in zip(ATTACKS.items(), plt.cm.tab10.colors, strict=False):
        for group, style in ((fixed, "o-"), (learned, "*")):
            points = [(t.logged["sigma"], *bars(t, kind)) for t in group if at(kind) in t.hits]
            if points:
                xs, ys, low, high = zip(*sorted(points), strict=True)
                known = {"label": name} if group is fixed else {}
                left.errorbar(xs, ys, yerr=[low, high], fmt=style, color=colour, capsize=2, markersize=6, **known)
        base = next((t for t in found if t.defense == "standard" and at(kind) in t.hits), None)
        if base is not None:
            left.axhline(base.accuracy(*at(kind)), color=colour, linestyle=":", linewidth=1)
    left.set(xlabel="sigma at the end of training", ylabel="accuracy [%]", ylim=(0, 102))
    left.set_title("line: fixed sigma, stars: learned, dotted: standard; bars: 95 % Wilson", fontsize=9)
    left.legend(fontsize=8)
    for t in learned:
        start = float(t.settings["sigma"])
        points = [(0, start), *((line["epoch"], line["sigma"]) for line in t.epochs)]
        right.plot(*zip(*points, strict=True), "o-", label=f"from {start:g}")
    right.set(xlabel="epoch", ylabel="learned sigma", ylim=(0, None))
    right.set_title("a learned sigma (source's setting, its rate raised to 10 times the weights')", fontsize=9)
    if learned:
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def bars(t: Training, kind: str) -> tuple[float, float, float]:
    share, low, high = t.share(*at(kind)) or (float("nan"),) * 3
    return share, max(share - low, 0), max(high - share, 0)


def at(kind: str) -> tuple[str, str]:
    return kind, "" if kind == "clean" else EPS


def main() -> None:
    store = Store(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results" / "earlier"))
    sigma = trainings(store, "noisy_sigma")
    text = HEAD + sweep(sigma)
    text += search(
        trainings(store, "noisy_search"),
        "The search: forms, on validation images",
        "4 epochs of Adam at a constant rate, as everything in `specs/earlier/mnist.yaml`; evaluated on 5000 images "
        "held out of training (AutoAttack on 200 of them), not on test images. The source's setting is `noisy`.",
    )
    text += search(
        trainings(store, "noisy_search_recipe"),
        "The search: recipe, on validation images",
        "The best form with a rate that rises to 4e-3 and falls again, and 7 epochs: less work than 4 of PGD-AT.",
    )
    text += search(
        trainings(store, "noisy_search_batch"),
        "The search: batch, on validation images",
        "The same with half the batch: twice the updates for the same work.",
    )
    text += search(
        trainings(store, "noisy_best"),
        "The preset, on test images",
        "`noisy` with `preset=input`, the source's setting and PGD-AT, under the recipe of the second search.",
    )
    text += search(
        trainings(store, "noisy_best_batch"),
        "The preset with half the batch, on test images",
        "The recipe of the third search.",
    )
    FINDINGS.mkdir(exist_ok=True)
    (FINDINGS / "noisy.md").write_text(text)
    draw(sigma, FINDINGS / "noisy_sigma.png")


if __name__ == "__main__":
    main()
