"""Architectures of other packages: timm by name, and the zoo of RobustBench with checkpoints that the tests write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from harness import Bench
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bench.core.extras import imported
from bench.jobs.load_checkpoint import fill
from bench.models import robustbench
from bench.models import timm as plugin
from bench.models.common import Inputs
from bench.noise.graph import trace
from bench.planning.options import to_spec
from bench.planning.typed import Options
from bench.plugins import build_model
from bench.records.record import train_metrics
from bench.records.store import Store

RGB = Inputs(3, 32, 5, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
try:
    timm = imported("timm", "")
    why = ""
except ImportError as fault:
    why = str(fault)
try:
    robustbench._zoo()
    why_not = ""
except ImportError as fault:
    why_not = str(fault)
needs_timm = pytest.mark.skipif(bool(why), reason=why)
needs_zoo = pytest.mark.skipif(bool(why_not), reason=why_not)


def test_a_name_of_a_package_is_its_plugin_with_a_setting() -> None:
    words = Options(model=["timm:resnet18.a1_in1k,mlp", "timm:test_vit"], set=["timm.pretrained=true"])
    models = to_spec(words, Path())[0].models
    assert models is not None
    assert [(model.name, model.set) for model in models] == [
        ("timm", {"name": "resnet18.a1_in1k", "pretrained": True}),
        ("mlp", {}),
        ("timm", {"name": "test_vit", "pretrained": True}),
    ]


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_net_of_timm_normalizes_and_keeps_the_names_of_its_weights(name: str) -> None:
    torch.manual_seed(0)
    net = plugin.build(RGB, name=name).eval()
    plain = timm.create_model(
        name, num_classes=5, in_chans=3, **({"img_size": 32} if name == "test_vit" else {})
    ).eval()
    weights = {key: value for key, value in net.state_dict().items() if not key.startswith("normalise.")}
    plain.load_state_dict(weights, strict=True)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (RGB.mean, RGB.std))
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain((x - mean) / std))
    other = plugin.build(RGB, name=name).eval()
    fill(other, dict(plain.state_dict()), nets.FACTS, "plain.pt")  # a checkpoint of timm, without our buffers
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x))
    x.requires_grad_(True)  # methods on the gradient of the gradient
    (grad,) = torch.autograd.grad(net(x).logsumexp(1).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()


@needs_timm
def test_what_traces_a_net_of_timm_sees_its_normalization() -> None:
    first = next(node for node in trace(plugin.build(RGB, name="test_resnet")).nodes if node.op == "call_function")
    assert first.target.__name__ == "sub"


@needs_timm
def test_gray_images_of_eight_pixels() -> None:
    net = plugin.build(Inputs(1, 8, 10, (0.3,), (0.3,)), name="test_resnet").eval()
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@needs_timm
def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"timm [\d.]+ has no architecture 'resnett18'; did you mean resnet18"):
        plugin.build(RGB, name="resnett18")
    with pytest.raises(ValueError, match="has no architecture 'hf-hub:someone/net'"):  # nothing of a hub is run
        plugin.build(RGB, name="hf-hub:someone/net")


@needs_timm
def test_a_trained_net_is_loaded_without_the_weights_it_began_at() -> None:
    net = build_model("timm", {"name": "test_resnet.r160_in1k", "pretrained": True}, RGB, trained=True)
    assert net.get_classifier().weight.shape[0] == 5


@needs_timm
@pytest.mark.slow
def test_pretrained_weights_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Without a network; with another number of classes the head is new."""
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys, torch\nfrom bench.models import timm\nfrom bench.models.common import Inputs\n"
        "net = timm.build(Inputs(3, 32, 5, (0.5,) * 3, (0.5,) * 3), name='test_resnet.r160_in1k', pretrained=True)\n"
        "print(float(net.conv1[0].weight.mean()), net.get_classifier().weight.shape[0])\n"
    )
    cache = tmp_path / "hub"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
        )

    missing = run()
    assert "then copy its cache here and set HF_HOME to it" in missing.stderr.splitlines()[-1]
    repo = cache / "models--timm--test_resnet.r160_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = {key: torch.full_like(value, 0.25) for key, value in timm.create_model("test_resnet").state_dict().items()}
    save_file(state, repo / "snapshots" / ("0" * 40) / "model.safetensors")
    done = run()
    assert done.stdout.split() == ["0.25", "5"], done.stderr


