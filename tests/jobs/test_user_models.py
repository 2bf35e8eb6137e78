"""A model of the user's as a row: loaded strictly or refused in one line, measured first, then attacked."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from harness import Bench, Outcome, written
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.commands.eval import prepare_model
from bench.data import datasets
from bench.data.images import load, to_float
from bench.jobs.evaluation_job import run_evaluation
from bench.jobs.load_checkpoint import fill, read
from bench.jobs.progress_file import ProgressFile
from bench.planning.typed import ModelOptions, Options
from bench.records.record import Record, TrainMetrics, audit_findings
from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.rows import rows
from bench.soundness import audit_model

ARCH = ("--arch", "mlp", "--arch-set", "width=64", "--arch-set", "depth=1")
FAST = ("--attack", "clean", "--n", 20, "--checks", "off", "--device", "cpu")
MINE = """\
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12))

def broken():
    raise RuntimeError("out of luck")

def nothing():
    return 3

def color():
    return nn.Conv2d(3, 10, 8)
"""


def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the normalization that only architectures of bench have."""
    return {name: value for name, value in state.items() if not name.startswith("normalise.")}


def evaluate(bench: Bench, *words: object) -> Outcome:
    return bench("eval", *words, *FAST)


def imported(results: Path = Path("results")) -> tuple[str, Record]:
    """Key and record of the only import in a results folder."""
    found = [(job.key, record) for job, record in Store(results).records() if job.kind == "import"]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file(nets.weights(), path)
    return path


def test_own_weights_imported_get_the_very_verdicts_of_the_run_that_trained_them(bench: Bench) -> None:
    chosen = ("--attack", "clean,pgd", "--n", 40, "--checks", "off", "--device", "cpu")
    run = bench("run", "--defense", "standard", "--epochs", 4, "--train-n", 400, *chosen, "--results-dir", "a")
    assert run.code == 0
    weights = next(Path("a").glob("*/weights-last.safetensors"))
    assert bench("eval", weights, "--arch", "mlp", *chosen, "--results-dir", "b").code == 0
    found: list[dict[str, Any]] = []
    for name in ("a", "b"):
        store = Store(Path(name))
        jobs = {job.attack.name: job.key for job in store.jobs().values() if job.kind == "evaluate"}
        found.append({attack: store.samples(key) for attack, key in jobs.items()})
    assert found[0].keys() == found[1].keys() == {"clean", "pgd"}
    for attack, columns in found[0].items():
        assert columns.keys() == found[1][attack].keys()
        for column, values in columns.items():
            assert values.tobytes() == found[1][attack][column].tobytes(), (attack, column)
    assert 0 < found[0]["pgd"]["correct"].sum() < found[0]["clean"]["correct"].sum()


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "without our buffers": ours,
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled and parallel": lambda state: {f"_orig_mod.module.{name}": value for name, value in ours(state).items()},
    "wrapped": lambda state: {f"net.model.{name}": value for name, value in ours(state).items()},
    "state_dict": lambda state: {"state_dict": ours(state), "epoch": 3},
    "model": lambda state: {"epoch": 3, "model": {f"module.{name}": value for name, value in state.items()}},
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "average": lambda state: {"model_ema": {name: 0 * value for name, value in state.items()}, "model": state},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_every_usual_form_of_a_checkpoint_gives_the_same_weights(form: str, bench: Bench) -> None:
    torch.save(WRAPPED[form](nets.weights()), "net.pt")
    outcome = evaluate(bench, "net.pt", *ARCH)
    assert outcome.code == 0
    assert ("weights those of 'model'; the checkpoint also holds model_ema" in outcome.out) == (form == "average")
    key, record = imported()
    stored = load_file(Path("results") / key / "weights-last.safetensors")
    for name, value in nets.weights().items():
        expected = value.half().float() if form == "half" else value
        assert torch.equal(stored[name], expected), name
    assert record.metrics.clean_accuracy > 0.85
    assert record.metrics.parameters == sum(v.numel() for v in ours(nets.weights()).values())
    assert not (Path("results") / key / "blocks").exists()


