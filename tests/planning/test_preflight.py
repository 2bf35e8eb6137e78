"""What can never work is refused before the first training, one line each and nothing written; the rest is let pass."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Bench, Outcome, states, tiny, write_plugins, written
from paths import ROOT

from bench.planning import catalog
from bench.planning.spec import load
from bench.planning.strict_yaml import read

torch = pytest.importorskip("torch")
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
# a folder of images that only its owner has
SPECS = [path for path in SPECS if not read(path)[0]["data"]["name"].startswith("folder:")]
RESULTS = Path("results")

IMPOSSIBLE: dict[str, tuple[str, str]] = {
    "awp without a loss": (
        "--defense awp --set awp.base=free_at",
        "defense awp (base=free_at): base 'free_at' must be one defense with a loss of its own and the ordinary step",
    ),
    "awp around noise": (
        "--defense awp --set awp.base=rse",
        "defense awp (base=rse): base 'rse' deploys a randomised model; expected a deterministic one",
    ),
    "rows": (
        "--defense noisy --set noisy.rows=10",
        "defense noisy (rows=10) with mlp on digits: rows=10, but 10 classes leave 9 competitors; use 0 for all",
    ),
    "removed setting": (
        "--defense noisy --set noisy.relu=adf",
        "defenses noisy.relu was removed; its results are in docs/findings/noisy.md",
    ),
    "weights": ("--defense noisy --set noisy.w_mse=0 --set noisy.w_prob=0", "w_mse and w_prob are both 0, so nothing"),
    "reach": (
        "--defense pgd_at --set pgd_at.steps=3",
        "defense pgd_at (steps=3): steps x step_size is 0.75 eps, less than the budget; expected",
    ),
    "start": ("--defense trades --set trades.start=zero", "the gradient of KL is 0 at the image itself; use start="),
    "deployment": (
        "--norm L2 --defense smoothadv --set smoothadv.alpha=0",
        "defenses smoothadv.alpha: input should be greater than 0",
    ),
    "image": ("--model lenet5", "model lenet5 on digits: lenet5 needs images of at least 14 x 14 pixels, got 8"),
    "depth": ("--model wide_resnet --set wide_resnet.depth=9", "model wide_resnet (depth=9) on digits: depth is 9; "),
    "attack": ("--attack autoattack --set autoattack.version=custom", "attack autoattack (version=custom): attacks_to"),
    "reach of an attack": ("--attack pgd --set pgd.steps=2", "attack pgd (steps=2): steps x step_size is "),
    "norm of a method": (
        "--norm L2 --attack torchattacks --set torchattacks.method=EADL1",
        "attack torchattacks (method=EADL1): no L2 version; norms: L1",
    ),
    "draws": (
        "--attack certify --defense smoothing --set certify.n=5",
        "attack certify (n=5): n=5 draws at alpha=0.001 can certify nothing",
    ),
    "no smoothed defense": (
        "--attack clean,certify --defense noisy,pni",
        "attack certify needs a smoothed defense, found only standard, noisy, pni; add one such as smoothing, or leave",
    ),
}


def refused(outcome: Outcome, *messages: str) -> None:
    """Exit code 2, one line an error in their order, and no results folder."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2
    assert len(lines) == len(messages), outcome.err
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line
    assert not RESULTS.exists()


