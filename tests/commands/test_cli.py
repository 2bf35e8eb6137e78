"""The command line: a user's mistake is one line on stderr and exit code 2, and nothing heavy is imported early."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from harness import Bench
from paths import ROOT

SPEC = """\
data: {name: digits, test: 20}
threat: {norm: Linf, eps: 0.1}
defenses: [standard]
attacks: [clean]
"""

MISTAKES: dict[str, tuple[str, str]] = {
    "unknown defense": ("--defense nosy", "no defense 'nosy'. Did you mean 'noisy'? Known: "),
    "unknown attack": ("--attack pdg", "no attack 'pdg'. Did you mean 'pgd'? Known: "),
    "unknown model": ("--model mpl", "no model 'mpl'. Did you mean 'mlp'? Known: "),
    "unknown data set": ("--dataset minst", "no data set 'minst'. Did you mean 'mnist'? Known: "),
    "eps in pixels": ("--eps 8", "eps 8 under Linf is larger than the pixel range [0,1]; did you mean 8/255?"),
    "eps by zero": ("--eps 8/0", "'8/0' divides by zero; expected a number such as 8/255"),
    "eps negative": ("--eps -1", "'-1' is negative; expected a number >= 0 such as 8/255"),
    "eps a word": ("--eps small", "'small' is not a number; expected one such as 8/255, 0.03 or 8e-3"),
    "norm the attack lacks": ("--norm L1 --attack fgsm", "attack fgsm has no L1 version; its norms: Linf, L2"),
    "one attack of two lacks the norm": ("--norm L1 --attack clean,square,pgd", "leave it out: clean, pgd can stay"),
    "unknown norm": ("--norm L7", "threat.norm: Input should be 'Linf', 'L2' or 'L1', got 'L7'"),
    "no data folder": ("--data-dir none", "no data folder none; --data-dir or BENCH_DATA names an existing one"),
    "eps empty": ("--eps ,", "--eps is empty; name at least one or leave the option out"),
    "seeds empty": ("--seeds ,", "--seeds is empty; name at least one or leave the option out"),
    "model empty": ("--model ,", "--model is empty; name at least one or leave the option out"),
    "n zero": ("--n 0", "--n is 0; expected at least 1 test image"),
    "n negative": ("--n -3", "--n is -3; expected at least 1 test image"),
    "n beyond": ("--n 361", "data.test is 361, but the test set of digits has 360 images"),
    "train-n beyond": ("--train-n 1438", "data.train is 1438, but digits has 1437 training images"),
    "sigma zero": ("--defense noisy --set noisy.sigma=0", "noisy.sigma: input should be greater than 0, got '0'"),
    "sigma negative": ("--defense noisy --set noisy.sigma=-1", "noisy.sigma: input should be greater than 0"),
    "unknown setting": ("--set noisy.sigm=1", "noisy has no setting 'sigm'. Did you mean 'sigma'? Known: "),
    "set without owner": ("--set sigma=1", "--set takes NAME.SETTING=VALUE such as noisy.sigma=0.6, got 'sigma=1'"),
    "no attack": ("--attack ,", "attacks is empty; expected at least one entry"),
    "seeds": ("--seeds one", "--seeds takes whole numbers such as 0,1,2, got 'one'"),
    "recipe": ("--recipe mine", "recipe: Input should be 'shared' or 'paper', got 'mine'"),
    "executor": ("--executor pbs", "--executor is 'pbs'; expected local, debug, slurm or ray"),
    "device": ("--device tpu", "--device is 'tpu'; expected auto, cpu or cuda"),
    "results below a file": ("--results-dir file/results", "cannot write results folder file/results: Not a directory"),
    "results are a file": ("--results-dir file", "cannot write results folder file: File exists"),
    "no plug-in": ("--plugin none.py", "no plug-in file none.py; expected a .py file with one defense or attack"),
    "plug-in no python": ("--plugin file", "no plug-in file file; expected a .py file"),
    "no spec": ("none.yaml", "no spec file none.yaml"),
}
IN_A_SPEC: dict[str, tuple[str, str]] = {
    "unknown key": (SPEC + "speed: 1\n", "mine.yaml, line 5: unknown key 'speed' in the spec. Did you mean 'seeds'?"),
    "unknown inner key": (SPEC.replace("test", "tets"), "mine.yaml, line 1: unknown key 'tets' in data. Did you mean"),
    "duplicate key": (SPEC + "threat: {}\n", "mine.yaml, line 5: duplicate key 'threat' (first on line 2)"),
    "no attacks": (SPEC.replace("[clean]", "[]"), "mine.yaml, line 4: attacks is empty; expected at least one entry"),
    "eps": (SPEC.replace("0.1", "8"), "mine.yaml, line 2: threat: eps 8 under Linf is larger than the pixel range"),
    "code": (SPEC + "name: !!python/object/apply:os.getcwd []\n", "mine.yaml, line 5: tag tag:yaml.org,2002:python/"),
    "sigma": (SPEC.replace("[standard]", "[{name: noisy, set: {sigma: 0}}]"), "noisy.sigma: input should be greater"),
    "defense": (SPEC.replace("standard", "standart"), "no defense 'standart'. Did you mean 'standard'? Known: "),
    "no yaml": ("{", "mine.yaml, line 1: expected the node content"),
    "empty": ("", "mine.yaml: expected a mapping such as 'defenses: [noisy]'"),
}
ELSEWHERE: dict[str, tuple[str, str]] = {
    "list kind": ("list defence", "no list of 'defence'. Did you mean 'defenses'? Known: defenses, attacks, datasets"),
    "list name": ("list defenses nosy", "no defense 'nosy'. Did you mean 'noisy'?"),
    "list data set": ("list datasets minst", "no data set 'minst'. Did you mean 'mnist'?"),
    "status": ("status --results-dir none", "no results folder none; run `bench run` first or pass --results-dir"),
    "leaderboard": ("leaderboard --results-dir none", "no results folder none; run `bench run` first"),
    "worker path": ("worker ../../../etc", "'../../../etc' is not a job key; expected 12 hexadecimal digits"),
    "worker key": ("worker 0123456789ab", "no job 0123456789ab in results"),
    "check": ("check nosy", "no defense or attack 'nosy'. Did you mean 'noisy'?"),
    "check nothing": ("check", "bench check takes a NAME, a FILE or --all"),
    "new kind": (
        "new defence mine",
        "cannot make a new 'defence'; expected defense or attack. Did you mean 'defense'?",
    ),
    "new name": ("new defense ../mine", "'../mine' is not a plug-in name; expected lower-case letters"),
}


def one_line(bench: Bench, words: str, message: str) -> None:
    """The command ends with code 2, one line on stderr, nothing on stdout and nothing written."""
    before = sorted(Path().rglob("*"))
    outcome = bench(*words.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_an_option_is_one_line(bench: Bench, words: str, message: str) -> None:
    Path("file").write_text("in the way")
    one_line(bench, f"run {words}", message)


@pytest.mark.parametrize(("text", "message"), IN_A_SPEC.values(), ids=IN_A_SPEC)
def test_a_mistake_in_a_spec_is_one_line(bench: Bench, text: str, message: str) -> None:
    Path("mine.yaml").write_text(text)
    one_line(bench, "run mine.yaml", message)


@pytest.mark.parametrize(("words", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_mistake_in_another_command_is_one_line(bench: Bench, words: str, message: str) -> None:
    one_line(bench, words, message)


def test_a_data_folder_that_is_not_the_data_set_is_one_line(bench: Bench) -> None:
    Path("data").mkdir()
    one_line(bench, "run --dataset mnist --data-dir data", "no MNIST/raw/train-images-idx3-ubyte in data; expected")
    one_line(bench, "run --dataset cifar10 --data-dir data", "no cifar-10-batches-py/data_batch_1 in data; expected")
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(gzip.compress(b"still packed"))
    one_line(bench, "run --dataset mnist --data-dir data", "is not MNIST: magic number 1f8b")


@pytest.mark.parametrize("words", ["run --defence noisy", "run --epochs 0", "run --workers 0", "plam", "run --n many"])
def test_what_typer_refuses_is_a_usage_error(bench: Bench, words: str) -> None:
    outcome = bench(*words.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: " in outcome.err
    assert "Traceback" not in outcome.err


def test_typer_suggests_the_option_and_the_command(bench: Bench) -> None:
    assert "--defense" in bench("run", "--defence", "noisy").err
    assert "plan" in bench("plam").err.splitlines()[-1]


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "list", "defenses", "nosy", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "LookupError" in done.stderr


HEAVY = ("torch", "torchvision", "scipy", "pandas", "sklearn", "matplotlib", "torchattacks", "numpy")
WRAPPER = """
import sys
from bench.cli import main
sys.argv = ["bench", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    print(stop.code, [name for name in %r if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    ["--help", "run --help", "list", "list defenses noisy", "plan", "plan --defense noisy", "run --dry-run", "status"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path, words: str) -> None:
    (tmp_path / "results").mkdir()
    assert all(util.find_spec(name) for name in ("torch", "scipy", "pandas"))  # so that their absence says something
    command = [sys.executable, "-c", WRAPPER % (HEAVY,), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stderr in ("0 []\n", "None []\n")
    assert done.stdout


def test_the_version_is_told_with_its_place(bench: Bench) -> None:
    outcome = bench("--version")
    assert outcome.code == 0
    assert re.fullmatch(rf"bench \d+\.\d+\.\d+ from {re.escape(str(ROOT / 'bench'))}\n", outcome.out)


def test_the_plan_shows_the_matrix_and_writes_nothing(bench: Bench) -> None:
    Path("mine.yaml").write_text(SPEC.replace("[standard]", "[standard, {name: trades, grid: {beta: [1, 6]}}]"))
    outcome = bench("plan", "mine.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    for line in (
        "data      digits, models mlp, seeds 0",
        "threat    Linf eps 0.1 (0.1000)",
        "attacks   clean n=20",
        "devices   cpu",
        "jobs      6: 3 trainings, 3 evaluations; 0 done, 6 to do",
    ):
        assert line in outcome.out.splitlines()
    clock = r"(\d+ min \d\d s|\d+ s)"
    expected = rf"time      about {clock} \({clock} to {clock}\) on \d+ slots, estimated from the cost model"
    assert re.fullmatch(expected, outcome.out.splitlines()[-2])
    hours = r"\d(\.\d+)?"
    assert re.fullmatch(rf"cost      about {hours} CPU hours \({hours} to {hours}\)", outcome.out.splitlines()[-1])
    assert sorted(Path().rglob("*")) == [Path("mine.yaml")]
    Path("mine.yaml").write_text(SPEC.replace("test: 20", "validation: 30, split: validation"))
    assert "attacks   clean n=9, on validation images" in bench("plan", "mine.yaml", "--n", "9").out.splitlines()


def test_lists_name_everything_and_details_show_the_settings(bench: Bench) -> None:
    everything = bench("list").out
    for name in ("noisy", "pgd", "mlp", "cifar10", "folder:PATH"):
        assert f"  {name} " in everything
    for kind in ("defenses", "attacks", "datasets", "models"):
        assert set(bench("list", kind).out.splitlines()) <= set(everything.splitlines())
    shown = bench("list", "defenses", "noisy").out
    assert "  sigma = 0.6  [float > 0]" in shown.splitlines()
    assert "bench run --defense noisy --set noisy.sigma=0.6" in shown.splitlines()
    assert bench("list", "datasets", "digits").out.startswith("digits: ")
    for line in bench("list", "defenses").out.splitlines():  # cost and paper of each
        assert re.search(r"F\b.*\b(19|20)\d\d\b", line), line


def test_details_of_a_defense_show_formula_defaults_and_what_differs(bench: Bench) -> None:
    shown = bench("list", "defenses", "rat").out
    assert shown.splitlines()[1].startswith("  min_w E[ CE(f(x), y) + beta (w0 KL")
    assert "Paper against release: " in shown
    for line in (
        "  beta = 6.0  [float >= 0]",
        "  noise = gaussian  [gaussian | uniform | laplace]",
        "  start = normal  [uniform | normal | zero]",
        "  attack_bn_mode = eval  [eval | train | train_frozen_stats]",
        "cost: (2 steps + 7) F = 27F (of a training step, in forward passes F an image; a backward pass is 2F, to the "
        "image alone F)",
    ):
        assert line in shown.splitlines()
    assert "  cc = null  [float >= 0, <= 1 or null]" in bench("list", "defenses", "rat_release").out.splitlines()


def test_a_broken_plug_in_is_listed_as_broken(bench: Bench) -> None:
    Path("mine.py").write_text("@dataclass\nclass Mine(Defense):\n    sigma: Tensor = 1\n")
    outcome = bench("list", "defenses", "--plugin", "mine.py")
    assert outcome.code == 0
    assert "  mine             broken: " in outcome.out
    assert "  noisy " in outcome.out


def test_status_of_an_empty_folder(bench: Bench) -> None:
    Path("results").mkdir()
    outcome = bench("status")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("0 jobs in results")
