"""Architectures: what every net promises to defenses, and the sizes the papers state."""

import pytest
import torch
from torch import fx, nn

from bench import catalog
from bench.datasets import KNOWN
from bench.models import lenet5, mlp, preact_resnet18, small_cnn, wide_resnet
from bench.models.common import Inputs, Normalise

SMALL = {
    "mlp": (mlp, {"width": 16}, 8),
    "lenet5": (lenet5, {}, 14),
    "small_cnn": (small_cnn, {}, 8),
    "preact_resnet18": (preact_resnet18, {"width": 4}, 8),
    "wide_resnet": (wide_resnet, {"depth": 10, "width": 1}, 8),
}


def inputs(name="mnist", **changes):
    facts = KNOWN[name]
    return Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)._replace(**changes)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture(params=SMALL)
def small(request):
    """A cheap net of each architecture for the smallest coloured images it takes, and those images."""
    module, settings, size = SMALL[request.param]
    torch.manual_seed(0)
    return module.build(inputs("cifar10", size=size), **settings), torch.rand(3, 3, size, size)


def test_every_architecture_is_here_and_declared():
    assert set(SMALL) == set(catalog.names("models"))
    assert catalog.get("models", "wide_resnet").resolve({}) == {"depth": 34, "width": 10}
    for name in SMALL:
        plugin = catalog.get("models", name)
        assert "\n" not in plugin.formula
        assert any(year in plugin.source for year in ("19", "20"))


def test_output_head_and_gradients(small):
    net, x = small
    logits = net(x)
    assert logits.shape == (3, 10)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert net.head is linears[-1]
    seen = []
    net.head.register_forward_hook(lambda module, args, out: seen.append(out))
    assert net(x) is seen[0]  # the head's output is the logits
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert dead == []


def test_traceable_by_fx(small):
    net, x = small
    net.eval()
    traced = fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    assert torch.equal(traced(x[:1]), net(x[:1]))  # no batch size was baked in


def test_normalisation_is_inside(small):
    net, x = small
    net.eval()
    assert isinstance(net.normalise, Normalise)
    facts = KNOWN["cifar10"]
    mean, std = torch.tensor(facts.mean).view(1, 3, 1, 1), torch.tensor(facts.std).view(1, 3, 1, 1)
    logits = net(x)
    net.normalise = nn.Identity()
    assert torch.allclose(net((x - mean) / std), logits, atol=1e-6)


def test_normalise_leaves_images_alone_at_mean_0_std_1():
    x = torch.rand(2, 1, 4, 4)
    assert Normalise(inputs())(x) is x
    scaled = Normalise(inputs(mean=(0.5,), std=(0.25,)))
    assert torch.allclose(scaled(x), (x - 0.5) / 0.25)
    assert set(scaled.state_dict()) == {"mean", "std"}
    for wrong in ({"mean": (0.0, 0.0)}, {"std": (0.0,)}):
        with pytest.raises(ValueError, match="expected 1 values, std above 0"):
            Normalise(inputs(**wrong))


def test_no_bias_meets_a_batchnorm(small):
    net, _ = small
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


def test_same_seed_same_weights():
    def weights():
        torch.manual_seed(7)
        return preact_resnet18.build(inputs("cifar10"), width=4).state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights().values(), weights().values(), strict=True))


@pytest.mark.parametrize(
    ("module", "data", "expected"),
    [
        (mlp, "digits", 85_002),
        (lenet5, "mnist", 61_706),
        (small_cnn, "mnist", 467_818),
        (preact_resnet18, "cifar10", 11_172_170),
        (wide_resnet, "cifar10", 46_160_474),
    ],
)
def test_parameter_counts(module, data, expected):
    with torch.device("meta"):
        assert parameters(module.build(inputs(data))) == expected


@pytest.mark.parametrize("module", [lenet5, small_cnn])
def test_pooling_before_relu(module):
    net = module.build(inputs())
    steps = [str(node.target) if node.op == "call_module" else node.name for node in fx.symbolic_trace(net).graph.nodes]
    pools = [i for i, step in enumerate(steps) if step == "pool"]
    assert len(pools) == 2
    for i in pools:
        assert steps[i - 1].startswith("conv")
        assert steps[i + 1].startswith("relu")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [20, 32, 46])
def test_other_sizes(name, size):
    module, settings, _ = SMALL[name]
    net = module.build(inputs(size=size), **settings)
    assert net(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_mlp_without_hidden_layer_is_linear():
    net = mlp.build(inputs("digits"), depth=0)
    assert parameters(net) == 64 * 10 + 10


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: lenet5.build(inputs(size=12)), "lenet5 needs images of at least 14 x 14 pixels, got 12"),
        (lambda: lenet5.build(inputs(size=15)), "even side of at least 14 pixels, got 15"),
        (lambda: small_cnn.build(inputs(size=7)), "small_cnn needs images of at least 8 x 8"),
        (lambda: preact_resnet18.build(inputs(size=7)), "preact_resnet18 needs images of at least 8 x 8"),
        (lambda: wide_resnet.build(inputs(size=4)), "wide_resnet needs images of at least 8 x 8"),
        (lambda: wide_resnet.build(inputs(), depth=20), "depth is 20; expected 6n"),
        (lambda: wide_resnet.build(inputs(), depth=4), "depth is 4; expected 6n"),
        (lambda: wide_resnet.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: preact_resnet18.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: mlp.build(inputs(), width=0), "mlp: width is 0"),
        (lambda: mlp.build(inputs(), depth=-1), "depth is -1; expected at least 0"),
    ],
)
def test_bad_settings(build, says):
    with pytest.raises(ValueError, match=says) as error:
        build()
    assert "\n" not in str(error.value)
