"""The training loop and the optional parts of a recipe, on a few digits: effects, independence and records."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Bench, states, tiny
from safetensors.torch import load_file
from small_training import ROOT, data_of, jobs_of, log_of, run, training_job
from torch import Tensor, nn

from bench.core.defense import Batch
from bench.core.epsilon import Epsilon
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import Data, batches, load, to_float
from bench.jobs.model_files import load_model
from bench.planning import catalog
from bench.planning.job import TrainJob
from bench.planning.job_fields import PluginChoice
from bench.planning.spec import TrainSpec
from bench.plugins import threat_of
from bench.records.store import Store
from bench.training.averaging import recalibrate
from bench.training.best_epoch import validation_accuracy
from bench.training.divergence import Collapsed
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe
from bench.training.train import Trained
from bench.training.train import build as build_net

RESULTS = Path("results")
pytestmark = pytest.mark.usefixtures("fresh_catalog")


def trained(folder: Path, defense: Any = "standard", **recipe: Any) -> tuple[Trained, list[dict[str, float]], Data]:
    """The training, the lines of its log, and its data."""
    job = training_job(defense, **recipe)
    data = data_of(job)
    return run(job, data, folder), log_of(folder), data


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reference(job: TrainJob, data: Data) -> dict[str, Tensor]:
    """The loop before any of the mechanisms existed: torch's own SGD and LambdaLR."""
    recipe = job.training
    defense, net = build_net(job, data)
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe["lr"], momentum=0.9, weight_decay=recipe["weight_decay"])
    per_epoch = len(data.train.x) // 16
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step / (2 * per_epoch))))
    )

    class Plain:
        def descend(self, terms: dict[str, Tensor]) -> None:
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            scheduler.step()

    with scope(seed(job.seed, "inner")):
        for epoch in range(2):
            order = seed(job.seed, "order", epoch)
            passing = batches(data.train, 16, shuffle_seed=order, augment=False, drop_last=True)
            for place, (x, y, index) in enumerate(passing):
                progress = (epoch + place / per_epoch) / 2
                defense.step(net.train(), Plain(), Batch(x, y, index, epoch, progress))
    return net.state_dict()


@pytest.mark.parametrize("defense", ["standard", "pgd_at", "trades", "rse"])  # rse draws in each pass
def test_training_equals_a_plain_loop_bit_for_bit(tmp_path: Path, defense: str) -> None:
    done, _, data = trained(tmp_path, defense)
    assert same(done.model.net.state_dict(), reference(training_job(defense), data))
    assert done.metrics.active_steps == {}
    assert done.best is None


def test_validation_and_averaging_do_not_change_training(tmp_path: Path) -> None:
    plain, lines, _ = trained(tmp_path, "pgd_at", validation=32)
    chosen, also, data = trained(tmp_path, "pgd_at", validation=32, keep="best")
    assert same(plain.model.net.state_dict(), chosen.model.net.state_dict())
    averaged, again, _ = trained(tmp_path, "pgd_at", validation=32, keep="best", average="swa", swa_start=0.2)
    assert [line["ce"] for line in lines] == [line["ce"] for line in also] == [line["ce"] for line in again]
    assert not same(plain.model.net.state_dict(), averaged.model.net.state_dict())
    accuracy = [line["validation"] for line in also]
    best = max(accuracy)
    assert (chosen.metrics.best_epoch, chosen.metrics.best_validation) == (accuracy.index(best) + 1, best)
    assert chosen.metrics.last_validation == accuracy[-1]
    content = data.validation.x.numpy().tobytes() + data.validation.y.numpy().tobytes()
    assert chosen.metrics.validation_hash == hashlib.sha256(content).hexdigest()[:16]
    threat = Threat("Linf", Epsilon("0.1"))
    assert chosen.best is not None
    chosen.model.net.load_state_dict(chosen.best)
    assert validation_accuracy(chosen.model, data.validation, threat, 0) == best


