"""`bench verify`: parses; bench.jobs.verify and bench.jobs.attack_again verify."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, existing, plugins
from bench.data.datasets import data_root
from bench.jobs import verify as verifying
from bench.records.store import Store


def verify(
    pack: Annotated[
        Path | None, typer.Argument(help="A pack (default: the results folder).", show_default=False)
    ] = None,
    sample: Annotated[
        float, typer.Option(help="Share of the evaluations with stored images to evaluate again.")
    ] = 0.01,
    full: Annotated[bool, typer.Option("--full", help="Evaluate all of them again.")] = False,
    attack_again: Annotated[
        int | None,
        typer.Option(help="Repeat this many evaluations of the pack, drawn at random.", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(help="Images of each that are attacked again, drawn at random.")] = 200,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, file or hf:OWNER/REPO/FILE with weights of the pack; repeat (default: NAME.yaml beside it)."
        ),
    ] = None,
    draw: Annotated[
        int | None, typer.Option(help="Number that chooses, with the pack (default: a new one, printed).")
    ] = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Verify checksums, evaluate stored images again, or attack again. Exit code 4 if something changed.

    Example: bench verify results/mine.zip --attack-again 5 --weights results
    """
    plugins(plugin)
    root = data_root(data_dir)
    if pack is None:
        if attack_again is not None or weights:
            raise ValueError("--attack-again and --weights are for a pack; name it: bench verify results/NAME.zip ...")
        raise typer.Exit(verifying.verify(Store(existing(results_dir)), sample, full, root))
    if full:
        raise ValueError(f"--full looks at stored images, which a pack has none of; for {pack}: --attack-again K")
    if attack_again is None and draw is not None:
        raise ValueError("--draw is for --attack-again K, which is not given")
    from bench.jobs.attack_again import Sample, verify_pack

    chosen = secrets.randbits(32) if draw is None else draw
    again = None if attack_again is None else Sample(attack_again, images, chosen)
    raise typer.Exit(verify_pack(pack, again, weights or [], root))
