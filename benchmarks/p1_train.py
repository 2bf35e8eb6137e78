"""A training step: of each defense against standard training, and of five defenses against plain reference loops.

python benchmarks/p1_train.py               measures (90 s on one core), writes benchmarks/results/p1_train.json, docs
python benchmarks/p1_train.py --write-docs  writes docs/performance.md again from the stored records
python benchmarks/p1_train.py --device cuda --arch preact_resnet18 --batch 512 --steps 60 --output p1_train_cuda.json

Pairs of steps in the order A-B-B-A in one process, one thread, CPU time (on a GPU: wall clock between two
synchronizations); median and range of the paired ratios. A gate comes first: from the same weights and the same random
draws both loss curves must agree to 1 % over all steps, every adversarial image must lie in the ball, and ours may not
make more forward passes. A pair that fails the gate has no ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import plain_loops
import torch
from memory import activations
from paired import bar, bar_table, conditions, heading, ranged, seconds, spread, store, table, write_docs
from torch import Tensor, nn

from bench import plugins
from bench.core.defense import Batch, Defense
from bench.data.images import to_channels_last as laid_out
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.training.cost import profile_step
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe
from defenses.noisy import Noisy

EPS = "0.1"
TOLERANCE = 0.01  # of the loss, over all steps
COUNTED = 8  # images of the counted first step on a CPU; a GPU counts, and warms up, on the whole batch
# architecture -> images a step, timed steps a side
CASES = {"lenet5": (128, 8), "small_cnn": (64, 5)}
PASS = {"schedule": "constant", "epochs": 1, "batch_size": 128, "augment": False}
SGD = {**PASS, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
ADAM = {**PASS, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0}
# label -> defense, its settings, plain loop, step in units of eps (the same on both sides)
PAIRS: dict[str, tuple[str, dict[str, Any], Any, float]] = {
    "PGD-AT": ("pgd_at", {}, plain_loops.PGDAT, 0.25),
    "TRADES": ("trades", {"rel_step_size": 0.25}, plain_loops.TRADES, 0.25),
    "AT-AWP": ("awp", {"base": {"name": "pgd_at"}, "gamma": 1e-2, "warmup": 0.0}, plain_loops.ATAWP, 0.25),
    "TRADES-AWP": (
        "awp",
        {"base": {"name": "trades", "set": {"rel_step_size": 0.25}}, "warmup": 0.0},
        plain_loops.TRADESAWP,
        0.25,
    ),
    "RAT as released": ("rat_release", {}, plain_loops.RATRelease, 0.25),
}
# rows of the second table besides the defaults of every defense
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "awp": [{"warmup": 0.0}],
    "noisy": [
        {},
        {"site": "input", "sigma": 1.5, "w_mse": 0.0, "probes": 0},  # preset=input
        {"structure": "diag"},
        {"structure": "adjoint"},
        {"structure": "adjoint", "rows": 4},
    ],
}
# passes in F where the declaration of the defense is a formula without a number
NEEDED = {"noisy_sampled": 3.0, "lsa": 13.0}  # 3 draws; K + 3


def inputs(arch: str) -> Inputs:
    if arch == "lenet5":
        return Inputs(1, 28, 10, (0.0,), (1.0,))
    return Inputs(3, 32, 10, (0.0,) * 3, (1.0,) * 3)


def make_net(arch: str, device: torch.device, defense: Defense | None = None) -> nn.Module:
    """Untrained, always the same weights; with a defense, wrapped and laid out as the engine does it."""
    torch.manual_seed(0)
    net = plugins.build_model(arch, {}, inputs(arch))
    if defense is None:
        return net.to(device).train()
    return defense.wrap(net).to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def make_batch(arch: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of ten classes, a random pattern each under noise: quick to learn, so that the loss curve moves."""
    random, facts = torch.Generator().manual_seed(1), inputs(arch)
    shape = (facts.channels, facts.size, facts.size)
    y = torch.arange(count) % facts.classes
    pattern = (torch.rand(facts.classes, *shape, generator=random) > 0.7).float()
    noise = torch.randn(count, *shape, generator=random)
    x = (0.6 * pattern[y] + 0.3 * noise).clamp(0.01, 0.99)  # so that no start 0.001 N(0,1) away leaves the box
    return x.to(device), y.to(device)


def make_defense(name: str, settings: dict[str, Any]) -> Defense:
    norm = "Linf" if "Linf" in getattr(plugins.load("defenses", name), "norms", ("Linf",)) else "L2"
    made: Defense = plugins.make("defenses", PluginChoice(name, settings), JobThreat(norm, EPS))
    return made


