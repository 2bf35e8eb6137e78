"""The command line: parses and prints. Nothing here imports torch, SciPy or pandas before a command needs it."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import terminal
from bench.commands import models as model_commands
from bench.commands import report as report_command
from bench.commands import store as store_commands
from bench.commands import sweep as sweep_command
from bench.commands import tables as table_commands
from bench.commands.arguments import DataDir, Dataset, Plugin, Results, Size, plugins, refuse_plugins, told, typed
from bench.executors.clusters import Cluster, Machine, MissingDependency, takes_cluster
from bench.planning.typed import Options
from bench.training import sigterm as stopping

app = typer.Typer(
    name="bench",
    help="Train, attack, certify and time adversarial defenses under one recipe.",
    epilog="Begin with `bench doctor`, `bench list`, `bench run`. A mistake is told in one line; --debug shows more.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)
DEBUG = "--debug" in sys.argv or bool(os.environ.get("BENCH_DEBUG"))

SpecFile = Annotated[Path | None, typer.Argument(help="A YAML spec; options change what it says.", show_default=False)]


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, without a traceback (unless --debug)."""
    sys.argv = [word for word in sys.argv if word != "--debug"]
    signal.signal(signal.SIGTERM, stopping.stopped)
    with terminal.guarded():
        _app()


def _app() -> None:
    try:
        app()
    except (ValueError, LookupError, OSError) as error:
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


@app.command()
@takes_cluster
def run(
    cluster: Cluster,
    spec: SpecFile = None,
    dataset: Dataset = None,
    size: Size = None,
    model: Annotated[list[str] | None, typer.Option(help="Architecture; see `bench list models`.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Repeat or separate by commas.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Repeat or separate by commas.")] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Budgets attacked, such as 8/255 or 0.1,0.2.")] = None,
    train_eps: Annotated[str | None, typer.Option(help="Budget trained at (default: the largest --eps).")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of every training (default: the recipe's).")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="Such as 0,1,2.")] = None,
    n: Annotated[int | None, typer.Option(help="Test images (default: all).")] = None,
    train_n: Annotated[int | None, typer.Option(help="Training images (default: all).")] = None,
    validation: Annotated[int | None, typer.Option(help="Training images kept apart to choose an epoch by.")] = None,
    recipe: Annotated[str | None, typer.Option(help="shared (one for all) or paper (each defense's own).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Such as noisy.sigma=0.6 or train.average=ema.")
    ] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Several values, such as trades.beta=1,6.")] = None,
    baseline: Annotated[bool, typer.Option(help="Add the defense `standard`, the baseline of every ratio.")] = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Jobs at a time (default: one a core or GPU slot).")
    ] = None,
    jobs_per_gpu: Annotated[int | None, typer.Option(min=1, help="Default: by their measured memory.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Such as 0,2 (default: those that nobody uses).")] = None,
    time_limit: Annotated[str | None, typer.Option(help="Such as 30m; a job that takes longer is killed.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    executor: Annotated[str, typer.Option(help="local, debug (in this process), slurm or ray.")] = "local",
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check", help="Build all models and defenses first (default: a run does, a plan does not)."
        ),
    ] = None,
    checks: Annotated[str | None, typer.Option(help="Soundness checks: quick, full or off (default: quick).")] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 4 if a row of this run is UNSOUND or INVALID.")
    ] = False,
    tracker: Annotated[
        str | None, typer.Option(help="Write the scalars of each training for it: tensorboard.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final table only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON event a line on stdout.")] = False,
) -> None:
    """Train and evaluate a matrix. The same command again resumes and redoes nothing.

    Example: bench run --defense noisy --eps 8/255
    """
    from bench.commands import run as running

    plugins(plugin)
    typed(model=model, eps=eps, seeds=seeds)
    options = Options(
        spec, dataset, size, model or [], defense or [], attack or [], norm, eps or [], train_eps, epochs,
        seeds or [], n, train_n, recipe, set_ or [], grid or [], baseline, validation, checks,
    )  # fmt: skip
    if n is not None and n < 1:
        raise ValueError(f"--n is {n}; expected at least 1 test image")
    machine = Machine.of(device, workers, jobs_per_gpu, gpus, time_limit)
    matrix = running.prepare(options, data_dir)
    mode = "json" if as_json else "quiet" if quiet else "live" if sys.stdout.isatty() else "plain"
    if dry_run:
        raise typer.Exit(running.show_plan(matrix, results_dir, bool(check), machine))
    cluster.check(executor)
    if cluster.print_script:
        raise typer.Exit(running.print_script(matrix, results_dir, check is not False, machine, cluster))
    code = running.run(matrix, results_dir, mode, check is not False, executor, machine, gate, cluster, tracker)
    raise typer.Exit(code)


def plan(**options: Any) -> None:
    """Show what the same `bench run` would do. Jobs, what is done, how long the rest took before; writes nothing."""
    run(**options, dry_run=True)


_OF_A_RUN_ONLY = (
    "dry_run",
    "time_limit",
    "quiet",
    "as_json",
    "executor",
    "gate",
    "tracker",
    *Cluster.__dataclass_fields__,
)
_same = inspect.signature(run, eval_str=True)
plan.__signature__ = _same.replace(  # type: ignore[attr-defined]
    parameters=[p for name, p in _same.parameters.items() if name not in _OF_A_RUN_ONLY]
)
plan.__annotations__ = run.__annotations__
app.command()(plan)


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


for command in ("leaderboard", "compare", "timing"):
    app.command()(getattr(table_commands, command))


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
    """Test a defense or attack against its contract. The contract is what a plug-in owes the harness."""
    from bench.commands import list_and_check as listing

    plugins(plugin)
    raise typer.Exit(listing.check(name, everything))


app.command()(sweep_command.sweep)
app.command()(report_command.report)
app.command(name="eval")(model_commands.eval_)
app.command()(model_commands.doctor)
for command in ("status", "logs", "retry", "merge", "verify", "gc"):
    app.command()(getattr(store_commands, command))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="Lower-case name; it becomes the file name.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Where (default: the checkout, or else here).")] = None,
) -> None:
    """Write a new defense or attack and its test. Both work as they are; `bench check NAME` says so."""
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
        bool, typer.Option("--over-is-done", help="Exit with 0, not 5, where the job is over: others wait for it.")
    ] = False,
) -> None:
    """Do one job of a results folder. Every executor starts this; nobody needs to type it.

    Exits with 5, and does nothing, where another process is at it or it is over.
    """
    from bench.data.datasets import data_root
    from bench.jobs.attempt import HELD, WORDS, attempt

    plugins(plugin)
    state = attempt(results_dir, key, data_root(data_dir), device)
    print(f"{key} {WORDS.get(state, state)}")
    if state in WORDS:
        raise typer.Exit(0 if state == "over" and over_is_done else HELD)
    raise typer.Exit(0 if state in ("done", "unsupported") else 1)
