"""Options that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.terminal import say

if TYPE_CHECKING:
    from bench.records.store import Store

Results = Annotated[Path, typer.Option("--results-dir", help="Folder of the records.", envvar="BENCH_RESULTS")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Data in torchvision's layout.", envvar="BENCH_DATA")]
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A plug-in file, or an installed package's entry point; repeat."),
]
Dataset = Annotated[str | None, typer.Option(help="See `bench list datasets`, or folder:PATH.")]
Size = Annotated[int | None, typer.Option(help="Resize a folder's images to this many pixels.")]
Check = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check", help="Build all models and defenses first (default: a run does, a plan does not)."
    ),
]

_refused = False


def refuse_plugins(refused: bool) -> None:
    """Set whether this command refuses all plug-ins; if so BENCH_PLUGINS is cleared, for workers too."""
    global _refused
    _refused = refused
    if refused:
        os.environ.pop("BENCH_PLUGINS", None)


def plugins(named: list[str] | None) -> None:
    """Pass the plug-ins named by --plugin to the catalog and to every worker, by the environment."""
    if named and _refused:
        raise ValueError(f"--no-plugins refuses every plug-in, and --plugin names {named[0]}; leave one out")
    if named:
        from bench.planning.catalog import plugin_file

        os.environ["BENCH_PLUGINS"] = os.pathsep.join(str(plugin_file(each)) for each in named)


def command(verb: str, kind: str, path: Path) -> str:
    """The `bench` command that checks or runs this plug-in of a kind, to be typed in the working folder.

    `verb`: "check", or "run".
    """
    from bench.planning import catalog

    built_in = path.resolve().parent == catalog.built_in("defenses" if kind == "defense" else "attacks")
    here = path.resolve()
    shown = shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))
    if verb == "check":
        return f"bench check {path.stem if built_in else shown}"
    chosen = f"--defense {path.stem}" if kind == "defense" else f"--attack clean,{path.stem}"
    return f"bench run {chosen}{'' if built_in else f' --plugin {shown}'}"


def require_values(**lists: list[str] | None) -> None:
    """Raises ValueError for a list option without a value, such as `--eps ""` or `--seeds ,`."""
    for name, words in lists.items():
        if words and not any(part.strip() for word in words for part in word.split(",")):
            raise ValueError(f"--{name} is empty; name at least one or leave the option out")


def output_file(path: Path, option: str = "--output") -> Path:
    """The file to write. Raises IsADirectoryError if it is a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; name a file in it")
    return path


def existing(folder: Path) -> Path:
    """The results folder. Raises FileNotFoundError if it does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}; run `bench run` first or pass --results-dir")
    return folder


def opened(folder: Path) -> Store:
    """The results folder, to be read only. Raises FileNotFoundError if it does not exist. Damaged files are named."""
    from bench.records.store import Store

    store = Store(existing(folder), read_only=True)
    warn(store.damages())
    return store


def warn(lines: list[str]) -> None:
    """Name on stderr the jobs and records that are passed over because they are damaged."""
    for line in lines:
        say(f"warning: {line}", sys.stderr)


def message_of(error: Exception) -> str:
    """The text of an error for the user: without the quotes of a KeyError; an error of the system with its file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