def test_ema_and_swa_deploy_the_averages_of_the_weights(tmp_path: Path) -> None:
    """Against a loop that keeps every weight: 12 updates, 2 epochs."""
    seen: list[dict[str, Tensor]] = []

    job = training_job()
    data = data_of(job)
    defense, net = build_net(job, data)
    updater = build_updater(defense, net, Recipe.model_validate(job.training), 6)
    seen.append({n: p.detach().clone() for n, p in net.named_parameters()})
    for epoch in range(2):
        order = seed(0, "order", epoch)
        for x, y, index in batches(data.train, 16, shuffle_seed=order, augment=False, drop_last=True):
            defense.step(net, updater, Batch(x, y, index, epoch, 0.0))
            seen.append({n: p.detach().clone() for n, p in net.named_parameters()})
    swa, *_ = trained(tmp_path, average="swa", swa_start=0.0)
    ema, *_ = trained(tmp_path, average="ema", ema_decay=0.4)
    assert swa.metrics.active_steps == {"swa_epochs": 2}
    assert ema.metrics.active_steps == {"ema": 12}
    for name, value in swa.model.net.named_parameters():
        torch.testing.assert_close(value.detach(), (seen[6][name] + seen[12][name]) / 2, rtol=0, atol=1e-6)
    for name, value in ema.model.net.named_parameters():
        mean = seen[0][name].double()
        for n in range(12):
            t = min(0.4, (1 + n) / (10 + n))
            mean = t * mean + (1 - t) * seen[n + 1][name]
        torch.testing.assert_close(value.detach().double(), mean, rtol=0, atol=1e-6)


def test_swa_has_the_statistics_of_one_clean_pass_or_the_live_ones(tmp_path: Path) -> None:
    def net_of(**recipe: Any) -> tuple[nn.Module, Data]:
        job = training_job("pgd_at", **recipe)
        job = replace(job, model=PluginChoice("wide_resnet", {"depth": 10, "width": 1}))
        data = data_of(job)
        return run(job, data, tmp_path).model.net, data

    catalog.get("models", "wide_resnet")
    plain, _ = net_of(epochs=1, batch_size=48)
    swa, data = net_of(epochs=1, batch_size=48, average="swa", swa_start=0.0)
    live, _ = net_of(epochs=1, batch_size=48, average="swa", swa_start=0.0, average_bn="live")
    buffers = {name: value.clone() for name, value in swa.named_buffers()}
    assert same(dict(live.state_dict()), dict(plain.state_dict()))  # one epoch: the average is the last weight
    moved = [name for name, value in plain.named_buffers() if not torch.equal(value, buffers[name])]
    assert any("running_var" in name for name in moved)
    recalibrate(swa, [to_float(data.train.x[:48]), to_float(data.train.x[48:])])
    assert all(torch.equal(value, buffers[name]) for name, value in swa.named_buffers())


def smoothed(logits: Tensor, y: Tensor, a: float) -> Tensor:
    log_p = logits.log_softmax(1)
    true = log_p[torch.arange(len(y)), y]
    return (-(1 - a) * true - a * log_p.sum(1) / logits.shape[1]).mean()


@pytest.mark.parametrize("name", ["standard", "trades", "pgd_at", "free_at", "rat"])
def test_label_smoothing_equals_its_formula(name: str) -> None:
    job = training_job(name)
    data = data_of(job)
    defense, net = build_net(job, data)
    net = net.double()
    x, y = to_float(data.train.x[:20]).double(), data.train.y[:20]
    adv = x.flip(3) if name != "standard" else x
    hard, soft = (defense.loss(net, Batch(x, y, y, 0, 0.5, a), adv)["ce"] for a in (0.0, 0.3))
    logits = net(adv if name in ("pgd_at", "free_at") else x)
    torch.testing.assert_close(soft, smoothed(logits, y, 0.3), rtol=1e-12, atol=0)
    torch.testing.assert_close(hard, F.cross_entropy(logits, y), rtol=1e-12, atol=0)


