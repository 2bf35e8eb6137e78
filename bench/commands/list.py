"""`bench list`: defenses, attacks, data sets, models and specs, and one of them in full."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Plugin, plugins
from bench.data import datasets
from bench.planning import catalog, describe, shipped_specs
from bench.planning.options import spec_file
from bench.terminal import say

KINDS = ("defenses", "attacks", "datasets", "models", "specs")
COLUMNS = {
    "defenses": "cost of a training step in forward passes F an image, and the paper",
    "attacks": "norms, and the paper",
    "datasets": "channels x height x width, and how many images",
    "models": "architectures; all take images in [0,1] and normalize them inside",
    "specs": "matrices for `bench run NAME`",
}


def list_(
    kind: Annotated[str, typer.Argument(help="defenses, attacks, datasets, models or specs; or a NAME alone.")] = "all",
    name: Annotated[str | None, typer.Argument(help="One of them: formula, source, settings.")] = None,
    plugin: Plugin = None,
) -> None:
    """List defenses, attacks, data sets, models and specs. With a NAME its formula, source, settings and defaults."""
    plugins(plugin)
    if name is None and (kind in datasets.KNOWN or any(kind in catalog.names(each) for each in catalog.KINDS)):
        kind, name = "datasets" if kind in datasets.KNOWN else "all", kind
    if kind not in (*KINDS, "all"):
        raise LookupError(f"no list of '{kind}'.{catalog.suggest(kind, list(KINDS))} Known: {', '.join(KINDS)}")
    if name is not None:
        _one(kind, name)
        return
    for place, each in enumerate(KINDS if kind == "all" else (kind,)):
        if kind == "all":
            say(("\n" if place else "") + f"{each} ({COLUMNS[each]})")
        if each == "datasets":
            _dataset_lines()
        elif each == "specs":
            _spec_lines()
        else:
            _plugin_lines(each)  # type: ignore[arg-type]
    if kind == "all":
        say("\nbench list NAME shows one in detail: formula, source, settings")


def _plugin_lines(kind: catalog.Kind) -> None:
    for name in catalog.names(kind):
        try:
            plugin = catalog.get(kind, name)
        except ValueError as error:
            say(f"  {name:16} broken: {error}")
            continue
        say(_line(plugin))


def _line(plugin: catalog.Plugin) -> str:
    """Name, cost (defenses) or norms (attacks), and the method's name with its citation; what a model is."""
    if plugin.kind == "models":
        return f"  {plugin.name:16} {plugin.formula}"
    middle = ""
    if plugin.kind == "defenses":
        middle = plugin.constant("cost", "")
    elif plugin.kind == "attacks":
        middle = "/".join(plugin.norms) if plugin.uses_threat else "no budget"
    source = plugin.source or plugin.formula
    brief = source[: source.find(")") + 1] or source
    return f"  {plugin.name:16} {middle:30} {brief}"


def _dataset_lines() -> None:
    for facts in datasets.KNOWN.values():
        shape = f"{facts.channels}x{facts.size}x{facts.size}"
        say(f"  {facts.name:16} {shape:14} {facts.title} ({facts.train} train, {facts.test} test)")
    say(f"  {'folder:PATH':16} {'any':14} your images: PATH/train/<class>/*, PATH/test/<class>/*")


def _spec_lines() -> None:
    for name, path in shipped_specs.names().items():
        say(f"  {name:16} {shipped_specs.summary(path)}")


def _one(kind: str, name: str) -> None:
    if kind == "specs":
        say(spec_file(Path(name)).read_text(encoding="utf-8").rstrip())
        return
    if kind == "datasets":
        facts = datasets.facts(name, datasets.data_root(None))
        say(f"{facts.name}: {facts.title}")
        say(f"  images {facts.channels} x {facts.size} x {facts.size}, {facts.classes} classes")
        say(f"  {facts.train} training and {facts.test} test images; default model {facts.default_model}")
        say(f"  normalization inside the model: mean {facts.mean}, std {facts.std}; augmentation {facts.augment}")
        return
    if kind == "all":
        kind = next((k for k in catalog.KINDS if name in catalog.names(k)), "defenses")
    plugin = catalog.get(kind, name)  # type: ignore[arg-type]
    say(f"{plugin.name}\n  {plugin.formula}\n\n{plugin.source}")
    if plugin.notes:
        say(f"\n{plugin.notes}")
    say("\nsettings (name = default  [what it takes])" if plugin.fields else "\nno settings")
    for field in plugin.fields:
        say(f"  {field.name} = {describe.default(field.default)}  [{describe.values(field)}]")
        if field.doc:
            say(f"      {field.doc}")
    for preset, values in describe.presets(plugin).items():
        say(f"  preset={preset} stands for {values}")
    lines = [f"{fact}: {words}" for fact, words in describe.facts(plugin).items()]
    say("\n" + "\n".join([*lines, *([""] if lines else []), describe.example(plugin)]))
