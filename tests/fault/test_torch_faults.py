"""F15, F16, F19, F20, F27 with real trainings and attacks on a few digits.

Memory, numbers that are none, broken plug-ins, clocks. A part marked fault runs what is slower; the figures stand in
docs/reliability.md.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, states, tiny, write_plugins

from bench.planning.job import EvaluateJob, Job, TrainJob
from bench.records.record import PeakMemory, Provenance, Record, Time, evaluation_metrics, train_metrics
from bench.records.store import Store
from bench.results.rows import Row
from bench.tables.ranking import ranked

torch = pytest.importorskip("torch")

RESULTS = Path("results")
POINTS, STAGES = 5, 5
AGAIN = 24  # jobs of a run that is done three times
HEAD = '''"""min CE

Nobody (2024).
"""
from dataclasses import dataclass
from typing import Any, ClassVar
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, Losses
'''
# one number that is none, from the second of four epochs on, or in what is deployed
SICK = (
    HEAD
    + """
class Broken(Classifier):
    def __init__(self, net: nn.Module, where: str, value: float) -> None:
        super().__init__(net)
        self.where, self.value = where, value
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if self.where == "logits":
            z = z.clone()
            z[-1:, 3] = self.value  # one number of one image
        if self.where == "slope":
            z = z + 0 * torch.sqrt(0 * x.flatten(1).sum(1, keepdim=True))
        return z

@dataclass
class Sick(Defense):
    uses_threat: ClassVar[bool] = False
    where: str = "nowhere"
    value: str = "nan"
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        terms = {"ce": F.cross_entropy(net(batch.x), batch.y)}
        weight = next(net.parameters())
        if batch.epoch == 1 and self.where == "loss":
            terms["ce"] = terms["ce"] + float(self.value)
        if batch.epoch == 1 and self.where == "gradients":
            terms["odd"] = 0 * torch.sqrt(0 * weight.sum())
        return terms
    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        self.epochs = getattr(self, "epochs", 0) + 1
        if self.epochs == 2 and self.where == "weights":
            with torch.no_grad():
                next(net.parameters()).view(-1)[5] = float(self.value)
        return {}
    def deploy(self, net: nn.Module) -> Classifier:
        return Broken(net, self.where, float(self.value))
"""
)
SICKLY = (
    HEAD
    + """
@dataclass
class Sickly(Attack):
    block: ClassVar[int] = 8
    value: str = "nan"
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        moved = x.clone()
        moved[-1, 0, 0, 0] = float(self.value)
        return moved, {}
