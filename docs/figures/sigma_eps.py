"""The budget of adversarial training that each sigma of closed-form noise is comparable with, from the records.

python docs/figures/sigma_eps.py [RESULTS] writes docs/findings/sigma_eps.md and draws
docs/findings/sigma_eps.png from the runs of specs/earlier/noisy_sigma.yaml and specs/earlier/mnist.yaml: what
`bench sweep noisy sigma --against pgd_at` prints for the source's form of the noise at a fixed sigma.
"""

from __future__ import annotations

import sys
from pathlib import Path

from records import FINDINGS, ROOT

from bench.records.store import Store
from bench.report.sweeps import map_plot
from bench.results.scope import scoped
from bench.tables.equivalence import matches, partner
from bench.tables.leaderboard import board
from bench.tables.selection import RowFilter
from bench.tables.sweep import sweep, with_anchor
from bench.tables.sweep_text import map_table, table
from bench.terminal import plain

HEAD = """# Sigma and eps on MNIST

Written by `python docs/figures/sigma_eps.py` from the records in `results/earlier/`: the output of

```
bench sweep noisy sigma --against pgd_at --dataset mnist --eps 0.1
```

for noise at the first layer with a fixed sigma. `pgd_at train_eps` is the smallest budget of PGD adversarial training
with the same accuracy, by a monotone fit through the trained budgets, with `standard` at 0; `below 0` means no better
than without a defense (for clean accuracy: no worse). noise / std(z) is sigma over the standard deviation of the first
layer's output z, noise / |W| sigma over the Frobenius norm of its weights; both from the training log.

Limits: one training seed, and no adversarial training between 0 and 0.1, so that budgets in between are interpolated
linearly. Under AutoAttack, on 100 images, the intervals of all values of sigma from 0.4 on overlap.

![sigma and the budget of equal accuracy](sigma_eps.png)
"""


def main() -> None:
    store = Store(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "earlier", read_only=True)
    store = scoped(store, dataset="mnist", eps=["0.1"])
    rows, where = board(store), RowFilter(norm="Linf")
    a = max(sweep(store, rows, "noisy", "sigma", where), key=lambda series: len(series.points))
    b = partner(store, a, [with_anchor(s) for s in sweep(store, rows, "pgd_at", "train_eps", where, least=1)])
    if b is None:
        raise SystemExit("the records hold no adversarial training on the same footing")
    found = (a, b, matches(store, a, b))
    text = "\n".join(plain(line) for line in [*table(a), "", *map_table(store, found)])
    (FINDINGS / "sigma_eps.md").write_text(f"{HEAD}\n```\n{text.strip()}\n```\n")
    plot = map_plot(found)
    if plot is not None:
        for path in plot.write(FINDINGS):
            path.replace(FINDINGS / "sigma_eps.png") if path.suffix == ".png" else path.unlink()


if __name__ == "__main__":
    main()