class Ours:
    """A defense's step as the engine makes it, with its last adversarial images at hand."""

    def __init__(self, arch: str, name: str, settings: dict[str, Any], recipe: dict[str, Any], x: Tensor, y: Tensor):
        self.defense = make_defense(name, settings)
        self.net = make_net(arch, x.device, self.defense)
        self.updater = build_updater(self.defense, self.net, Recipe.model_validate(recipe), 1000)
        self.batch = Batch(laid_out(x), y, torch.arange(len(x), device=x.device), 0, 0.5)
        self.x_adv: Any = None
        inner = self.defense.inner

        def keep(net: nn.Module, batch: Batch) -> Any:
            self.x_adv = inner(net, batch)
            return self.x_adv

        self.defense.inner = keep  # type: ignore[method-assign]

    def step(self) -> Tensor:
        terms = self.defense.step(self.net, self.updater, self.batch)
        return torch.stack([value.detach() for value in terms.values()]).sum()

    def cost(self, count: int | None = None) -> dict[str, float]:
        """Of one step, which it makes: passes an image and work in F, as the training loop counts them."""
        whole = self.batch
        part = replace(whole, x=whole.x[:count], y=whole.y[:count], index=whole.index[:count])
        with forwards(self.net) as seen:
            terms, cost = profile_step(self.defense, self.net, self.updater, part)
        loss = float(sum(value.detach() for value in terms.values()))
        return {**cost, "forwards_per_image": seen[0] / len(part.x) - 1, "loss": loss}


class Plain:
    """The reference loop on a net of the default layout."""

    def __init__(
        self, arch: str, loop: Any, alpha: float, x: Tensor, y: Tensor, to_channels_last: torch.memory_format
    ) -> None:
        self.net = make_net(arch, x.device).to(memory_format=to_channels_last)  # type: ignore[call-overload]
        optimizer = plain_loops.sgd(self.net, SGD["lr"], SGD["momentum"], SGD["weight_decay"])
        self.loop = loop(self.net, optimizer, float(EPS), alpha)
        self.x, self.y = x.contiguous(memory_format=to_channels_last), y
        self.x_adv = x

    def step(self) -> Tensor:
        loss, self.x_adv = self.loop.step(self.x, self.y)
        return loss

    def cost(self, count: int | None = None) -> dict[str, float]:
        """As of ours; proxies and copies of the net count too."""

        class Counted:
            def step(_, net: nn.Module, updater: Any, batch: Batch) -> dict[str, Tensor]:
                return {"loss": self.loop.step(batch.x, batch.y)[0]}

        part = Batch(self.x[:count], self.y[:count], self.y[:count], 0, 0.5)
        with forwards(self.net) as seen:
            terms, cost = profile_step(Counted(), self.net, None, part)  # type: ignore[arg-type]
        return {**cost, "forwards_per_image": seen[0] / len(part.x) - 1, "loss": float(terms["loss"])}