"""
)


@pytest.fixture(autouse=True)
def own_plugins() -> Iterator[None]:
    """Files of one name hold other things in each test here."""
    yield
    for name in [name for name in sys.modules if name.startswith("bench_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def sick(tmp_path: Path) -> list[object]:
    for name, text in (("sick", SICK), ("sickly", SICKLY)):
        (tmp_path / f"{name}.py").write_text(text)
    return ["--plugin", tmp_path / "sick.py", "--plugin", tmp_path / "sickly.py"]


def board() -> dict[str, tuple[str, Row]]:
    """Rank and row by method."""
    from bench.tables.leaderboard import board as rows

    return {row.defense: (rank, row) for rank, row in ranked(rows(Store(RESULTS)))}


def never_shown(method: str, attack: str) -> None:
    """No rank, no worst case, and no share at all where the attack stands."""
    rank, row = board()[method]
    assert rank in ("–", "invalid")
    assert row.accuracy.worst.values == {}
    assert all(cell.values == {} for name, cell in row.accuracy.attacks.items() if name.startswith(attack))
    assert row.accuracy.clean.values == {} or 0.0 < row.accuracy.clean.mean < 1.0


def diverged(kind: type[Job]) -> tuple[str, Record, str]:
    """Key and record of the job of this kind that diverged, and the type and message of its error."""
    found = [(job, record) for job, record in Store(RESULTS).records() if record.state == "diverged"]
    ((key, record),) = [(job.key, record) for job, record in found if isinstance(job, kind)]
    assert record.error is not None
    return key, record, f"{record.error.type}: {record.error.message}"


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.fault)])
@pytest.mark.parametrize("where", ["loss", pytest.param("weights", marks=pytest.mark.fault), "gradients"])
def test_f16_a_training_whose_numbers_are_none_is_stopped_at_the_end_of_its_epoch(
    bench: Bench, sick: list[object], where: str, value: str
) -> None:
    words = ["--set", f"sick.where={where}", "--set", f"sick.value={value}", "--epochs", 4, "--executor", "debug"]
    assert bench(*tiny(*sick, *words, defense="sick,standard", attack="clean,fgsm")).code == 1
    assert states(RESULTS) == {
        "sick": "diverged",
        "standard": "done",
        "standard/clean": "done",
        "standard/fgsm": "done",
    }
    key, _, message = diverged(TrainJob)
    assert " epoch 2 of 4: " in message
    assert len((RESULTS / key / "train.jsonl").read_text().splitlines()) == 2
    assert list((RESULTS / key).glob("*.safetensors")) == []
    never_shown("sick", "")


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.fault)])
@pytest.mark.parametrize(("where", "attack"), [("logits", "clean"), ("logits", "fgsm"), ("slope", "pgd")])
def test_f16_an_evaluation_of_a_model_whose_answers_are_none_stops_in_its_block(
    bench: Bench, sick: list[object], where: str, attack: str, value: str
) -> None:
    """One number of one image; and slopes that are none, which drive an attack to images that are none."""
    words = ["--set", f"sick.where={where}", "--set", f"sick.value={value}", "--executor", "debug"]
    asked = attack if where == "logits" else f"clean,{attack}"
    assert bench(*tiny(*sick, *words, defense="sick", attack=asked)).code == 1
    assert states(RESULTS)[f"sick/{attack}"] == "diverged"
    key, found, message = diverged(EvaluateJob)
    assert message.startswith("Diverged: some ")
    assert " images 0 to 15, or " in message
    assert found.files == {}
    assert not (RESULTS / key / "blocks").exists()
    never_shown("sick", attack)
    again = bench(*tiny(*sick, *words, defense="sick", attack=asked))
    assert "0 jobs run" in again.out  # it would end so again


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.fault)])
def test_f16_images_of_an_attack_that_are_none_judge_nothing(bench: Bench, sick: list[object], value: str) -> None:
    words = ["--set", f"sickly.value={value}", "--executor", "debug"]
    assert bench(*tiny(*sick, *words, defense="standard", attack="clean,fgsm,sickly")).code == 1
    assert states(RESULTS) == {
        "standard": "done",
        "standard/clean": "done",
        "standard/fgsm": "done",
        "standard/sickly": "diverged",
    }
    assert diverged(EvaluateJob)[2].endswith(": adversarial images hold NaN or Inf")
    never_shown("standard", "sickly")


def test_f16_an_audited_model_of_such_answers_is_invalid(bench: Bench, sick: list[object]) -> None:
    words = ["--set", "sick.where=logits", "--executor", "debug", "--checks", "quick"]
    assert bench(*tiny(*sick, *words, defense="sick", attack="clean,fgsm")).code == 1
    rank, row = board()["sick"]
    assert (rank, row.verdict) == ("invalid", "INVALID")


GREEDY = (
    HEAD
    + """
class Greedy(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.fill(x)
        return super().forward(x)
    def fill(self, x: Tensor) -> None:
        FILL

@dataclass
class Hungry(Defense):
    uses_threat: ClassVar[bool] = False
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(batch.x), batch.y)}
    def deploy(self, net: nn.Module) -> Classifier:
        return Greedy(net)
"""
)
ON_CPU = """if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory: more than two images in a pass")"""
# as much as the card still gives to four images, by the allocator's own cap
ON_GPU = """free = 64 * 2**20
        total = torch.cuda.get_device_properties(x.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(x.device) + free) / total, x.device)
        try:
            torch.empty(len(x) * free // 3, dtype=torch.uint8, device=x.device)
        finally:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, x.device)"""