def test_a_record_counts_the_steps_in_which_each_part_of_the_recipe_was_active(tmp_path: Path) -> None:
    """6 batches an epoch; progress below 0.5 is the first of 2 epochs, below 0.25 half of it."""
    recipe = {"eps_warmup": 0.5, "lr_warmup": 0.25, "label_smoothing": 0.1, "average": "ema", "precision": "bf16"}
    done, *_ = trained(tmp_path, "pgd_at", grad_clip=1e-4, **recipe)
    assert done.metrics.active_steps == {
        "eps_warmup": 6,
        "lr_warmup": 3,
        "label_smoothing": 12,
        "grad_clip": 12,
        "ema": 12,
        "bf16": 12,
    }
    replays = {"name": "free_at", "set": {"replays": 3}}
    done, *_ = trained(tmp_path, replays, eps_warmup=0.5, average="ema")
    assert done.metrics.active_steps == {"eps_warmup": 18, "ema": 36}


def test_the_cost_of_a_step_is_measured_after_warm_ups(tmp_path: Path) -> None:
    """The first steps of AWP are plain TRADES steps, cheaper by a forward pass and the gradient in the weights."""
    entries: list[Any] = [{"name": "awp", "set": {"warmup": share}} for share in (0.5, 0.0)]
    late, always, plain = (trained(tmp_path, e)[0].metrics.work_per_image_f for e in (*entries, "trades"))
    assert late == always > plain


def test_the_cost_of_a_step_is_that_of_one_without_a_check_of_the_method(tmp_path: Path) -> None:
    """The guard of fast_at runs PGD-5 at the first batch of an epoch and after the last one of all."""
    entries: list[Any] = [{"name": "fast_at", "set": {"guard": guard}} for guard in (True, False)]
    guarded, plain = (trained(tmp_path, entry)[0].metrics for entry in entries)
    assert (guarded.defense_metrics or {})["guard_checks"] == 2
    assert guarded.work_per_image_f == plain.work_per_image_f
    assert guarded.forwards_per_image == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_16_bits_keeps_fp32_weights_and_learns(tmp_path: Path, precision: str) -> None:
    done, lines, data = trained(tmp_path, "trades", precision=precision, epochs=8)
    plain, fp32, _ = trained(tmp_path, "trades", epochs=8)
    assert {value.dtype for value in done.model.net.state_dict().values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in done.model.net.state_dict().values())
    assert not same(done.model.net.state_dict(), plain.model.net.state_dict())
    assert lines[-1]["ce"] < 0.95 * lines[0]["ce"]
    assert lines[-1]["ce"] == pytest.approx(fp32[-1]["ce"], rel=0.02)
    with torch.no_grad():
        assert done.model(to_float(data.test.x)).dtype == torch.float32
    assert "forward" not in vars(done.model.net)
    assert done.metrics.active_steps[precision] == done.metrics.steps
    assert ("skipped_for_overflow" in done.metrics.active_steps) == (precision == "fp16")


COLLAPSING = '''"""max p(0)

Nobody (2024).
"""
from dataclasses import dataclass
from typing import Any, ClassVar
import torch
import torch.nn.functional as F
from torch import nn
from bench.core.defense import Batch, Defense, Losses

@dataclass
class Falling(Defense):
    uses_threat: ClassVar[bool] = False
    back: bool = False
    def __post_init__(self) -> None:
        self.restored = None
    @property
    def restored_older_weights(self) -> bool:
        return self.back and self.restored is not None
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        # learns for half of the training, then one class whatever the image
        y = batch.y if batch.progress < 0.5 else 0 * batch.y
        return {"ce": F.cross_entropy(net(batch.x), y)}
    def step(self, net: nn.Module, updater: Any, batch: Batch) -> Losses:
        if not self.back or batch.progress < 0.5:
            return super().step(net, updater, batch)
        if self.restored is None:
            self.restored = {n: 0.5 * v for n, v in net.state_dict().items()}
            net.load_state_dict(self.restored)
        return {"ce": torch.zeros(())}
'''