@pytest.mark.parametrize("name", ["net.ckpt", "net.pth.tar", "net.bin"])
def test_the_content_of_a_checkpoint_decides_how_it_is_read(name: str, bench: Bench) -> None:
    torch.save(nets.weights(), name)
    assert evaluate(bench, name, *ARCH).code == 0


def test_8_bit_floats_and_missing_counts_of_batches_are_read(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    small = {name: value.to(torch.float8_e4m3fn) for name, value in net.state_dict().items() if value.dim()}
    torch.save(small, tmp_path / "net.pt")
    state, note = read(tmp_path / "net.pt")
    assert note == ""
    fill(net, state, datasets.KNOWN["digits"], "net.pt")
    assert torch.equal(net[0].weight, state["0.weight"].float())


class Evil:
    """A pickle that writes a file when it is loaded by a loader that runs what it finds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_a_malicious_pickle_is_refused_and_not_run(bench: Bench) -> None:
    torch.save({"state_dict": Evil()}, "evil.pt")
    Path("old.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "old.pt"):
        for command in ("eval", "doctor"):
            outcome = bench(command, name, *ARCH)
            assert outcome.code == 2
            assert outcome.err.count("\n") == 1
            assert f"error: {name} is not a weights-only checkpoint (" in outcome.err
            assert "nothing in it was run" in outcome.err
            assert not Path("pwned").exists()
    assert not Path("results").exists()
    torch.load("evil.pt", weights_only=False)  # the attack is real
    assert Path("pwned").exists()


PARSES = """\
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.parse_args()
"""


def _save(state: dict[str, Tensor]) -> None:
    torch.save(state, "bad.pt")


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in nets.weights().items() if key != name}


def _classes(k: int) -> dict[str, Tensor]:
    return {**nets.weights(), "head.weight": torch.zeros(k, 64), "head.bias": torch.zeros(k)}


BAD: dict[str, tuple[Callable[[], object], str, str]] = {
    "absent": (lambda: None, "bad.pt --arch mlp", "no checkpoint bad.pt"),
    "absent, of no architecture": (lambda: None, "bad.pt", "no checkpoint bad.pt"),
    "folder": (lambda: Path("bad.pt").mkdir(), "bad.pt --arch mlp", "checkpoint bad.pt is a folder; expected a file"),
    "empty": (lambda: Path("bad.pt").touch(), "bad.pt --arch mlp", "checkpoint bad.pt is empty"),
    "text": (
        lambda: Path("bad.pt").write_text("weights: none\n"),
        "bad.pt --arch mlp",
        "bad.pt is not a weights-only checkpoint (UnpicklingError)",
    ),
    "damaged safetensors": (
        lambda: Path("bad.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{}"),
        "bad.safetensors --arch mlp",
        "bad.safetensors is a damaged safetensors file: ",
    ),
    "whole model": (
        lambda: torch.save(nets.mlp(), "bad.pt"),
        "bad.pt --arch mlp",
        "bad.pt is not a weights-only checkpoint (holds bench.models.mlp.MLP); nothing in it was run. Save the weights",
    ),
    "TorchScript": (
        lambda: torch.jit.script(torch.nn.Linear(2, 2)).save("bad.pt"),
        "bad.pt --arch mlp",
        "bad.pt is not a weights-only checkpoint (a TorchScript program); nothing in it was run. Save the weights "
        "alone, torch.save(net.state_dict(), FILE) or as safetensors; or let a function of yours load it: FILE.py:FUNC",
    ),
    "no tensors": (
        lambda: torch.save({"epoch": 3, "lr": 0.1}, "bad.pt"),
        "bad.pt --arch mlp",
        "bad.pt holds a dict with epoch, lr; expected tensors by name, at the top or in state_dict, model_state_dict",
    ),
    "a list": (lambda: torch.save([1, 2], "bad.pt"), "bad.pt --arch mlp", "bad.pt holds list; expected tensors"),
    "another architecture": (
        lambda: _save(nets.weights()),
        "bad.pt --arch lenet5 --dataset mnist",
        "bad.pt does not fit this architecture: 8 missing (first: conv1.weight), 2 unexpected (first: hidden.0.weight) "
        "of 12 keys",
    ),
    "missing": (
        lambda: _save(_without("head.bias")),
        "bad.pt ARCH",
        "bad.pt does not fit this architecture: 1 missing (first: head.bias) of 6 keys",
    ),
    "unexpected": (
        lambda: _save({**nets.weights(), "noise.sigma": torch.ones(1)}),
        "bad.pt ARCH",
        "bad.pt does not fit this architecture: 1 unexpected (first: noise.sigma) of 6 keys",
    ),
    "classes": (lambda: _save(_classes(100)), "bad.pt ARCH", "bad.pt has 100 classes at head.weight, digits has 10"),
    "shape": (
        lambda: _save(nets.weights()),
        "bad.pt --arch mlp --arch-set depth=1",
        "bad.pt has shape (64, 64) at hidden.0.weight; this architecture has (256, 64) there",
    ),
    "not finite": (
        lambda: _save({**nets.weights(), "head.bias": torch.full((10,), torch.nan)}),
        "bad.pt ARCH",
        "bad.pt holds values at head.bias that are not finite numbers",
    ),
    "two normalizations": (
        lambda: _save(nets.weights()),
        "bad.pt ARCH --normalize 0.3/0.4",
        "the checkpoint holds its own normalization (mean 0, std 1); leave --normalize out",
    ),
    "no architecture": (
        lambda: _save(nets.weights()),
        "bad.pt",
        "; or give your own: FILE.py:FUNCTION --checkpoint bad.pt, or FILE.py:FUNCTION alone where bad.pt is a whole "
        "model or TorchScript, which your function loads",
    ),
    "exit": (
        lambda: Path("bad.py").write_text("import sys\nsys.exit(2)\n"),
        "bad.py:build",
        "bad.py ends the program (sys.exit, or argparse, which finds no arguments here) when it is imported",
    ),
    "file with argparse": (
        lambda: Path("bad.py").write_text(PARSES),
        "bad.py:build",
        "bad.py ends the program (sys.exit, or argparse, which finds no arguments here) when it is imported",
    ),
    "architecture": (lambda: _save(nets.weights()), "bad.pt --arch mpl", "no model 'mpl'. Did you mean 'mlp'?"),
    "setting": (
        lambda: _save(nets.weights()),
        "bad.pt --arch mlp --arch-set widht=3",
        "models mlp has no setting 'widht'. Did you mean 'width'?",
    ),
    "setting form": (
        lambda: _save(nets.weights()),
        "bad.pt --arch mlp --arch-set width",
        "--arch-set takes SETTING=VALUE such as width=32, got 'width'",
    ),
    "suffix": (
        lambda: None,
        "net.h5 --arch mlp",
        "MODEL is 'net.h5'; expected a checkpoint (.safetensors, .pt, .pth, .pth.tar, .ckpt, .bin)",
    ),
    "nothing": (lambda: None, "", "no model named; give a checkpoint"),
    "two": (lambda: _save({}), "bad.pt --checkpoint other.pt --arch mlp", "two checkpoints, bad.pt and other.pt"),
    "function form": (lambda: None, "my.py", "model file 'my.py'; expected FILE.py:FUNCTION, such as my.py:build"),
    "no file": (lambda: None, "your.py:build", "no model file your.py"),
    "no function": (
        lambda: None,
        "my.py:biuld",
        "my.py: LookupError: no function 'biuld'. Did you mean 'build'? Known: build, wide, broken, nothing, color",
    ),
    "raises": (lambda: None, "my.py:broken", "my.py:12: RuntimeError: out of luck"),
    "no module": (lambda: None, "my.py:nothing", "my.py: TypeError: nothing() gave int; expected a torch.nn.Module"),
    "file classes": (
        lambda: None,
        "my.py:wide",
        "my.py:wide gives (2, 12) for 2 images of digits; expected logits of shape (2, 10)",
    ),
    "file images": (lambda: None, "my.py:color", "my.py:color cannot take digits images: RuntimeError: "),
    "file with arch": (lambda: None, "my.py:build --arch mlp", "--arch and --arch-set choose an architecture of bench"),
    "syntax": (
        lambda: Path("bad.py").write_text("def build(:\n"),
        "bad.py:build",
        "bad.py:1: SyntaxError: invalid syntax",
    ),
    "normalise": (lambda: None, "my.py:build --normalize 0.5", "--normalize is '0.5'; expected none, dataset or MEAN"),
    "channels": (lambda: None, "my.py:build --normalize 0,0/1,1", "digits has 1 channel"),
    "std": (lambda: None, "my.py:build --normalize 0/0", "finite numbers, STD above 0"),
}
ONLY_EVAL: dict[str, tuple[str, str]] = {
    "name": ("my.py:build --name pgd_at", "--name is 'pgd_at', which is a defense of bench; choose another"),
    "empty name": ("my.py:build --name |", "--name is '|'; expected up to 80 letters"),
    "claim": ("my.py:build --expect-clean 84.2", "--expect-clean is '84.2'; expected a share from 0 to 1"),
    "claim a word": ("my.py:build --expect-clean high", "--expect-clean is 'high'; expected a share from 0 to 1"),
    "set of a defense": ("my.py:build --set standard.beta=1", "--set of `bench eval` is for attacks"),
    "set of training": ("my.py:build --set train.lr=1", "--set of `bench eval` is for attacks"),
    "set of nothing": ("my.py:build --set pdg.steps=4", "'pdg' is not in this run. Did you mean 'pgd'?"),
    "attack": ("my.py:build --attack pdg", "no attack 'pdg'. Did you mean 'pgd'?"),
    "attack on others' images": ("my.py:build --attack transfer", "attack transfer uses images made against other"),
    "certify": (
        "my.py:build --attack certify --norm L2 --eps 0.5",
        "attack certify is for smoothed models, and this one is deterministic",
    ),
    "n": ("my.py:build --n 361", "data.test is 361, but the test set of digits has 360 images"),
}


def refused(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_is_one_line_for_eval_and_doctor(case: str, bench: Bench) -> None:
    Path("my.py").write_text(MINE)
    make, words, message = BAD[case]
    make()
    given = words.replace("ARCH", " ".join(ARCH)).split()
    refused(bench("eval", *given), message)
    assert not Path("results").exists()
    if "mnist" not in words and not case.startswith("file ") and words:
        refused(bench("doctor", *given), message)


@pytest.mark.parametrize("case", ONLY_EVAL)
def test_a_bad_option_is_one_line(case: str, bench: Bench) -> None:
    Path("my.py").write_text(MINE)
    words, message = ONLY_EVAL[case]
    refused(bench("eval", *words.split()), message)
    assert not Path("results").exists()


def test_nothing_is_claimed_of_how_a_checkpoint_was_trained_or_chosen(bench: Bench, checkpoint: Path) -> None:
    words = ("--attack", "clean,fgsm", "--eps", "0.1", "--n", 20)
    assert evaluate(bench, checkpoint, *ARCH, *words).code == 0
    assert bench("leaderboard", "--output", "board.md").code == 0
    overview, columns = Path("board.md").read_text().split("<summary>All columns</summary>")
    assert "recipe imported; clean on 20 images" in overview  # and nothing about the weights between them
    header, line = (text.split(" | ") for text in columns.splitlines() if " | " in text and "--" not in text)
    assert line[header.index("Extra data")] == "unknown"
    assert line[header.index("Selected on")] == "unknown"
    assert '"additional_data": null' in Path("results/tables/leaderboard.json").read_text()
    assert (
        "C27,not checked,,,,how this checkpoint was chosen is not known"
        in Path("results/tables/checks.csv").read_text()
    )


def test_attacks_start_only_when_the_clean_accuracy_is_as_claimed(bench: Bench, checkpoint: Path) -> None:
    evaluate(bench, checkpoint, *ARCH)
    found = imported()[1].metrics.clean_accuracy
    wrong = evaluate(bench, checkpoint, *ARCH, "--expect-clean", 0.5, "--results-dir", "other")
    assert wrong.code == 4
    assert wrong.err.count("\n") == 1
    assert f"clean accuracy is {found:.4f} on 360 images, expected 0.5 (tolerance 0.01 or the interval" in wrong.err
    assert "`bench doctor`" in wrong.err
    assert [job.kind for job, _ in Store(Path("other")).records()] == ["import"]
    near = f"{min(found + 0.0099, 1):.4f}"
    assert evaluate(bench, checkpoint, *ARCH, "--expect-clean", near, "--results-dir", "other").code == 0
    assert sorted(job.kind for job, _ in Store(Path("other")).records()) == ["evaluate", "import"]


def test_a_claim_counts_as_borne_out_within_a_point_or_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from bench.commands.eval import _clean
    from bench.planning.typed import ModelOptions
    from bench.planning.user_models import import_job

    Path("my.py").write_text(MINE)
    what, _ = import_job(ModelOptions("my.py:build"), nets.FACTS)
    for n, accuracy, claim, fits in (
        (100_000, 0.8, 0.81, True),  # the interval is 0.5 points wide, the tolerance a point
        (100_000, 0.8, 0.8101, False),
        (100_000, 0.8, 0.7899, False),
        (100, 0.8, 0.86, True),  # 0.711 to 0.867
        (100, 0.8, 0.868, False),
        (100, 0.8, 0.71, False),
    ):
        said = _clean(what, TrainMetrics(clean_accuracy=accuracy, clean_n=n), claim, "quiet")
        assert (said is None) == fits, (n, claim, said)


def test_the_same_command_resumes_and_lost_weights_are_imported_again(bench: Bench, checkpoint: Path) -> None:
    assert evaluate(bench, checkpoint, *ARCH).code == 0
    before = written(Path("results"))
    assert evaluate(bench, checkpoint, *ARCH).code == 0
    assert written(Path("results")) == before
    key, record = imported()
    (Path("results") / key / "weights-last.safetensors").unlink()
    more = ("--attack", "clean,fgsm", "--n", 20, "--checks", "off", "--device", "cpu")
    assert bench("eval", checkpoint, *ARCH, *more).code == 0
    after = written(Path("results"))
    assert {k for k in before if after[k] == before[k]} == set(before) - {key}
    assert imported()[1].files == record.files
    assert len(after) == 3


def test_what_cannot_be_loaded_by_the_worker_is_a_failed_job_and_no_attack(bench: Bench, checkpoint: Path) -> None:
    assert evaluate(bench, checkpoint, *ARCH, "--dry-run").code == 0
    assert not Path("results").exists()
    evaluate(bench, checkpoint, *ARCH)
    key, _ = imported()
    (Path("results") / key / "record.json").unlink()
    (Path("results") / key / "weights-last.safetensors").unlink()
    outcome = bench("worker", key)  # the checkpoint is not beside the job any more
    assert outcome.code == 1
    assert f"checkpoint {Store(Path('results')).job(key).checkpoint[:12]} of this job; run the" in str(
        imported()[1].error.message
    )


def test_records_hold_hashes_and_base_names_but_no_path(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "my secret folder"
    folder.mkdir()
    (folder / "my.py").write_text(
        "from neighbour import size\n" + MINE.replace("nn.Linear(64, 10)", "nn.Linear(size, 10)")
    )
    (folder / "neighbour.py").write_text("size = 64\n")
    assert evaluate(bench, f"{folder / 'my.py'}:build").code == 0
    key, _ = imported()
    assert Store(Path("results")).model_job(key).model.name == "my.py:build"
    for path in Path("results").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


def test_a_changed_model_file_is_another_model(bench: Bench) -> None:
    Path("my.py").write_text(MINE)
    assert evaluate(bench, "my.py:build").code == 0
    Path("my.py").write_text(MINE.replace("manual_seed(0)", "manual_seed(1)"))
    assert evaluate(bench, "my.py:build").code == 0
    kinds = [job.kind for job, _ in Store(Path("results")).records()]
    assert sorted(kinds) == ["evaluate", "evaluate", "import", "import"]
    one, two = (load_file(path) for path in Path("results").glob("*/weights-last.safetensors"))
    assert not torch.equal(one["1.weight"], two["1.weight"])
    Path("other.py").write_text(MINE)  # workers are forked from a server that an earlier command started
    assert evaluate(bench, "other.py:build").code == 0


def test_a_checkpoint_goes_into_a_model_file(bench: Bench) -> None:
    Path("my.py").write_text(MINE)
    state = {"module.1.weight": torch.randn(10, 64), "module.1.bias": torch.randn(10)}
    torch.save(state, "linear.pt")
    assert evaluate(bench, "my.py:build", "--checkpoint", "linear.pt", "--normalize", "0.3/0.4").code == 0
    key, _ = imported()
    stored = load_file(Path("results") / key / "weights-last.safetensors")
    assert torch.equal(stored["1.1.weight"], state["module.1.weight"])
    assert stored["0.mean"].flatten().tolist() == pytest.approx([0.3])


def test_the_british_spelling_of_options_names_the_same_job(bench: Bench) -> None:
    Path("my.py").write_text(MINE)
    plans = [bench("eval", "my.py:build", option, "0.3/0.4", *FAST, "--dry-run") for option in SPELLINGS]
    assert [plan.code for plan in plans] == [0, 0]
    assert plans[0].out == plans[1].out


SPELLINGS = ("--normalize", "--normalise")


def test_normalisation_is_the_one_typed_the_checkpoints_or_the_data_sets(bench: Bench) -> None:
    scaled = nets.fit(nets.mlp(), lambda x: (x - 0.7) / 0.1).state_dict()
    save_file(ours(scaled), "scaled.safetensors")
    chosen = (*ARCH, "--normalize", "0.7/0.1")
    outcome = evaluate(bench, "scaled.safetensors", *chosen, "--results-dir", "typed")
    assert "normalization mean 0.7, std 0.1" in outcome.out
    assert evaluate(bench, "scaled.safetensors", *ARCH, "--results-dir", "default").code == 0
    found = {name: imported(Path(name))[1].metrics.clean_accuracy for name in ("typed", "default")}
    assert found["typed"] > 0.85 > found["default"] + 0.1
    held = next(Path("typed").glob("*/weights-last.safetensors"))
    evaluate(bench, held, *ARCH, "--results-dir", "held")
    assert imported(Path("held"))[1].metrics.clean_accuracy == found["typed"]


def test_a_row_of_its_own_in_every_table(bench: Bench, checkpoint: Path) -> None:
    assert evaluate(bench, checkpoint, *ARCH, "--name", "Mine (2026)").code == 0
    (row,) = rows(Store(Path("results")), evaluations(Store(Path("results"))).readable)
    assert (row.method, row.recipe, row.deploys) == ("Mine (2026)", "imported", "deterministic")
    assert bench("leaderboard", "--output", "lb.md").code == 0
    assert "Mine (2026)" in Path("lb.md").read_text()
    status = bench("status")
    assert (status.code, status.err) == (0, "")
    assert "2 done" in status.out


def test_a_declared_random_model_is_judged_as_one(bench: Bench) -> None:
    noisy = MINE.replace("return nn.Sequential(nn.Flatten()", "return nn.Sequential(Noise(), nn.Flatten()", 1)
    noise = "class Noise(nn.Module):\n    def forward(self, x):\n        return x + torch.randn_like(x)\n\n"
    Path("my.py").write_text(noisy.replace("def build", noise + "def build", 1))
    undeclared = evaluate(bench, "my.py:build")
    assert undeclared.code == 2
    assert "gives two answers to one image; declare a stochastic model with --randomized" in undeclared.err
    assert evaluate(bench, "my.py:build", "--randomized").code == 0
    store = Store(Path("results"))
    (row,) = rows(store, evaluations(store).readable)
    assert row.deploys == "randomised"
    (job,) = [job for job in store.jobs().values() if job.kind == "evaluate"]
    from bench.planning.evaluations import RANDOMISED_REVISION

    assert job.engine == RANDOMISED_REVISION


def test_json_events_tell_the_clean_accuracy_first(bench: Bench, checkpoint: Path) -> None:
    outcome = evaluate(bench, checkpoint, *ARCH, "--json", "--expect-clean", "0.9")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    names = [(event["event"], event.get("kind")) for event in events]
    assert names[:3] == [("started", "import"), ("ok", "import"), ("clean", None)]
    assert events[2]["n"] == 360
    assert names[-2:] == [("ok", "evaluate"), ("row", None)]


def test_a_model_file_that_is_not_here_is_no_change_of_the_records(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.py"
    file.write_text(MINE)
    attack = ("--attack", "fgsm", "--n", 20, "--checks", "off", "--device", "cpu")
    assert bench("eval", f"{file}:build", *attack).code == 0
    judged = bench("verify", "--full")
    assert (judged.code, "not scored again" in judged.out) == (0, False), judged.out
    monkeypatch.delenv("BENCH_MODEL_FILE")
    outcome = bench("verify", "--full")
    assert (outcome.code, "WRONG" in outcome.out) == (0, False), outcome.out
    assert "not scored again: the model file my.py is not here" in outcome.out


STORED = """\
import torch
from torch import nn

class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        held = torch.load("held.pt")
        self.x, self.y = nn.Buffer(held["x"]), nn.Buffer(held["y"])

    def forward(self, x):
        distance = torch.cdist(x.flatten(1), self.x) ** 2
        return -torch.stack([distance[:, self.y == c].amin(1) for c in range(10)], 1)

def build():
    return Memory()
"""


@pytest.mark.parametrize("part", ["test", "train"])
def test_the_audit_of_an_imported_model_discloses_a_memory_of_the_test_set(
    part: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stores training images only is an honest nearest-neighbor rule."""
    images = getattr(load("digits", root=Path(), device=torch.device("cpu")), part)
    torch.save({"x": to_float(images.x).flatten(1), "y": images.y}, "held.pt")
    Path("my.py").write_text(STORED)
    assert evaluate(bench, "my.py:build").code == 0

    options = Options(
        dataset="digits", attack=["clean", "fgsm"], eps=["0.1"], n=20, defense=["standard"], baseline=False
    )
    matrix, _, _ = prepare_model(ModelOptions("my.py:build"), options, None)
    of_model, of_images = (job for job in matrix.jobs if job.kind == "audit")
    assert (of_model.engine, of_images.engine) == (2, 1)
    store = Store(Path("results"))
    store.add(of_model)
    monkeypatch.setattr(audit_model, "MEASURES", {"C30": audit_model.MEASURES["C30"]})
    report = ProgressFile(Path("progress.json"), "cpu")
    record = run_evaluation(store, of_model, Path(), torch.device("cpu"), report, None)
    levels = {finding.level for finding in audit_findings(record)}
    assert levels == ({"ok", "U"} if part == "test" else {"ok"})


def test_a_net_may_call_what_it_likes_constants() -> None:
    net = torch.nn.Linear(2, 2)
    net.constants = 3
    with pytest.raises(ValueError, match=r"weights.pt does not fit this architecture: 1 missing \(first: bias\)"):
        fill(net, {"weight": torch.ones(2, 2)}, datasets.KNOWN["digits"], "weights.pt")
