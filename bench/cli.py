"""The command line: parses and prints. Nothing here imports torch, SciPy or pandas before a command needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench import terminal
from bench.commands import compare, gc, leaderboard, logs, merge, retry, status, timing, verify
from bench.commands import models as model_commands
from bench.commands import packs as pack_commands
from bench.commands import report as report_command
from bench.commands import sweep as sweep_command
from bench.commands.arguments import DataDir, Plugin, Results, plugins, refuse_plugins, told, typed
from bench.commands.options import MachineOptions, Only, OutputOptions, takes_groups
from bench.executors.clusters import Cluster, Machine, MissingDependency
from bench.planning.typed import Options
from bench.records.packs import PackError
from bench.training import sigterm as stopping

if TYPE_CHECKING:
    from bench.commands.run import Matrix

app = typer.Typer(
    name="bench",
    help="Train, attack, certify and time adversarial defenses under one recipe.",
    epilog="Start with `bench doctor`, `bench list`, `bench run`. An error is one line; --debug shows its traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
DEBUG = "--debug" in sys.argv or bool(os.environ.get("BENCH_DEBUG"))


def main() -> None:
    """Entry point: a user's error prints one line and exits with code 2; --debug shows the traceback."""
    sys.argv = [word for word in sys.argv if word != "--debug"]
    signal.signal(signal.SIGTERM, stopping.stopped)
    with terminal.guarded():
        _app()


def _app() -> None:
    try:
        app()
    except (ValueError, LookupError, OSError, PackError) as error:
        if DEBUG:
            raise
        _fail(told(error), 2)
    except ImportError as error:
        if DEBUG:
            raise
        _fail(str(error) if isinstance(error, MissingDependency) else f"{error}; run `bench doctor`", 3)
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


@app.callback()
def everywhere(
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Ignore BENCH_PLUGINS and refuse --plugin.")] = False,
) -> None:
    """Train, attack, certify and time adversarial defenses under one recipe."""
    refuse_plugins(no_plugins)


Check = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check", help="Build all models and defenses first (default: a run does, a plan does not)."
    ),
]


@app.command()
@takes_groups
def run(
    options: Options,
    machine: MachineOptions,
    cluster: Cluster,
    output: OutputOptions,
    executor: Annotated[str, typer.Option(help="local, debug (in this process), slurm or ray.")] = "local",
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    check: Check = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 4 if a row of this run is UNSOUND or INVALID.")
    ] = False,
    tracker: Annotated[
        str | None, typer.Option(help="Write the scalars of each training for it: tensorboard.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Train and evaluate a matrix. The same command again resumes; finished jobs are not repeated.

    Example: bench run --defense noisy --eps 8/255
    """
    from bench.commands import run as running

    matrix, here = _matrix(options, machine, data_dir, plugin)
    if dry_run:
        raise typer.Exit(running.show_plan(matrix, results_dir, bool(check), here))
    cluster.check(executor)
    if cluster.print_script:
        raise typer.Exit(running.print_script(matrix, results_dir, check is not False, here, cluster))
    mode = output.mode(sys.stdout.isatty())
    code = running.run(matrix, results_dir, mode, check is not False, executor, here, gate, cluster, tracker)
    raise typer.Exit(code)


@app.command()
@takes_groups
def plan(
    options: Options,
    machine: Annotated[MachineOptions, Only(("workers", "jobs_per_gpu", "gpus", "device"))],
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    check: Check = None,
) -> None:
    """Show what the same `bench run` would do. The jobs, which are done, the time of the rest; writes no result."""
    from bench.commands import run as running

    matrix, here = _matrix(options, machine, data_dir, plugin)
    raise typer.Exit(running.show_plan(matrix, results_dir, bool(check), here))


def _matrix(
    options: Options, machine: MachineOptions, data_dir: Path | None, plugin: list[str] | None
) -> tuple[Matrix, Machine]:
    """The planned matrix and this machine, as run and plan are given them. Raises in one line; writes nothing."""
    from bench.commands import run as running

    plugins(plugin)
    typed(model=options.model, eps=options.eps, seeds=options.seeds)
    if options.n is not None and options.n < 1:
        raise ValueError(f"--n is {options.n}; expected at least 1 test image")
    here = machine.machine()
    return running.prepare(options, data_dir), here


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="defenses, attacks, datasets or models; or a NAME alone.")] = "all",
    name: Annotated[str | None, typer.Argument(help="One of them: formula, source, settings.")] = None,
    plugin: Plugin = None,
) -> None:
    """List defenses, attacks, data sets and models. With a NAME its formula, source, settings and defaults."""
    from bench.commands import list_and_check as listing

    plugins(plugin)
    listing.show(kind, name)


app.command()(leaderboard.leaderboard)
app.command()(compare.compare)
app.command()(timing.timing)


@app.command()
def explain(
    code: Annotated[
        str | None, typer.Argument(help="Such as C8; without it all are listed.", show_default=False)
    ] = None,
) -> None:
    """Explain a soundness check. What it measures, its threshold, why it matters, what to do."""
    from bench.commands import explain as checks

    checks.show(code)


@app.command()
def check(
    name: Annotated[str | None, typer.Argument(help="A defense or attack.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every plug-in.")] = False,
    plugin: Plugin = None,
) -> None:
    """Test a defense or attack against its contract. These are the requirements of the harness on every plug-in."""
    from bench.commands import list_and_check as listing

    plugins(plugin)
    raise typer.Exit(listing.check(name, everything))


app.command()(sweep_command.sweep)
app.command()(report_command.report)
app.command(name="eval")(model_commands.eval_)
app.command()(model_commands.doctor)
app.command()(status.status)
app.command()(logs.logs)
app.command()(retry.retry)
app.command()(merge.merge)
app.command()(verify.verify)
app.command()(gc.gc)
app.command()(pack_commands.pack)
app.command()(pack_commands.unpack)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="Lower-case name; it becomes the file name.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Where (default: the checkout, or else here).")] = None,
) -> None:
    """Write a new defense or attack and its test. Both work unchanged; `bench check NAME` verifies it."""
    from bench.commands import scaffold

    for path in scaffold.write(kind, name, folder):
        print(path)


@app.command()
def worker(
    key: Annotated[str, typer.Argument(help="A job key: 12 hexadecimal digits.")],
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plugin: Plugin = None,
    over_is_done: Annotated[
        bool,
        typer.Option("--over-is-done", help="Exit with 0, not 5, if the job is done already: other jobs wait for it."),
    ] = False,
) -> None:
    """Run one job of a results folder. Executors call this command.

    Exits with 5 and does nothing if another process runs the job or it is done.
    """
    from bench.data.datasets import data_root
    from bench.jobs.attempt import HELD, WORDS, attempt

    plugins(plugin)
    state = attempt(results_dir, key, data_root(data_dir), device)
    print(f"{key} {WORDS.get(state, state)}")
    if state in WORDS:
        raise typer.Exit(0 if state == "over" and over_is_done else HELD)
    raise typer.Exit(0 if state in ("done", "unsupported") else 1)