def starved(bench: Bench, tmp_path: Path, fill: str, device: str) -> dict[str, Any]:
    """The record of an evaluation that has memory for two images at a time, beside nine jobs that lack nothing."""
    (tmp_path / "hungry.py").write_text(GREEDY.replace("FILL", fill))
    plugins = [*write_plugins(tmp_path), "--plugin", tmp_path / "hungry.py"]
    words = tiny(*plugins, "--workers", 1, defense="hungry,plain", attack="wobble")
    words[words.index("--device") + 1] = device
    outcome = bench(*words)
    assert outcome.code == 0, outcome.err
    store = Store(RESULTS)
    jobs = store.jobs()
    (key,) = [k for k, j in jobs.items() if j.needs and jobs[j.needs[0]].defense.name == "hungry"]
    assert set(states(RESULTS).values()) == {"done"}
    return store.record(key)


@pytest.mark.fault
def test_f15_an_evaluation_without_memory_is_done_in_smaller_passes_and_says_so(bench: Bench, tmp_path: Path) -> None:
    record = starved(bench, tmp_path, ON_CPU, "cpu")
    assert [each.step for each in record.retries] == ["halve", "halve"]
    assert record.provenance.rows_per_pass == 2  # of blocks of eight images
    assert all(each.type == "OutOfMemoryError" for each in record.retries)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_f15_a_gpu_with_a_cap_on_its_memory_does_the_same(bench: Bench, tmp_path: Path) -> None:
    record = starved(bench, tmp_path, ON_GPU, "cuda")
    assert [each.step for each in record.retries if each.step == "halve"] == ["halve", "halve"]
    assert record.provenance.rows_per_pass == 2
    assert "CUDA out of memory" in record.retries[0].message


FRAIL = (
    HEAD
    + """
AT_IMPORT
@dataclass
class Frail(Defense):
    uses_threat: ClassVar[bool] = False
    def wrap(self, net: nn.Module) -> nn.Module:
        AT_BUILD
        return net
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        AT_TRAIN
        return {"ce": F.cross_entropy(net(batch.x), batch.y)}
    def deploy(self, net: nn.Module) -> Classifier:
        return Frailer(net)

class Frailer(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        AT_EVALUATE
        return super().forward(x)
"""
)


def frail(tmp_path: Path, stage: str) -> Path:
    text = FRAIL
    for name in ("import", "build", "train", "evaluate"):
        place = f"AT_{name.upper()}"
        raising = 'raise RuntimeError("broken on purpose")'
        if name == "evaluate":
            raising = f"if len(x) < 16: {raising}"  # a block of the attack, not of the clean images
        text = text.replace(place, raising if name == stage else "pass")
    path = tmp_path / "frail.py"
    path.write_text(text)
    return path


OTHERS = {"plain": "done", "plain/clean": "done", "plain/wobble": "done"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        pytest.param("import", {"frail": "error"}, marks=pytest.mark.fault),
        pytest.param("build", {"frail": "error"}, marks=pytest.mark.fault),
        pytest.param("train", {"frail": "error"}, marks=pytest.mark.fault),
        ("evaluate", {"frail": "done", "frail/clean": "done", "frail/wobble": "error"}),
    ],
)
def test_f19_a_broken_plug_in_hurts_itself_alone(
    bench: Bench, tmp_path: Path, stage: str, expected: dict[str, str]
) -> None:
    plugins = [*write_plugins(tmp_path), "--plugin", frail(tmp_path, stage)]
    outcome = bench(*tiny(*plugins, "--no-check", defense="frail,plain"))
    assert outcome.code == 1
    assert states(RESULTS) == {**OTHERS, **expected}
    (error,) = [r.error for _, r in Store(RESULTS).records() if r.state == "error"]
    lines = (tmp_path / "frail.py").read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if "raise RuntimeError" in text]
    assert (error.type, error.message) == ("RuntimeError", f"broken on purpose ({tmp_path.name}/frail.py:{line})")
    assert "Traceback" not in outcome.out + outcome.err