@pytest.fixture
def falling(tmp_path: Path) -> list[object]:
    (tmp_path / "falling.py").write_text(COLLAPSING)
    return ["--plugin", tmp_path / "falling.py", "--set", "train.batch_size=8", "--set", "train.lr=0.01"]


def test_a_collapsed_training_is_stopped_and_marked_as_diverged(bench: Bench, falling: list[object]) -> None:
    words = [*falling, "--epochs", 36, "--executor", "debug"]
    outcome = bench(*tiny(*words, defense="falling,standard", attack="clean"))
    assert outcome.code == 1
    assert states(RESULTS) == {"falling": "diverged", "standard": "done", "standard/clean": "done"}
    store = Store(RESULTS)
    record = next(r for j, r in store.records() if j.kind == "train" and j.defense.name == "falling")
    assert record.error.type == "Collapsed"
    assert "predicted one class for all of 64 training images at the end of epochs" in record.error.message
    assert "blocked" in outcome.out
    off = bench(*tiny(*words, "--set", "train.guard=false", "--results-dir", "off", defense="falling", attack="clean"))
    assert (off.code, states(Path("off"))) == (0, {"falling": "done", "falling/clean": "done"})


def test_restored_weights_are_what_the_average_deploys(bench: Bench, falling: list[object]) -> None:
    words = [*falling, "--epochs", 4, "--set", "falling.back=true", "--executor", "debug"]
    for average in ("none", "ema", "swa"):
        assert bench(*tiny(*words, "--set", f"train.average={average}", defense="falling", attack="clean")).code == 0
    weights = [load_file(path) for path in RESULTS.glob("*/weights-last.safetensors")]
    assert len(weights) == 3
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_best_and_last_weights_are_stored_and_evaluated(bench: Bench) -> None:
    words = ("--set", "train.keep=best", "--set", "train.lr=0.03", "--validation", 24, "--executor", "debug")
    outcome = bench(*tiny(*words, "--epochs", 3, defense="pgd_at", attack="clean"))
    assert (outcome.code, outcome.err) == (0, "")
    assert "[best" in outcome.out
    store = Store(RESULTS)
    found = store.jobs()
    training = next(job for job in found.values() if job.kind == "train")
    record = store.record(training.key)
    assert record is not None
    assert sorted(record.files) == ["weights-best.safetensors", "weights-last.safetensors"]
    assert sorted(job.weights for job in found.values() if job.kind == "evaluate") == ["best", "last"]
    held_out = training.data.validation
    data = load("digits", root=ROOT, device=torch.device("cpu"), train=64, test=16, validation=held_out, seed=0)
    threat = threat_of(training.threat)
    for which in ("best", "last"):
        model = load_model(store, training, data, which)
        recorded = getattr(record.metrics, f"{which}_validation")
        assert validation_accuracy(model, data.validation, threat, 0) == recorded
    again = bench(*tiny(*words, "--epochs", 3, defense="pgd_at", attack="clean"))
    assert "0 jobs run, 3 already done" in again.out
    (store.folder(training.key) / "weights-best.safetensors").unlink()
    more = bench(*tiny(*words, "--epochs", 3, defense="pgd_at", attack="clean,fgsm"))
    assert "3 jobs run, 2 already done" in more.out, more.err


NEW = {
    "lr_warmup": 0.1, "weight_decay_on": "weights", "grad_clip": 1, "label_smoothing": 0.1, "precision": "bf16",
    "average": "ema", "guard": False, "schedule": "cyclic",
}  # fmt: skip
TIED = [
    {"average": "ema", "ema_decay": 0.9}, {"average": "swa", "swa_start": 0.4},
    {"average": "swa", "average_bn": "live"},
    {"keep": "best", "validation": 9}, {"keep": "best", "validation": 9, "choose_every": 2},
]  # fmt: skip


