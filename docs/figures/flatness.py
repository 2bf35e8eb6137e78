"""What the claims of the two papers are worth: a page and a figure for each question of specs/questions/.

python docs/figures/questions.py [NAME ...] writes docs/findings/NAME.md and NAME.png, for all questions by default,
from the records in results/questions/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from records import FINDINGS, ROOT

from bench.planning.job import EvaluateJob, TrainJob
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.packs import LOG
from bench.records.store import Store
from bench.results.rows import Row
from bench.results.significance import difference
from bench.tables.leaderboard import board
from bench.tables.markdown import table

RESULTS = ROOT / "results" / "questions"
RISES = {
    "adversarial_rise": "adversarial rise, worst weights",
    "clean_rise": "clean rise, worst weights",
    "random": "adversarial rise, random directions",
}
LAPLACE = """\
`noisy` (arXiv 2312.08877) propagates Gaussian noise of the first layer through each ReLU by a Laplace approximation.
The density of a rectified Gaussian with mean m and variance v has its mode at max(m, 0) and second log-derivative
-1/v there, so that the literal reading passes the variance whole (`ungated`); the usual one, which is the default
here, passes none where m is negative (`jacobian`, gated). Robust is the worst case over clean, PGD and AutoAttack (a
screen of all images, the full suite on 300 of the survivors). Differences are paired by seed and image, in points,
with a 95 % interval over images; with several seeds it leaves out the spread between seeds, which the single values
show."""
LEARNED_SIGMA = """\
With noise at the first layer, (W1, b1) times c and the next weights by 1/c leave the net as it is and divide the
effect of the noise by c, so that sigma has no effect on the infimum of the loss, only on the way there. At the input
there is no such freedom. Both terms of the loss act at both sites; the rate of sigma is 10 times that of the weights.
A pull is the derivative of that term by sigma on 64 training images at the end, a positive one lowers sigma. The
noise-free net is deployed and attacked."""
FLATNESS = """\
The claim of `rat` (arXiv 2303.10653) is that training under random weights, expanded by Taylor, finds flatter minima
and that these are more robust. Measured by `flatness`: by how much the mean clean and adversarial loss rise at the
worst weights within 0.5 % of each layer's norm (what AWP trains against), and the adversarial loss along filter-
normalized random directions at distance 0.25; ± is half a 95 % interval over images. Lower is flatter. Robust is the
worst case over clean, PGD and AutoAttack (a screen of all images, the full suite on 300 of the survivors)."""


def rows_of(store: Store, question: str) -> list[Row]:
    """The rows of the question's spec whose worst case is known, in the order of the spec."""
    # of the data sets that the project knows, the planner needs no image
    jobs = plan(load(ROOT / "specs" / "questions" / f"{question}.yaml"), Path("no-data-needed"))
    order = {job.key: place for place, job in enumerate(jobs) if isinstance(job, TrainJob)}
    found = [row for row in board(store) if row.accuracy.worst.values and row.provenance.train_key in order]
    if not found:
        raise SystemExit(f"no records of specs/questions/{question}.yaml in {store.root}; run it, then bench pack")
    return sorted(found, key=lambda row: order[row.provenance.train_key])


def page(name: str, title: str, text: str, found: list[Row], parts: Iterable[str]) -> None:
    """Write docs/findings/NAME.md: title, text, figure, tables, and where the numbers come from."""
    seeds = sorted({seed for row in found for seed in row.accuracy.worst.values})
    devices = sorted({row.provenance.device for row in found})
    commits = sorted({commit for row in found for commit in row.provenance.commit.split("; ")})
    origin = (
        f"`bench run specs/questions/{name}.yaml`, records in `results/questions/`, page by `python "
        f"docs/figures/questions.py {name}`. {found[0].dataset}, {found[0].model}, {found[0].epochs} epochs, "
        f"{found[0].norm} eps {found[0].eps}, {found[0].accuracy.worst.n} test images, training seed"
        f"{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {'; '.join(devices)}, commits {', '.join(commits)}."
    )
    body = "\n".join(parts)
    (FINDINGS / f"{name}.md").write_text(
        f"# {title}\n\n{text}\n\n![{title}]({name}.png)\n\n{body}\n{origin}\n", "utf-8"
    )


def robust(row: Row) -> str:
    """The worst case in percent: mean over the seeds with its interval over the images, and the seeds' own values."""
    low, high = row.accuracy.worst.interval()
    values = row.accuracy.worst.values
    own = f"; seeds {', '.join(f'{100 * value:.1f}' for value in values.values())}" if len(values) > 1 else ""
    return f"{100 * row.accuracy.worst.mean:.1f} ({100 * low:.1f} to {100 * high:.1f}{own})"