@pytest.mark.parametrize("stage", ["import", "build"])
def test_f19_what_breaks_before_the_first_step_is_refused_before_anything_runs(
    bench: Bench, tmp_path: Path, stage: str
) -> None:
    plugins = [*write_plugins(tmp_path), "--plugin", frail(tmp_path, stage)]
    outcome = bench(*tiny(*plugins, "--executor", "debug", defense="frail,plain"))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "RuntimeError: broken on purpose" in outcome.err
    assert not RESULTS.exists()
    again = bench(*tiny(*plugins, "--executor", "debug", defense="frail,plain"))
    assert (again.code, again.err) == (outcome.code, outcome.err)  # not half a module that the first one left


@pytest.mark.parametrize(
    "after",
    ["no Python", *(pytest.param(how, marks=pytest.mark.fault) for how in ("gone", "raises when imported"))],
)
def test_f19_a_plug_in_that_is_broken_when_a_report_is_made_costs_no_table(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    path = frail(tmp_path, "none")
    plugins = [*write_plugins(tmp_path), "--plugin", path]
    assert bench(*tiny(*plugins, "--executor", "debug", defense="frail,plain")).code == 0
    assert bench("leaderboard", "--output", "before.md").code == 0
    if after == "gone":
        path.unlink()
    else:
        path.write_text("def (" if after == "no Python" else FRAIL.replace("AT_IMPORT", "raise RuntimeError"))
    for words in (["leaderboard", "--output", "after.md"], ["report"], ["status"], ["timing"]):
        outcome = bench(*words)
        assert (outcome.code, outcome.err) == (0, "")
    assert Path("before.md").read_text() == Path("after.md").read_text()


@pytest.mark.parametrize("jump", [-3600.0, 86_400.0])
def test_f20_seconds_do_not_follow_a_clock_that_jumps(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """It moves at every look, and with it whatever were measured by it."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + next(looks) * jump)
    began = time.monotonic()
    assert bench(*tiny(*write_plugins(tmp_path), "--executor", "debug")).code == 0
    spent = time.monotonic() - began
    monkeypatch.setattr(time, "time", real)
    assert next(looks) > 3
    for job, record in Store(RESULTS).records():
        told = [record.time.seconds, train_metrics(record).train_seconds, evaluation_metrics(record).attack_seconds]
        assert all(0 <= seconds <= spent for seconds in told if seconds is not None), job


def timeless(record: Record) -> Record:
    """A record without times, memory and what the machine did beside it."""
    times = [n for n in vars(record.metrics) if any(part in n for part in ("seconds", "_ms_", "resumed"))]
    metrics = replace(record.metrics, **dict.fromkeys(times))
    return replace(record, metrics=metrics, time=Time(), peak_memory_mb=PeakMemory(), provenance=Provenance())


def everything(root: Path) -> dict[str, Any]:
    """All records, and the lines of all trainings, apart from times."""
    found: dict[str, Any] = {job.key: timeless(record) for job, record in Store(root).records()}
    for path in root.glob("*/train.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"lines of {path.parent.name}"] = [{**line, "seconds": None} for line in lines]
    return found


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_f27_the_same_run_again_and_on_four_workers_is_the_same_but_for_times(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    words = ["--seeds", "0,1", *plugins]
    matrix = {"defense": "plain,noisy,pgd_at", "attack": "clean,pgd,wobble"}
    found = {}
    for name, workers in (("one", 1), ("again", 1), ("four", 4)):
        outcome = bench(*tiny(*words, "--results-dir", name, "--workers", workers, **matrix))
        assert outcome.code == 0, outcome.err
        found[name] = everything(Path(name))
    assert sum(not name.startswith("lines") for name in found["one"]) == AGAIN
    assert found["again"] == found["one"]
    assert found["four"] == found["one"]
    assert any(record.files for record in found["one"].values() if isinstance(record, Record))