def test_each_setting_changes_the_key_and_its_default_does_not() -> None:
    default = {name: TrainSpec.model_fields[name].default for name in TrainSpec.settings_added_later}
    plain = [job.key for job in jobs_of()]
    assert [job.key for job in jobs_of(**default)] == plain
    kinds = [jobs_of(**{name: value}) for name, value in NEW.items()] + [jobs_of(**recipe) for recipe in TIED]
    keys = [found[0].key for found in kinds]
    assert len({plain[0], *keys}) == len(keys) + 1
    assert {name for found in kinds for name in found[0].training} >= set(TrainSpec.settings_added_later)


@pytest.mark.parametrize(
    ("defense", "recipe", "message"),
    [
        ("standard", {"keep": "best"}, "train.keep is best, but data.validation is 0; expected images to choose by"),
        ("noisy", {"label_smoothing": 0.1}, "defense noisy does not take part in train.label_smoothing=0.1; leave"),
        ("noisy", {"precision": "bf16"}, "defense noisy does not take part in train.precision=bf16"),
        ("noisy", {"precision": "auto"}, "defense noisy does not take part in train.precision=auto"),
        ("free_at", {"precision": "fp16"}, "defense free_at does not take part in train.precision=fp16"),
        ("jacobian_penalty", {"label_smoothing": 0.1}, "defense jacobian_penalty does not take part"),
        ({"name": "awp", "set": {"base": "jacobian_penalty"}}, {"precision": "bf16"}, "defense jacobian_penalty does"),
        ("standard", {"ema_decay": 0.9}, "train.ema_decay is 0.9, but does nothing while train.average is none"),
        ("standard", {"average": "ema", "swa_start": 0.9}, "train.swa_start is 0.9, but does nothing while train.aver"),
        ("standard", {"choose_every": 5}, "train.choose_every is 5, but does nothing while train.keep is last"),
        ("standard", {"emadecay": 0.9}, "unknown key 'emadecay' in train. Did you mean 'ema_decay'? Known: epochs,"),
        ("standard", {"average": "wma"}, "train.average: Input should be 'none', 'ema' or 'swa', got 'wma'"),
        ("standard", {"label_smoothing": 1}, "train.label_smoothing: Input should be less than 1, got 1"),
    ],
)
def test_impossible_recipes_are_rejected_when_planning(defense: Any, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"train|defense") as error:
        jobs_of(defense, **recipe)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_of_training_are_typed_like_those_of_a_plug_in(bench: Bench) -> None:
    typed = ("--set", "train.average=ema", "--set", "train.ema_decay=0.9", "--set", "train.grad_clip=1")
    outcome = bench(*tiny(*typed, "--dry-run", defense="standard", attack="clean"))
    assert (outcome.code, outcome.err) == (0, "")
    assert "grad_clip 1.0, average ema, ema_decay 0.9" in outcome.out
    wrong = bench(*tiny("--set", "train.averge=ema", defense="standard", attack="clean"))
    assert wrong.code == 2
    assert wrong.err.startswith("error: unknown key 'averge' in train. Did you mean 'average'?")
    assert len(wrong.err.splitlines()) == 1
    grid = bench(*tiny("--grid", "train.lr=1,2", defense="standard", attack="clean"))
    assert "--grid train.lr=1,2: settings of train have one value each; use --set train.lr=VALUE" in grid.err


def test_a_training_at_chance_level_is_not_deployed(tmp_path: Path) -> None:
    """A decay that leaves no weights: 102 updates later every image has the same answer."""
    job = training_job(epochs=17, weight_decay=20.0)
    with pytest.raises(Collapsed, match=r"^the trained net is correct on \d+ of 96 training images, with one class"):
        run(job, data_of(job), tmp_path)
    short = training_job(epochs=16, weight_decay=20.0)
    run(short, data_of(short), tmp_path)  # 96 updates tell nothing


def test_initial_weights_are_those_of_seed_and_architecture() -> None:
    job, adversarial = training_job(), training_job("pgd_at")
    data = data_of(job)
    plain, paired, other = (
        build_net(each, data)[1].state_dict() for each in (job, adversarial, replace(job, seed=job.seed + 1))
    )
    assert same(plain, paired)
    assert not any(torch.equal(plain[name], other[name]) for name in plain if name.endswith("weight"))