def folder(root: Path, side: int) -> Path:
    """Dark and bright images of this side, sixteen of each for training and four for the test."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 4)):
        for name, low in (("dark", 0), ("bright", 128)):
            place = root / "photos" / part / name
            place.mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(low, low + 128, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{k}.png")
    return root / "photos"


@needs_timm
@pytest.mark.slow
def test_training_and_evaluation_at_224_pixels(bench: Bench, tmp_path: Path) -> None:
    """From a spec; then the weights of timm's own training code, by `bench eval`."""
    photos = folder(tmp_path, 224)
    Path("spec.yaml").write_text(
        f"data: {{name: 'folder:{photos}', size: 224, test: 8}}\nmodels: ['timm:test_vit']\n"
        "threat: {norm: Linf, eps: 8/255}\ntrain: {epochs: 1, batch_size: 16}\n"
        "defenses: [standard]\nattacks: [clean, fgsm]\nchecks: 'off'\n"
    )
    done = bench("run", "spec.yaml", "--device", "cpu")
    assert done.code == 0, done.err
    (train,) = (job for job in Store(Path("results")).jobs().values() if job.kind == "train")
    assert (train.model.name, train.model.settings) == ("timm", {"name": "test_vit", "pretrained": False})
    net = timm.create_model("test_vit", num_classes=2, img_size=224)
    torch.save({"state_dict": net.state_dict()}, "mine.pt")
    words = ("--dataset", f"folder:{photos}", "--size", 224, "--attack", "clean", "--checks", "off", "--device", "cpu")
    done = bench("eval", "mine.pt", "--arch", "timm:test_vit", *words)
    assert done.code == 0, done.err
    record = next(record for job, record in Store(Path("results")).records() if job.kind == "import")
    assert train_metrics(record).clean_n == 8


@needs_zoo
def test_the_zoo_of_robustbench_by_name() -> None:
    inputs = Inputs(3, 32, 10, (0.0,) * 3, (1.0,) * 3)
    net = robustbench.build(inputs, name="Wong2020Fast").eval()
    state = {f"module.{key}": value for key, value in net.state_dict().items() if key not in ("mu", "sigma")}
    fill(net, state, nets.FACTS, "Wong2020Fast.pt")  # without the constants, as the file is
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="no name 'Wong2020Fats' here; near: Wong2020Fast"):
        robustbench.build(inputs, name="Wong2020Fats")
    with pytest.raises(ValueError, match="no threat 'L7' here; near: Linf, L2, corruptions"):
        robustbench.build(inputs, name="Wong2020Fast", threat="L7")
    with pytest.raises(ValueError, match="Chen2020Adversarial is not one checkpoint"):
        robustbench.build(inputs, name="Chen2020Adversarial")
    del state["module.conv1.weight"]
    with pytest.raises(ValueError, match="1 missing"):
        fill(net, state, nets.FACTS, "Wong2020Fast.pt")


@needs_zoo
@pytest.mark.slow
def test_a_model_of_robustbench_is_evaluated_from_where_its_checkpoint_lies(bench: Bench, tmp_path: Path) -> None:
    photos = folder(tmp_path, 32)
    for k in range(8):
        for part in ("train", "test"):
            (photos / part / f"more{k}").mkdir()
            Image.new("RGB", (32, 32), (30 * k, 0, 0)).save(photos / part / f"more{k}" / "0.png")
    net = robustbench.build(Inputs(3, 32, 10, (0.0,) * 3, (1.0,) * 3), name="Wong2020Fast")
    Path("models/cifar10/Linf").mkdir(parents=True)
    torch.save({"last": net.state_dict()}, "models/cifar10/Linf/Wong2020Fast.pt")
    words = ("--dataset", f"folder:{photos}", "--size", 32, "--arch-set", "dataset=cifar10", "--attack", "clean")
    done = bench("eval", "robustbench:Wong2020Fast", *words, "--checks", "off", "--device", "cpu", "--eps", "8/255")
    assert done.code == 0, done.err
    (job,) = (job for job in Store(Path("results")).jobs().values() if job.kind == "import")
    assert job.model.settings == {"name": "Wong2020Fast", "dataset": "cifar10", "threat": "Linf"}
    assert job.defense.name == "Wong2020Fast"


def test_a_checkpoint_of_the_net_inside_a_wrapper_fits() -> None:
    wrapper = nn.Sequential()
    wrapper.add_module("model", nn.Linear(3, 2))
    inner = nn.Linear(3, 2)
    fill(wrapper, {f"module.{key}": value for key, value in inner.state_dict().items()}, nets.FACTS, "inner.pt")
    assert torch.equal(wrapper[0].weight, inner.weight)


def test_a_name_of_robustbench_says_where_its_checkpoint_goes(bench: Bench, tmp_path: Path) -> None:
    photos = folder(tmp_path, 16)
    words = ("--dataset", f"folder:{photos}", "--eps", "8/255")
    missing = bench("eval", "robustbench:Salman2020Do_R18", *words, "--arch-set", "threat=L2")
    assert missing.code == 2
    assert missing.err.startswith("error: no checkpoint of robustbench:Salman2020Do_R18: put it at models/imagenet/L2/")
    twice = bench("eval", "robustbench:Salman2020Do_R18", "--normalize", "none", *words)
    assert "brings architecture and normalization; leave out" in twice.err