@contextmanager
def forwards(net: nn.Module) -> Iterator[list[int]]:
    """Images that went forward through any net of this class, the copies a loop makes among them."""
    seen = [0]

    def count(module: nn.Module, args: Any, out: Any) -> None:
        if type(module) is type(net) and out.dim() == 2:
            seen[0] += len(args[0])

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def same_draws() -> Iterator[None]:
    """Random draws that do not depend on the memory layout, so that both sides start from the same points."""
    randn_like, uniform = torch.randn_like, Tensor.uniform_

    def normal(like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(torch.randn(like.shape, dtype=like.dtype, device=like.device))

    def within(self: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.copy_(uniform(torch.empty(self.shape, dtype=self.dtype, device=self.device), low, high))

    torch.randn_like, Tensor.uniform_ = normal, within  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.randn_like, Tensor.uniform_ = randn_like, uniform  # type: ignore[method-assign]


def against_plain(
    label: str, arch: str, batch: int, steps: int, device: torch.device, to_channels_last: torch.memory_format
) -> dict[str, Any]:
    """Gate and ratio of one defense; the steps timed are the steps of the gate, after one for warm-up and counting."""
    name, settings, loop, alpha = PAIRS[label]
    x, y = make_batch(arch, batch, device)
    ours = Ours(arch, name, settings, SGD, x, y)
    plain = Plain(arch, loop, alpha * float(EPS), x, y, to_channels_last)
    ratios, times, off, feasible = [], {"plain": [], "ours": []}, [], True
    with same_draws():
        costs, started = {}, time.perf_counter()
        for side, one in (("plain", plain), ("ours", ours)):
            torch.manual_seed(0)
            costs[side] = one.cost(batch if device.type == "cuda" else COUNTED)
        warm = time.perf_counter() - started
        off.append(abs(costs["ours"]["loss"] / costs["plain"]["loss"] - 1))
        for k in range(1, steps + 1):
            loss = {}
            for side, one in (("plain", plain), ("ours", ours))[:: 1 if k % 2 else -1]:
                used, loss[side] = seconds(one.step, device, k)
                times[side].append(used)
            ratios.append(times["plain"][-1] / times["ours"][-1])
            off.append(abs(float(loss["ours"]) / float(loss["plain"]) - 1))
            feasible &= all(in_ball(ours.defense, x, one.x_adv) for one in (plain, ours))
    fewer = costs["ours"]["forwards_per_image"] <= costs["plain"]["forwards_per_image"]
    gate = {"loss_off": max(off), "in_ball": feasible, "no_more_forwards": fewer}
    passed = max(off) <= TOLERANCE and feasible and fewer
    return {
        "label": label,
        "defense": name,
        "set": settings,
        "arch": arch,
        "batch": batch,
        "steps": steps,
        "plain_layout": "contiguous" if to_channels_last == torch.contiguous_format else "channels_last",
        "gate": {**gate, "passed": passed},
        "ours": {**costs["ours"], "ms": 1000 * statistics.median(times["ours"])},
        "plain": {**costs["plain"], "ms": 1000 * statistics.median(times["plain"])},
        "warm_up_s": warm,
        **(spread(ratios) if passed else {"ratio": None}),
    }


def in_ball(defense: Defense, x: Tensor, x_adv: Tensor) -> bool:
    try:
        defense.threat.check(x, x_adv)
    except ValueError:
        return False
    return True


def needed(name: str, defense: Defense) -> float:
    """F a step by the defense's own declaration, at these settings."""
    if isinstance(defense, Noisy):
        # mean and variance, or the net itself; 3 more for each probe and each row, but for diag
        pulled = 3.0 * ((defense.probes if defense.w_mse else 0) + defense.rows)
        return {"jacobian": 3.0 + pulled, "diag": 6.0, "adjoint": 6.0 + pulled}[defense.structure]
    return NEEDED[name] if name in NEEDED else float(defense.cost.rpartition("=")[2].partition("F")[0])


def against_standard(arch: str, batch: int, device: torch.device, pairs: int = 5) -> list[dict[str, Any]]:
    """Passes, time and activation memory of each defense's step, the last two relative to standard training's."""
    x, y = make_batch(arch, batch, device)
    standard, rows = Ours(arch, "standard", {}, ADAM, x, y), []
    standard.step()
    base = activations(standard.step, standard.net, x)
    names = sorted(set(catalog.names("defenses")) - {"standard"})
    for name, settings in [(known, one) for known in ["standard", *names] for one in VARIANTS.get(known, [{}])]:
        ours = Ours(arch, name, settings, ADAM, x, y)
        cost = ours.cost()
        ours.step()
        memory, ratios, times = activations(ours.step, ours.net, x), [], []
        for k in range(pairs):
            used = {}
            for side, one, repeats in (("ours", ours, 1), ("standard", standard, 2))[:: 1 if k % 2 else -1]:
                used[side], _ = seconds(one.step, device, k, repeats)
            ratios.append(used["ours"] / used["standard"])
            times.append(used["ours"])
        rows.append(
            {
                "defense": name,
                "set": settings,
                "arch": arch,
                "batch": batch,
                "norm": ours.defense.threat.norm,
                "needed_f": needed(name, ours.defense),
                **cost,
                "ms": 1000 * statistics.median(times),
                **spread(ratios),
                "saved_mb": memory.saved / 2**20,
                "peak_mb": memory.peak / 2**20,
                "saved_ratio": memory.saved / base.saved,
                "peak_ratio": memory.peak / base.peak,
            }
        )
        print(brief(rows[-1]), flush=True)
    return rows


def brief(row: dict[str, Any]) -> str:
    keys = ("label", "defense", "set", "arch", "plain_layout", "ratio", "low", "high", "work_per_image_f", "gate")
    keys += ("needed_f", "saved_ratio", "peak_ratio")
    short = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if k in keys}
    return json.dumps(short)


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars this benchmark was written for, where the record has what they are about."""
    found = []
    rows = {(row["defense"], json.dumps(row["set"], sort_keys=True)): row for row in record["steps"]}
    for loop in record["loops"]:
        if (loop["label"], loop["arch"], loop["plain_layout"]) == ("PGD-AT", "lenet5", "contiguous"):
            found.append(bar("PGD-AT on lenet5 at least 1.5 times as fast as the plain loop", loop["ratio"], 1.5))
    if rows:
        worst = max(row["work_per_image_f"] / row["needed_f"] for row in rows.values())
        found.append({"bar": "no defense above its needed passes (work / needed)", "value": worst, "met": worst <= 1.0})
    limits = [({"structure": "diag"}, 2.2), ({"structure": "adjoint", "rows": 4}, 8.0)]
    for kind, what in (("saved", "saved for backward"), ("peak", "peak of all allocated")):
        for settings, limit in limits:
            row = rows.get(("noisy", json.dumps(settings, sort_keys=True)))
            if row is not None:
                about = "noisy " + ", ".join(f"{k}={v}" for k, v in settings.items())
                text, value = f"{what} by {about} at most {limit:g} times standard's", row[f"{kind}_ratio"]
                found.append({"bar": text, "value": value, "met": value <= limit})
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    device = torch.device(args.device)
    cases = CASES if args.arch is None else {args.arch: CASES.get(args.arch, (64, 8))}
    cases = {arch: (args.batch or batch, args.steps or steps) for arch, (batch, steps) in cases.items()}
    began, used = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {
        **conditions("p1_train", args.device),
        "eps": EPS,
        "steps": [],
        "loops": [],
    }
    for arch, (batch, steps) in cases.items():
        for label in PAIRS:
            record["loops"].append(against_plain(label, arch, batch, steps, device, torch.contiguous_format))
            print(brief(record["loops"][-1]), flush=True)
    arch, (batch, steps) = next(iter(cases.items()))
    record["loops"].append(against_plain("PGD-AT", arch, batch, steps, device, torch.channels_last))
    print(brief(record["loops"][-1]), flush=True)
    record["steps"] = against_standard(arch, batch, device)
    record["took_s"] = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
    return record


def written(record: dict[str, Any]) -> str:
    """The generated part of the document for one record."""
    text = heading(record) + bar_table(bars(record))
    text += "\nAgainst plain loops, from the same weights and draws:\n\n"
    header = ["method", "net", "batch", "plain loop's layout", "F ours", "F plain", "forwards ours / plain",
              "loss off by at most", "ms ours", "ms plain", "plain / ours"]  # fmt: skip
    lines = []
    for row in record["loops"]:
        ours, plain = row["ours"], row["plain"]
        lines.append([
            row["label"], row["arch"], str(row["batch"]), row["plain_layout"], f"{ours['work_per_image_f']:.1f}",
            f"{plain['work_per_image_f']:.1f}", f"{ours['forwards_per_image']:g} / {plain['forwards_per_image']:g}",
            f"{100 * row['gate']['loss_off']:.2g} %", f"{ours['ms']:.0f}", f"{plain['ms']:.0f}", ranged(row),
        ])  # fmt: skip
    text += table(header, lines)
    first = record["steps"][0]
    text += f"\nEach defense against `standard`, {first['arch']}, batch {first['batch']}:\n\n"
    header = ["defense", "settings", "forwards", "backwards", "F", "F needed", "ms", "time / standard",
              "saved for backward, MB", "saved / standard", "peak / standard"]  # fmt: skip
    lines = []
    for row in record["steps"]:
        settings = ", ".join(f"{k}={v}" for k, v in row["set"].items()) or "-"
        lines.append([
            f"`{row['defense']}`", settings, f"{row['forwards_per_image']:g}", f"{row['backwards_per_image']:g}",
            f"{row['work_per_image_f']:.1f}", f"{row['needed_f']:g}", f"{row['ms']:.0f}", ranged(row),
            f"{row['saved_mb']:.1f}", f"{row['saved_ratio']:.2f}", f"{row['peak_ratio']:.2f}",
        ])  # fmt: skip
    return text + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--arch", help="one architecture instead of lenet5 and small_cnn")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--steps", type=int, help="timed steps a side")
    parser.add_argument("--output", default="p1_train.json", help="file name in benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.write_docs:
        for one in bars(store(measure(args), args.output)):
            print(json.dumps(one))
    write_docs("p1_train", written)


if __name__ == "__main__":
    main()