def versus(row: Row, other: Row) -> str:
    """The paired difference to another row in points, on the images and seeds that both have."""
    pair = difference(row.accuracy.robust, other.accuracy.robust)
    assert pair is not None
    return f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"


def clean(row: Row) -> str:
    return f"{100 * row.accuracy.clean.mean:.1f}"


def under(row: Row, label: str) -> str:
    """Accuracy in percent under the attack of this label."""
    return f"{100 * row.accuracy.attacks[label].mean:.1f}" if label in row.accuracy.attacks else "-"


def named(found: list[Row], method: str) -> Row:
    return next(row for row in found if row.method.split(" (train_eps")[0] == method)


def settings(store: Store, row: Row) -> dict[str, Any]:
    """All settings of the row's defense."""
    job = store.job(row.provenance.train_key)
    assert isinstance(job, TrainJob)
    return job.defense.settings


def figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=(width, height), squeeze=False)


def save(drawing: Any, name: str) -> None:
    drawing.tight_layout()
    drawing.savefig(FINDINGS / f"{name}.png", dpi=110, metadata={"Software": None})


def errors(row: Row) -> tuple[float, float, float]:
    """The worst case in percent and the lengths of its interval below and above."""
    low, high = row.accuracy.worst.interval()
    mean = row.accuracy.worst.mean
    return 100 * mean, 100 * max(mean - low, 0), 100 * max(high - mean, 0)


