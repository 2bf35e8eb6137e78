"""The command line. Each command is a module of bench.commands that is imported when the command is called."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bench import terminal
from bench.commands.arguments import message_of, refuse_plugins
from bench.records.packs import PackError
from bench.training import stop_signals

COMMANDS = {
    "run": "Train and evaluate a matrix.",
    "plan": "Show what the same `bench run` would do.",
    "list": "List defenses, attacks, data sets, models and specs.",
    "leaderboard": "Write leaderboard.md and the tables from the records.",
    "compare": "Compare two defenses on the same images.",
    "timing": "Show the cost of trainings and attacks.",
    "explain": "Explain a soundness check.",
    "check": "Test a defense or attack against its contract.",
    "sweep": "Show accuracy against a setting, or search settings on validation images.",
    "badge": "Write a row as an SVG badge.",
    "report": "Write all tables and figures as one HTML file.",
    "eval": "Attack a model of your own like any other.",
    "reproduce": "Compare published numbers with ours.",
    "doctor": "Check this machine, or a model of yours.",
    "status": "Show which jobs are done, running and failed.",
    "logs": "Show the log of a job.",
    "retry": "Mark failed jobs for re-running, including diverged ones.",
    "forget": "Remove jobs of a stopped or changed run.",
    "merge": "Copy the records of other results folders.",
    "verify": "Verify checksums, evaluate stored images again, or attack again.",
    "gc": "Remove files that no result needs.",
    "pack": "Write the records of a spec to one file.",
    "unpack": "Write the records of packs as folders of the results folder.",
    "new": "Write a new defense or attack and its test.",
    "worker": "Run one job of a results folder.",
}
BUILT_IN = ("list", "eval")  # names of Python's own: their functions end with an underscore
DEBUG = "--debug" in sys.argv or bool(os.environ.get("BENCH_DEBUG"))


class CommandGroup(TyperGroup):
    """The commands of the table above, each imported when it is called: `bench --help` imports none of them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, None if there is none."""
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            module = importlib.import_module(f"bench.commands.{cmd_name}")
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name)(getattr(module, cmd_name + "_" * (cmd_name in BUILT_IN)))
            self.commands[cmd_name] = typer.main.get_command(single)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands in the output of --help."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    name="bench",
    cls=CommandGroup,
    help="Train, attack, certify and time adversarial defenses under one recipe.",
    epilog="Start with `bench doctor`, `bench list`, `bench run`. An error is one line; --debug shows its traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    """Print which bench this is, and end."""
    if asked:
        from importlib import metadata  # not before: it takes longer than the rest of this module

        print(f"bench {metadata.version('defense-bench')} from {Path(__file__).parent}")
        raise typer.Exit


@app.callback()
def all_commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and its folder."),
    ] = False,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Ignore BENCH_PLUGINS and refuse --plugin.")] = False,
) -> None:
    """Train, attack, certify and time adversarial defenses under one recipe."""
    refuse_plugins(no_plugins)


def main() -> None:
    """Entry point: a user's error prints one line and exits with code 2; --debug shows the traceback."""
    sys.argv = [word for word in sys.argv if word != "--debug"]
    stop_signals.listen()
    with terminal.guarded():
        try:
            app()
        except (ValueError, LookupError, OSError, PackError) as error:
            if DEBUG:
                raise
            _fail(message_of(error), 2)
        except ImportError as error:
            if DEBUG:
                raise
            from bench.executors.base import MissingDependency  # not before: it would slow down every command

            _fail(str(error) if isinstance(error, MissingDependency) else f"{error}; run `bench doctor`", 3)
        except KeyboardInterrupt:
            _fail("stopped", 130)


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        terminal.say(f"error: {' '.join(message.split())}", sys.stderr)
    raise SystemExit(code)