@pytest.mark.parametrize(("words", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_matrix_that_cannot_work_is_an_error_of_one_line(bench: Bench, words: str, message: str) -> None:
    refused(bench("run", "--quiet", *words.split()), message)


@pytest.mark.parametrize("words", ["--attack certify --no-baseline --defense noisy", "--attack certify"])
def test_certifying_only_deterministic_models_is_an_error(bench: Bench, words: str) -> None:
    for command in ("run", "plan"):
        refused(bench(command, *words.split()), "attack certify needs a smoothed defense, found only")


ODD = '''"""A net with what others lack.

Nobody (2024)
"""
import torch.nn.functional as F
from torch import nn


class Odd(nn.Module):
    def __init__(self, inputs, head, smooth, classes):
        super().__init__()
        self.flat = nn.Flatten()
        self.first = nn.Linear(inputs.channels * inputs.size**2, 8)
        self.smooth = nn.Softsign() if smooth else nn.ReLU()
        last = nn.Linear(8, classes or inputs.classes)
        if head == "linear":
            self.head = last
        elif head == "deep":
            self.head = nn.Sequential(last)
        else:
            self.last = last

    def forward(self, x):
        last = self.head if hasattr(self, "head") else self.last
        return last(self.smooth(self.first(self.flat(x))))


def build(inputs, *, head: str = "linear", smooth: bool = False, classes: int = 0) -> nn.Module:
    return Odd(inputs, head, smooth, classes)
'''


@pytest.fixture
def odd(bench: Bench, tmp_path: Path) -> Iterator[None]:
    """The architecture `odd`, in a folder beside those of the package; seen in this process only."""
    import bench.models as package

    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "odd.py").write_text(ODD)
    package.__path__.append(str(folder))
    yield
    package.__path__.remove(str(folder))
    sys.modules.pop("bench.models.odd", None)


HEADLESS = "defense {} with odd (head=none) on digits: Odd has no linear layer 'head', found NoneType"
OF_A_NET: dict[str, tuple[str, str]] = {
    "diag": (
        "--set odd.smooth=true --defense noisy --set noisy.structure=diag",
        "defense noisy (structure=diag) with odd (smooth=True) on digits: no moment rule for call_module smooth (",
    ),
    "adjoint": (
        "--set odd.smooth=true --defense noisy --set noisy.structure=adjoint",
        "no moment rule for call_module smooth (Softsign()); use structure=jacobian",
    ),
    "rat": ("--set odd.head=none --defense rat", HEADLESS.format("rat")),
    "rat_release": ("--set odd.head=none --defense rat_release", HEADLESS.format("rat_release")),
    "deep head": ("--set odd.head=deep --defense rat", "Odd has no linear layer 'head', found Sequential"),
    "awp around rat": ("--set odd.head=none --defense awp --set awp.base=rat", HEADLESS.format("awp (base=rat)")),
    "lsa": ("--set odd.head=none --defense lsa --set lsa.layer=head", "Odd has no layer 'head' to perturb the input"),
    "logits": ("--set odd.classes=7", "model odd (classes=7) on digits: gives logits of shape (1, 7) for one image"),
}


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(("words", "message"), OF_A_NET.values(), ids=OF_A_NET)
def test_a_net_that_a_defense_cannot_train_is_an_error(bench: Bench, words: str, message: str) -> None:
    refused(bench("run", "--quiet", "--executor", "debug", "--model", "odd", *words.split()), message)


@pytest.mark.usefixtures("odd")
def test_the_same_net_is_accepted_for_a_defense_that_can_train_it(bench: Bench) -> None:
    words = ["--model", "odd", "--set", "odd.smooth=true", "--set", "odd.head=none", "--executor", "debug"]
    outcome = bench(*tiny(*words, defense="noisy,lsa,trades,awp,pni", attack="clean"), "-q")
    assert (outcome.code, outcome.err) == (0, "")


def test_all_errors_are_printed_at_once_and_each_once(bench: Bench) -> None:
    words = "--defense pgd_at,noisy --grid noisy.rows=10,11 --set pgd_at.steps=2 --seeds 0,1 --eps 0.1,0.2"
    outcome = bench("run", *words.split())
    refused(outcome, "defense pgd_at (steps=2): steps x step_size is 0.5 eps", "noisy (rows=10)", "noisy (rows=11)")
    assert "start " not in outcome.out


def test_at_most_five_errors_are_printed(bench: Bench) -> None:
    outcome = bench("run", "-q", "--defense", "noisy", "--grid", "noisy.rows=" + ",".join(map(str, range(10, 17))))
    assert outcome.code == 2
    assert outcome.err.count("error: defense noisy (rows=") == 5
    assert outcome.err.splitlines()[5:] == ["and 2 more like these"]


def test_both_executors_reject_the_same_matrices(bench: Bench) -> None:
    words = ["run", "--defense", "awp,noisy", "--set", "awp.base=free_at", "--set", "noisy.rows=12"]
    local, debug = (bench(*words, "--executor", name) for name in ("local", "debug"))
    assert (local.code, local.err) == (debug.code, debug.err)  # the devices of their plans differ
    assert local.code == 2


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_every_spec_of_the_project_is_accepted(bench: Bench, spec: Path) -> None:
    outcome = bench("plan", spec, "--check")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("words", ["--model small_cnn,preact_resnet18", "--norm L2 --eps 0.5 --defense smoothadv,awp"])
def test_every_defense_is_accepted_on_other_nets_and_under_another_norm(bench: Bench, words: str) -> None:
    spec = [] if "--norm" in words else [SPECS[[path.stem for path in SPECS].index("digits_smoke")]]
    outcome = bench("plan", *spec, "--check", *words.split())
    assert (outcome.code, outcome.err) == (0, "")


def test_a_plan_builds_models_only_with_the_option_check(bench: Bench) -> None:
    words = ["plan", "--defense", "noisy", "--set", "noisy.rows=10"]
    assert bench(*words).code == 0
    outcome = bench(*words, "--check")
    refused(outcome, "rows=10, but 10 classes leave 9 competitors")
    assert "0 done" in outcome.out


def test_without_the_check_the_jobs_fail_alone(bench: Bench, tmp_path: Path) -> None:
    words = ["--set", "noisy.rows=10", "--no-check", *write_plugins(tmp_path)]
    outcome = bench(*tiny(*words, defense="noisy,plain", attack="clean"))
    assert outcome.code == 1
    assert states(RESULTS) == {"noisy": "error", "plain": "done", "plain/clean": "done"}


def test_a_plan_names_attacks_that_do_not_apply_to_a_defense(bench: Bench) -> None:
    outcome = bench("plan", "--attack", "clean,certify", "--defense", "smoothing,noisy")
    assert (outcome.code, outcome.err) == (0, "")
    assert "absent    certify on standard, noisy: it needs a smoothed defense" in outcome.out.splitlines()
    assert "7: 3 trainings, 4 evaluations" in outcome.out
    assert "absent" not in bench("plan", "--attack", "certify", "--defense", "smoothing", "--no-baseline").out


BROKEN = '''"""min CE

Nobody (2024).
"""
from dataclasses import dataclass
from typing import Any, ClassVar
import torch.nn.functional as F
from torch import nn
from bench.core.defense import Batch, Defense, Losses


@dataclass
class Broken(Defense):
    uses_threat: ClassVar[bool] = False
    def wrap(self, net: nn.Module) -> nn.Module:
        {wrap}
        return net
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {{"ce": F.cross_entropy(net(batch.x), batch.y)}}
'''


def broken(wrap: str) -> list[object]:
    """The words of a run of a defense that does `wrap` when it wraps a net."""
    Path("broken.py").write_text(BROKEN.format(wrap=wrap))
    return tiny("--plugin", "broken.py", defense="broken", attack="clean")


def test_any_exception_of_building_is_one_line(bench: Bench) -> None:
    words = broken(r'raise RuntimeError("no such\nlayer")')
    refused(bench(*words), "broken.py:16: RuntimeError: no such layer")


def test_finished_jobs_are_not_checked_again_and_an_error_changes_no_record(bench: Bench) -> None:
    words = broken('print("loud")')
    outcome = bench(*words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert [json.loads(line)["event"] for line in outcome.out.splitlines()] == [*["started", "ok"] * 2, "row"]
    before = written(RESULTS)
    assert bench(*broken('raise ValueError("no")')).code == 0
    folders = sorted(RESULTS.iterdir())
    outcome = bench(*broken('raise ValueError("no")'), "--seeds", "0,1")
    assert (outcome.code, outcome.err) == (2, "error: defense broken with mlp on digits: no\n")
    assert written(RESULTS) == before
    assert sorted(RESULTS.iterdir()) == folders


def test_a_check_that_is_killed_rejects_nothing(bench: Bench) -> None:
    outcome = bench(*broken("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert outcome.code == 1
    assert states(RESULTS) == {"broken": "error"}


def test_a_defense_whose_first_step_takes_seconds_is_named(bench: Bench) -> None:
    loss = """        import os, time
        if not os.path.exists("tried"):
            open("tried", "w").close()
            time.sleep(4)
        return """
    Path("broken.py").write_text(BROKEN.format(wrap="pass").replace('        return {"ce"', f'{loss}{{"ce"'))
    outcome = bench(*tiny("--plugin", "broken.py", defense="broken", attack="clean"))
    assert outcome.code == 0
    assert re.search(r"^checking models.*: first step of defense broken with mlp on digits$", outcome.out, re.MULTILINE)
    assert outcome.out.count("first step") == 1


def test_the_check_does_not_change_random_generators(fresh_catalog: None) -> None:
    from bench.jobs.preflight import problems
    from bench.planning.plan import plan
    from bench.planning.spec import load

    random.seed(3)
    torch.manual_seed(3)
    expected = torch.rand(1), random.random()
    random.seed(3)
    torch.manual_seed(3)
    assert problems(plan(load(next(p for p in SPECS if p.stem == "demo")), Path()), Path()) == []
    assert (torch.rand(1), random.random()) == expected


def test_the_driver_stays_free_of_torch(tmp_path: Path) -> None:
    script = "import sys\nfrom bench.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "run", "-q", "--defense", "noisy", "--set", "noisy.rows=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("error: defense noisy (rows=10) with mlp on digits: rows=10, ")
    assert list(tmp_path.iterdir()) == []


def test_the_smoke_spec_has_every_defense_with_an_linf_version() -> None:
    (path,) = (path for path in SPECS if path.stem == "digits_smoke")
    plugins = [catalog.get("defenses", name) for name in catalog.names("defenses")]
    wanted = {plugin.name for plugin in plugins if "Linf" in plugin.norms}
    assert {entry.name for entry in load(path).defenses} == wanted
