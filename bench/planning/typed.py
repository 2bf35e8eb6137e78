"""Options that describe a matrix or a model of the user's. Free of pydantic and YAML, which --help does not need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class Options:
    """What was typed; None or empty means "not typed". Each field is an option of `bench run` and `bench plan`."""

    spec: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML spec, or a name of `bench list specs`; options override its values.", show_default=False
        ),
    ] = None
    dataset: Annotated[str | None, typer.Option(help="See `bench list datasets`, or folder:PATH.")] = None
    size: Annotated[int | None, typer.Option(help="Resize a folder's images to this many pixels.")] = None
    model: Annotated[list[str], typer.Option(help="Architecture; see `bench list models`, or timm:NAME.")] = field(
        default_factory=list
    )
    defense: Annotated[list[str], typer.Option(help="Repeat or separate by commas.")] = field(default_factory=list)
    attack: Annotated[list[str], typer.Option(help="Repeat or separate by commas.")] = field(default_factory=list)
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1.")] = None
    eps: Annotated[list[str], typer.Option(help="Budgets of the attacks, such as 8/255 or 0.1,0.2.")] = field(
        default_factory=list
    )
    train_eps: Annotated[
        str | None, typer.Option(help="Budget of the training, or each (default: the largest --eps).")
    ] = None
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training (default: the recipe's).")] = None
    seeds: Annotated[list[str], typer.Option(help="Such as 0,1,2.")] = field(default_factory=list)
    n: Annotated[int | None, typer.Option(help="Test images of each attack (default: 1000, or all if fewer).")] = None
    train_n: Annotated[int | None, typer.Option(help="Training images (default: all).")] = None
    recipe: Annotated[str | None, typer.Option(help="shared (one for all) or paper (each defense's own).")] = None
    set: Annotated[list[str], typer.Option("--set", help="Such as noisy.sigma=0.6 or train.average=ema.")] = field(
        default_factory=list
    )
    grid: Annotated[list[str], typer.Option(help="Several values, such as trades.beta=1,6.")] = field(
        default_factory=list
    )
    baseline: Annotated[bool, typer.Option(help="Add the defense `standard`, the baseline of every ratio.")] = True
    validation: Annotated[
        int | None, typer.Option(help="Training images held out, on which epochs and settings are chosen.")
    ] = None
    checks: Annotated[str | None, typer.Option(help="Soundness checks: quick, full or off (default: quick).")] = None


@dataclass(frozen=True)
class ModelOptions:
    """A model of the user's as named on the command line. `name`: the name of its row, set by the command `eval`."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="A checkpoint (.safetensors, .pt, .pth), hf:OWNER/REPO[/FILE][@REVISION], FILE.py:FUNCTION or "
            "robustbench:NAME.",
            show_default=False,
        ),
    ] = None
    checkpoint: Annotated[
        str | None, typer.Option(metavar="<path>", help="Weights: safetensors, a weights-only .pt, or hf:OWNER/REPO.")
    ] = None
    arch: Annotated[str | None, typer.Option(help="Its architecture; see `bench list models`, or timm:NAME.")] = None
    arch_set: Annotated[list[str], typer.Option(help="A setting of the architecture, such as width=32; repeat.")] = (
        field(default_factory=list)
    )
    model_file: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION; the function returns a net from [0,1] images to logits.")
    ] = None
    normalise: Annotated[
        str | None,
        typer.Option(
            "--normalize",
            "--normalise",
            help="none, dataset or MEAN/STD (default: the checkpoint's, else the data set's).",
        ),
    ] = None
    randomised: Annotated[
        bool,
        typer.Option("--randomized", "--randomised", help="The model is stochastic: it draws noise at test time."),
    ] = False
    name: str | None = None

    @property
    def given(self) -> bool:
        """Whether any option names a model."""
        return self != ModelOptions(randomised=self.randomised)
