"""The commands list, check and doctor."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.data import datasets
from bench.doctor import installed
from bench.planning import catalog, describe

KINDS = ("defenses", "attacks", "datasets", "models")
COLUMNS = {
    "defenses": "cost of a training step in forward passes F an image, and the paper",
    "attacks": "norms, and the paper",
    "datasets": "channels x height x width, and how many images",
    "models": "architectures; all take images in [0,1] and normalize them inside",
}


def show(kind: str, name: str | None) -> None:
    """List plug-ins and data sets, or show one of them in full; a name alone, `bench list noisy`, is found too."""
    if name is None and (kind in datasets.KNOWN or any(kind in catalog.names(each) for each in catalog.KINDS)):
        kind, name = "datasets" if kind in datasets.KNOWN else "all", kind
    if kind not in (*KINDS, "all"):
        raise LookupError(f"no list of '{kind}'.{catalog.suggest(kind, list(KINDS))} Known: {', '.join(KINDS)}")
    if name is not None:
        _one(kind, name)
        return
    for place, each in enumerate(KINDS if kind == "all" else (kind,)):
        if kind == "all":
            print(("\n" if place else "") + f"{each} ({COLUMNS[each]})")
        _dataset_lines() if each == "datasets" else _plugin_lines(each)  # type: ignore[arg-type]
    if kind == "all":
        print("\nbench list NAME shows one in detail: formula, source, settings")


def _plugin_lines(kind: catalog.Kind) -> None:
    for name in catalog.names(kind):
        try:
            plugin = catalog.get(kind, name)
        except ValueError as error:
            print(f"  {name:16} broken: {error}")
            continue
        print(_line(plugin))


def _line(plugin: catalog.Plugin) -> str:
    """Name, cost (defenses) or norms (attacks), and the method's name with its citation; what a model is."""
    if plugin.kind == "models":
        return f"  {plugin.name:16} {plugin.formula}"
    middle = ""
    if plugin.kind == "defenses":
        middle = plugin.constant("cost", "")
    elif plugin.kind == "attacks":
        norms = plugin.constant("norms", ("Linf", "L2", "L1"))
        middle = "/".join(norms) if plugin.constant("uses_threat", True) else "no budget"
    source = plugin.source or plugin.formula
    brief = source[: source.find(")") + 1] or source
    return f"  {plugin.name:16} {middle:30} {brief}"


def _dataset_lines() -> None:
    for facts in datasets.KNOWN.values():
        shape = f"{facts.channels}x{facts.size}x{facts.size}"
        print(f"  {facts.name:16} {shape:14} {facts.title} ({facts.train} train, {facts.test} test)")
    print(f"  {'folder:PATH':16} {'any':14} your images: PATH/train/<class>/*, PATH/test/<class>/*")


def _one(kind: str, name: str) -> None:
    if kind == "datasets":
        facts = datasets.facts(name, datasets.data_root(None))
        print(f"{facts.name}: {facts.title}")
        print(f"  images {facts.channels} x {facts.size} x {facts.size}, {facts.classes} classes")
        print(f"  {facts.train} training and {facts.test} test images; default model {facts.default_model}")
        print(f"  normalization inside the model: mean {facts.mean}, std {facts.std}; augmentation {facts.augment}")
        return
    if kind == "all":
        kind = next((k for k in catalog.KINDS if name in catalog.names(k)), "defenses")
    plugin = catalog.get(kind, name)  # type: ignore[arg-type]
    print(f"{plugin.name}\n  {plugin.formula}\n\n{plugin.source}")
    if plugin.notes:
        print(f"\n{plugin.notes}")
    print("\nsettings (name = default  [what it takes])" if plugin.fields else "\nno settings")
    for field in plugin.fields:
        print(f"  {field.name} = {describe.default(field.default)}  [{describe.values(field)}]")
        if field.doc:
            print(f"      {field.doc}")
    for preset, values in describe.presets(plugin).items():
        print(f"  preset={preset} stands for {values}")
    told = [f"{fact}: {words}" for fact, words in describe.facts(plugin).items()]
    print("\n" + "\n".join([*told, *([""] if told else []), describe.example(plugin)]))


def check(name: str | None, everything: bool) -> int:
    """Contract tests of one plug-in or of all; gives the exit code."""
    if (name is None) == (not everything):
        raise ValueError("bench check takes a NAME or --all")
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    wanted = [(kind, each) for kind in kinds for each in catalog.names(kind) if everything or each == name]
    if not wanted:
        known = [each for kind in kinds for each in catalog.names(kind)]
        hint = catalog.suggest(str(name), known) or " `bench list` names them; a file elsewhere needs --plugin FILE"
        raise LookupError(f"no defense or attack '{name}'.{hint}")
    from bench import contract, plugins

    failed = 0
    for kind, each in wanted:
        plugin = catalog.get(kind, each)
        cls = plugins.load(kind, each)
        results = (contract.check_defense if kind == "defenses" else contract.check_attack)(cls)
        bad = [(what, detail) for what, ok, detail in results if not ok]
        print(f"{'FAIL' if bad else 'ok  '} {plugin.kind}/{each}: {len(results) - len(bad)}/{len(results)} checks")
        for what, detail in bad:
            print(f"     {what}: {detail}")
        failed += bool(bad)
    return 1 if failed else 0


def doctor(results: Path, data_dir: Path | None) -> int:
    """Checks of the environment, one line each; exit code 3 if one fails."""
    lines = [
        _python(),
        *_packages(),
        *installed.lines(),
        *_devices(),
        _disk(results),
        _results(results),
        _data(data_dir),
    ]
    for state, text in lines:
        print(f"{state:4}  {text}")
    return 3 if any(state == "FAIL" for state, _ in lines) else 0


def _python() -> tuple[str, str]:
    good = sys.version_info >= (3, 11)
    return ("OK" if good else "FAIL"), f"Python {platform.python_version()}" + ("" if good else "; 3.11 is needed")


def _packages() -> list[tuple[str, str]]:
    found = []
    for name in ("torch", "torchvision", "pyautoattack", "pandas", "scipy", "scikit-learn", "safetensors", "pydantic"):
        try:
            found.append(("OK", f"{name} {version(name)}"))
        except PackageNotFoundError:
            found.append(("FAIL", f"{name} is missing; pip install {name}"))
    return found


def _devices() -> list[tuple[str, str]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [("OK", f"CPU with {cores} usable cores")]
    if not torch.cuda.is_available():
        return [*lines, ("WARN", "no GPU: 32x32 networks such as preact_resnet18 will take days")]
    for place in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(place)
        lines.append(("OK", f"GPU {place} {torch.cuda.get_device_name(place)}, {free >> 20} of {total >> 20} MiB free"))
    return lines


def _disk(results: Path) -> tuple[str, str]:
    place = next(p for p in (results.resolve(), *results.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free >> 20
    return ("OK" if free > 2048 else "WARN"), f"{free} MiB free for results"


def _results(results: Path) -> tuple[str, str]:
    place = next(p for p in (results.resolve(), *results.resolve().parents) if p.exists())
    good = os.access(place, os.W_OK)
    return ("OK" if good else "FAIL"), f"results folder {results} " + ("writable" if good else "is read-only")


def _data(data_dir: Path | None) -> tuple[str, str]:
    root = datasets.data_root(data_dir)
    if not root.is_dir():
        return "OK", f"data folder {root} does not exist yet; downloads go there (digits needs none)"
    held = [name for name, place in (("mnist", "MNIST"), ("cifar10", "cifar-10-batches-py")) if (root / place).is_dir()]
    return "OK", f"data folder {root}: {', '.join(held) or 'empty'}"