def laplace(store: Store) -> None:
    """The two readings of the Laplace approximation at a ReLU, over sigma."""
    found = rows_of(store, "laplace")
    standard, noisy = named(found, "standard"), [row for row in found if row.defense == "noisy"]
    own = {row.config: settings(store, row) for row in noisy}
    gated = {own[row.config]["sigma"]: row for row in noisy if own[row.config]["structure"] == "jacobian"}
    lines = []
    for row in found:
        setting = own.get(row.config, {"structure": "", "sigma": ""})
        twin = gated.get(setting["sigma"])
        lines.append(
            [
                row.defense, {"jacobian": "gated", "ungated": "ungated (literal)"}.get(setting["structure"], ""),
                str(setting["sigma"]), clean(row), under(row, "pgd"), robust(row), row.verdict,
                versus(row, standard) if row is not standard else "",
                versus(row, twin) if twin is not None and row is not twin else "",
            ]
        )  # fmt: skip
    header = ["Defense", "Variance at a ReLU", "sigma", "Clean", "PGD-20", "Robust", "Verdict"]
    header += ["minus standard", "minus gated, same sigma"]
    drawing, ((axes,),) = figure(7, 4.2)
    for structure, label in (("jacobian", "gated: v 1[m > 0]"), ("ungated", "ungated: v (literal)")):
        points = sorted((own[row.config]["sigma"], row) for row in noisy if own[row.config]["structure"] == structure)
        values = [errors(row) for _, row in points]
        mean, low, high = zip(*values, strict=True)
        line = axes.errorbar([sigma for sigma, _ in points], mean, yerr=[low, high], fmt="o-", capsize=2, label=label)
        for sigma, row in points:
            each = [100 * value for value in row.accuracy.worst.values.values()]
            axes.plot([sigma] * len(each), each, ".", color=line[0].get_color(), alpha=0.5)
    axes.axhline(100 * standard.accuracy.worst.mean, color="0.4", linestyle=":", label="standard")
    axes.set(xlabel="sigma", ylabel="robust accuracy [%]", ylim=(0, 100))
    axes.set_title("line: mean of the seeds with 95 % over images; dots: the seeds", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(drawing, "laplace")
    page("laplace", "The literal Laplace step against the gated one", LAPLACE, found, [table(header, lines)])


def learned_sigma(store: Store) -> None:
    """Where a learned sigma goes, from three starts at two sites."""
    found = rows_of(store, "learned_sigma")
    standard, noisy = named(found, "standard"), [row for row in found if row.defense == "noisy"]
    lines, curves = [], []
    for row in noisy:
        setting = settings(store, row)
        log = [json.loads(one) for one in (store.read(row.provenance.train_key, LOG) or b"").decode().splitlines()]
        sigma = [setting["sigma"], *(one["sigma"] for one in log)]
        curves.append((setting["site"], sigma))
        pull = [
            sum(log[-1].get(f"d{term}_dsigma_{side}", 0.0) for side in ("correct", "wrong")) for term in ("mse", "prob")
        ]
        lines.append(
            [
                setting["site"], f"{sigma[0]:g}", f"{sigma[-1]:.3f}", f"{100 * (sigma[-1] / sigma[-2] - 1):+.1f} %",
                f"{pull[0]:+.3f}", f"{pull[1]:+.3f}", clean(row), under(row, "pgd"), robust(row), row.verdict,
                versus(row, standard),
            ]
        )  # fmt: skip
    header = ["Site", "Start", "End", "last epoch", "pull of the squared error", "pull of the probability term"]
    header += ["Clean", "PGD-20", "Robust", "Verdict", "minus standard"]
    drawing, (axes,) = figure(10, 4, 2)
    for panel, site in zip(axes, ("first", "input"), strict=True):
        for at, sigma in curves:
            if at == site:
                panel.plot(range(len(sigma)), sigma, "o-", markersize=4, label=f"from {sigma[0]:g}")
        panel.set(xlabel="epoch", ylabel="learned sigma", yscale="log")
        panel.set_title(
            {"first": "first layer: rescaling undoes it", "input": "input: no such freedom"}[site], fontsize=9
        )
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    save(drawing, "learned_sigma")
    page("learned_sigma", "Does a learned sigma settle above zero", LEARNED_SIGMA, found, [table(header, lines)])


def flatness(store: Store) -> None:
    """The loss around the weights of each Taylor order of rat beside TRADES, AWP and the controls."""
    found = rows_of(store, "flatness")
    base = named(found, "trades")
    lines, points = [], []
    for row in found:
        rises = measured(store, row)
        points.append((rises["adversarial_rise"][0], row))
        lines.append(
            [
                row.method, clean(row), robust(row), row.verdict, versus(row, base) if row is not base else "",
                f"{row.cost.train_work:.0f}", *("{:.3f} ±{:.3f}".format(*rises[name]) for name in RISES),
            ]
        )  # fmt: skip
    header = ["Method", "Clean", "Robust", "Verdict", "minus trades", "Work, F", *RISES.values()]
    drawing, ((axes,),) = figure(9, 4.6)
    for number, (rise, row) in enumerate(points, start=1):
        mean, low, high = errors(row)
        if row.defense == "standard":  # far from all others in both
            continue
        axes.errorbar(rise, mean, yerr=[[low], [high]], fmt="o", capsize=2, markersize=5)
        axes.annotate(str(number), (rise, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    names = "\n".join(f"{number}  {row.method}" for number, (_, row) in enumerate(points, start=1))
    axes.text(1.02, 1.0, names, transform=axes.transAxes, va="top", fontsize=8, linespacing=1.3)
    axes.set(xlabel="rise of the adversarial loss at the worst weights", ylabel="robust accuracy [%]", xlim=(0, None))
    axes.set_title("robust accuracy against sharpness; bars: 95 % over images; 1 is far outside", fontsize=9)
    axes.grid(alpha=0.3)
    save(drawing, "flatness")
    page("flatness", "Are rat's minima flatter, and does it matter", FLATNESS, found, [table(header, lines)])


def measured(store: Store, row: Row) -> dict[str, tuple[float, float]]:
    """For each of RISES the mean over images (and seeds), and half its 95 % interval over images."""
    import numpy as np

    keys = [key for key in store.keys() if _is_flatness(store, key, row)]
    samples = [store.samples(key) for key in keys]
    if not samples:
        raise SystemExit(f"no record of flatness for {row.method}; expected that of specs/questions/flatness.yaml")
    columns = {name: np.mean([one[name] for one in samples], axis=0) for name in ("adversarial_rise", "clean_rise")}
    far = [one["adversarial_loss_0.25"].mean(axis=1) - one["adversarial_loss"] for one in samples]
    columns["random"] = np.mean(far, axis=0)
    return {
        name: (float(column.mean()), 1.96 * float(column.std(ddof=1)) / len(column) ** 0.5)
        for name, column in columns.items()
    }


def _is_flatness(store: Store, key: str, row: Row) -> bool:
    job, record = store.job(key), store.record(key)
    done = record is not None and record.state == "done"
    trained = {entry.train_key for entry in row.evaluations}
    return isinstance(job, EvaluateJob) and done and job.attack.name == "flatness" and job.needs[0] in trained


QUESTIONS: dict[str, Callable[[Store], None]] = {
    "laplace": laplace,
    "learned_sigma": learned_sigma,
    "flatness": flatness,
}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or QUESTIONS:
        QUESTIONS[chosen](Store(RESULTS))
