"""Does a learned sigma settle above zero: where it goes from three starts at two sites, and what that does.

python docs/figures/learned_sigma.py [RESULTS] writes docs/findings/learned_sigma.md and draws
docs/findings/learned_sigma.png from the run of specs/questions/learned_sigma.yaml.
"""

from __future__ import annotations

import json
from typing import Any

from question import Question, clean, figure, robust, versus

from bench.records.packs import LOG
from bench.results.rows import Row

SITES = {"first": "first layer: rescaling undoes it", "input": "input: no such freedom"}
PULLS = {"correct": "pull of correct images", "wrong": "pull of wrong images"}
HEAD = """# Does a learned sigma settle above zero

With noise at the first layer, (W1, b1) times c and the next weights by 1/c leave the net as it is and divide the effect
of the noise by c, so that sigma has no effect on the infimum of the loss, only on the way there. At the input there is
no such freedom. The rate of sigma is 10 times that of the weights. A pull is the derivative of the loss by sigma on 64
training images at the end, apart for those that the net classifies correctly and wrongly; a positive one lowers sigma.
The noise-free net is deployed and attacked. Robust is the worst case over clean, PGD, AutoAttack (a screen of all
images, the full suite on 300 of the survivors) and the attack through the closed form, with its 95 % interval.
Differences are paired by image, in points.

![sigma by epoch from three starts, at the first layer and at the input](learned_sigma.png)
"""


def main() -> None:
    asked = Question("learned_sigma")
    standard = next(row for row in asked.rows if row.defense == "standard")
    header = ["Site", "Start", "End", "last epoch", *PULLS.values(), "Clean", "Robust", "Verdict", "minus standard"]
    lines, curves = [], []
    for row in asked.rows:
        if row is standard:
            continue
        site, log = asked.settings(row)["site"], logged(asked, row)
        sigma = [asked.settings(row)["sigma"], *(epoch["sigma"] for epoch in log)]
        curves.append((site, sigma))
        pulls = [sum(log[-1].get(f"d{term}_dsigma_{of}", 0.0) for term in ("mse", "prob")) for of in PULLS]
        moved = f"{100 * (sigma[-1] / sigma[-2] - 1):+.1f} %"
        cells = [clean(row), robust(row), row.verdict, versus(row, standard)]
        lines.append([site, f"{sigma[0]:g}", f"{sigma[-1]:.3f}", moved, *(f"{pull:+.3f}" for pull in pulls), *cells])
    tail = f"`standard` of the same seed: clean {clean(standard)}, robust {robust(standard)}.\n\n"
    asked.write(HEAD, header, lines, tail)
    draw(asked, curves)


def logged(asked: Question, row: Row) -> list[dict[str, Any]]:
    """The lines of a training's log, one an epoch."""
    text = asked.store.read(row.provenance.train_key, LOG) or b""
    return [json.loads(line) for line in text.decode().splitlines()]


def draw(asked: Question, curves: list[tuple[str, list[float]]]) -> None:
    """Sigma by epoch, a panel for each site."""
    drawing, (panels,) = figure(10, 4, len(SITES))
    for panel, (site, title) in zip(panels, SITES.items(), strict=True):
        for sigma in (values for at, values in curves if at == site):
            panel.plot(range(len(sigma)), sigma, "o-", markersize=4, label=f"from {sigma[0]:g}")
        panel.set(xlabel="epoch", ylabel="learned sigma", yscale="log")
        panel.set_title(title, fontsize=9)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    asked.save(drawing)


if __name__ == "__main__":
    main()
