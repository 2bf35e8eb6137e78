"""Three lenet5 of one recipe trained together against one after another: is it worth its code?

python benchmarks/p8_seeds.py               measures (two minutes of one core), stores, writes docs/performance.md
python benchmarks/p8_seeds.py --write-docs  writes the page again from the stored record

Together: stacked weights under torch.func's vmap, or grouped convolutions with batched matrix products. The gate: after
a step from equal weights and images the weights agree with those of the three alone to 1e-5. One step is a standard one
or one of PGD adversarial training with 3 steps; plain SGD, batch 128 for each net, one thread, A-B-B-A.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from paired import Record, alternate, bar, bar_table, conditions, heading, ranged, store, table, write_docs
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from bench.models import lenet5
from bench.models.common import Inputs

NETS, BATCH, LR, STEP, PAIRS = 3, 128, 1e-3, 0.02, 8
METHODS = {"standard": 0, "pgd_at (steps=3)": 3}  # steps of the attack
WORTH = 1.3  # the speedup from which the code would be kept
Weights = dict[str, Tensor]


def solo(nets: list[nn.Module], x: Tensor, y: Tensor, steps: int) -> None:
    """One training step of each net after the other, in channels_last, their best layout."""
    for net, own_x, own_y in zip(nets, x, y, strict=True):
        adv = own_x
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(net(adv), own_y, reduction="sum"), adv)
            adv = (adv.detach() + STEP * g.sign()).clamp(0, 1)
        weights = list(net.parameters())
        found = torch.autograd.grad(F.cross_entropy(net(adv), own_y), weights)
        with torch.no_grad():
            torch._foreach_sub_(weights, [LR * g for g in found])


def stacked(nets: list[nn.Module]) -> Weights:
    """The weights of all nets, one more axis in front."""
    return {name: value.detach().clone() for name, value in stack_module_state(nets)[0].items()}  # type: ignore[arg-type]


class Vmapped:
    """All nets by one call of vmap."""

    def __init__(self, nets: list[nn.Module]) -> None:
        base = copy.deepcopy(nets[0])
        self.weights, self.buffers = stacked(nets), stack_module_state(nets)[1]

        def loss(weights: Weights, x: Tensor, buffers: Weights, y: Tensor, reduction: str) -> Tensor:
            return F.cross_entropy(functional_call(base, (weights, buffers), (x,)), y, reduction=reduction)

        self.in_weights = vmap(grad(lambda w, x, b, y: loss(w, x, b, y, "mean")))
        self.in_images = vmap(grad(lambda x, w, b, y: loss(w, x, b, y, "sum")))

    def step(self, x: Tensor, y: Tensor, steps: int) -> None:
        for _ in range(steps):
            x = (x + STEP * self.in_images(x, self.weights, self.buffers, y).sign()).clamp(0, 1)
        found = self.in_weights(self.weights, x, self.buffers, y)
        for name, value in self.weights.items():
            value -= LR * found[name]


class Grouped:
    """All nets as one: their channels side by side in grouped convolutions."""

    def __init__(self, nets: list[nn.Module]) -> None:
        self.weights = {name: value.requires_grad_() for name, value in stacked(nets).items()}
        self.normalize = nets[0].get_submodule("normalise")

    def logits(self, x: Tensor) -> Tensor:
        """Of images (k b 1 h w), shape (k b 10)."""
        k, w = len(x), self.weights
        h = self.normalize(x.flatten(0, 1)).view_as(x).squeeze(2).transpose(0, 1)
        for name, padding in (("conv1", 2), ("conv2", 0)):
            weight, bias = w[f"{name}.weight"].flatten(0, 1), w[f"{name}.bias"].flatten()
            h = F.max_pool2d(F.conv2d(h, weight, bias, padding=padding, groups=k).relu(), 2)
        h = h.reshape(len(h), k, -1).transpose(0, 1)
        for name in ("fc1", "fc2"):
            h = torch.baddbmm(w[f"{name}.bias"][:, None], h, w[f"{name}.weight"].transpose(1, 2)).relu()
        return torch.baddbmm(w["head.bias"][:, None], h, w["head.weight"].transpose(1, 2))

    def step(self, x: Tensor, y: Tensor, steps: int) -> None:
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten(), reduction="sum"), x)
            x = (x.detach() + STEP * g.sign()).clamp(0, 1)
        loss = F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]
        found = torch.autograd.grad(loss, list(self.weights.values()))
        with torch.no_grad():
            for value, g in zip(self.weights.values(), found, strict=True):
                value -= LR * g


TOGETHER: dict[str, Callable[[list[nn.Module]], Vmapped | Grouped]] = {"vmap": Vmapped, "grouped": Grouped}


def measure() -> Record:
    """Both ways of training together, for each method, after their gate."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = Inputs(1, 28, 10, (0.1307,), (0.3081,))
    nets = [lenet5.build(inputs).to(memory_format=torch.channels_last) for _ in range(NETS)]  # type: ignore[call-overload]
    x, y = torch.rand(NETS, BATCH, 1, 28, 28), torch.randint(0, 10, (NETS, BATCH))
    rows = []
    for method, steps in METHODS.items():
        for way, build in TOGETHER.items():
            apart = agreement(nets, build, x, y, steps)
            if apart > 1e-5:
                raise SystemExit(f"gate failed: weights of {method} by {way} differ by {apart:.1e} from those alone")
            together = build(nets)
            peer, ours = partial(solo, copy.deepcopy(nets), x, y, steps), partial(together.step, x, y, steps)
            times = alternate(peer, ours, pairs=PAIRS, repeats=8)
            rows.append({"method": method, "way": way, "apart": apart, **times})
    record: Record = {**conditions("p8_seeds"), "nets": NETS, "batch": BATCH, "rows": rows}
    text = f"{NETS} lenet5 trained together at least {WORTH} times as fast as one after another"
    record["bars"] = [bar(text, max(row["ratio"] for row in rows), WORTH)]
    return record


def agreement(
    nets: list[nn.Module], build: Callable[[list[nn.Module]], Vmapped | Grouped], x: Tensor, y: Tensor, steps: int
) -> float:
    """Largest difference of a weight after one step together and alone."""
    alone, together = copy.deepcopy(nets), build(nets)
    solo(alone, x, y, steps)
    together.step(x, y, steps)
    expected = stacked(alone)
    return max(float((value.detach() - expected[name]).abs().max()) for name, value in together.weights.items())


def written(record: Record) -> str:
    """Its part of the page."""
    lines = [
        [row["method"], row["way"], f"{row['peer_ms']:.1f}", f"{row['ours_ms']:.1f}", ranged(row)]
        for row in record["rows"]
    ]
    header = ["method", "together by", "one after another, ms", "together, ms", "ratio"]
    return heading(record) + bar_table(record["bars"]) + "\n" + table(header, lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write-docs", action="store_true", help="measure nothing")
    if not options.parse_args().write_docs:
        store(measure(), "p8_seeds.json")
    write_docs("p8_seeds", written)


if __name__ == "__main__":
    sys.exit(main())
