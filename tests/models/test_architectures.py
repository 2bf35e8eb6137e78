"""Architectures: what every net promises to defenses, and the sizes the papers state."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import plugins
from bench.core.defense import Batch
from bench.data.datasets import KNOWN
from bench.models import (
    lenet5,
    mlp,
    mobilenet_v2,
    preact_resnet18,
    resnet18,
    resnet50,
    resnet110,
    resnet_cifar,
    small_cnn,
    vgg11,
    vit_tiny,
    wide_resnet,
)
from bench.models.common import Inputs, Normalize
from bench.noise.graph import trace
from bench.planning import catalog
from bench.planning.job_fields import PluginChoice

SMALL = {
    "mlp": (mlp, {"width": 16}, 8),
    "lenet5": (lenet5, {}, 14),
    "small_cnn": (small_cnn, {}, 8),
    "preact_resnet18": (preact_resnet18, {"width": 4}, 8),
    "wide_resnet": (wide_resnet, {"depth": 10, "width": 1}, 8),
    "resnet18": (resnet18, {"width": 4}, 8),
    "resnet50": (resnet50, {"width": 2}, 8),
    "resnet110": (resnet110, {"depth": 8, "width": 4}, 8),
    "resnet_cifar": (resnet_cifar, {"depth": 8, "width": 4}, 8),
    "vgg11": (vgg11, {"width": 4}, 8),
    "mobilenet_v2": (mobilenet_v2, {"width": 0.1}, 8),
    "vit_tiny": (vit_tiny, {"depth": 2, "dim": 12, "patch": 2}, 8),
}


def inputs(name="mnist", **changes):
    facts = KNOWN[name]
    return Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)._replace(**changes)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.fixture(params=SMALL)
def small(request):
    """A cheap net of each architecture for the smallest colored images it takes, and those images."""
    module, settings, size = SMALL[request.param]
    torch.manual_seed(0)
    return module.build(inputs("cifar10", size=size), **settings), torch.rand(3, 3, size, size)


def test_every_architecture_is_here_and_declared():
    assert set(SMALL) | {"timm", "robustbench"} == set(catalog.names("models"))  # test_packages has those of others
    assert catalog.get("models", "wide_resnet").resolve({}) == {"depth": 34, "width": 10}
    for name in SMALL:
        plugin = catalog.get("models", name)
        assert "\n" not in plugin.formula
        assert any(year in plugin.source for year in ("19", "20"))


SETTABLE = sorted(set(SMALL) - {"mobilenet_v2", "vit_tiny"})  # whose papers fix ReLU6 and GELU
FUNCTIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "softplus": F.softplus}


@pytest.mark.parametrize("name", sorted(set(SETTABLE) - {"resnet_cifar"}))
def test_the_activation_leaves_a_job_as_it_was_at_its_default(name):
    plugin = catalog.get("models", name)
    assert plugin.resolve({}) == plugin.resolve({"activation": "relu"})
    assert "activation" not in plugin.resolve({})
    assert plugin.resolve({"activation": "silu"}) == {**plugin.resolve({}), "activation": "silu"}
    with pytest.raises(
        ValueError, match="activation: input should be 'relu', 'silu', 'gelu' or 'softplus', got 'tanh'"
    ):
        plugin.resolve({"activation": "tanh"})


@pytest.mark.parametrize("name", SETTABLE)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_the_activation_takes_the_place_of_every_relu(name, activation):
    """The same graph and the same fresh weights but for the function."""
    module, settings, size = SMALL[name]
    torch.manual_seed(0)
    plain = module.build(inputs("cifar10", size=size), **settings)
    torch.manual_seed(0)
    other = module.build(inputs("cifar10", size=size), **settings, activation=activation)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert list(plain.state_dict()) == list(other.state_dict())
    targets = [[node.target for node in trace(net).nodes if node.op != "output"] for net in (plain, other)]
    assert F.relu in targets[0]
    function = FUNCTIONS[activation]
    assert len(targets[0]) == len(targets[1])
    for place, (before, after) in enumerate(zip(*targets, strict=True)):
        assert after == (function if before == F.relu else before), place


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
    dead = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    if isinstance(net, mobilenet_v2.MobileNetV2):  # only BatchNorm sees the biases of its linear bottlenecks
        dead = {name for name in dead if not name.endswith(("project.1.bias", "shortcut.1.bias"))}
    assert dead == set()


def test_traceable_by_fx(small):
    net, x = small
    net.eval()
    traced = fx.symbolic_trace(net)
    assert torch.equal(traced(x), net(x))
    assert torch.equal(traced(x[:1]), net(x[:1]))  # no batch size was baked in


def test_normalization_is_inside_the_net(small):
    net, x = small
    net.eval()
    assert isinstance(net.normalise, Normalize)
    facts = KNOWN["cifar10"]
    mean, std = torch.tensor(facts.mean).view(1, 3, 1, 1), torch.tensor(facts.std).view(1, 3, 1, 1)
    logits = net(x)
    net.normalise = nn.Identity()
    assert torch.allclose(net((x - mean) / std), logits, atol=1e-6)


def test_normalization_is_the_identity_at_mean_0_std_1():
    x = torch.rand(2, 1, 4, 4)
    assert Normalize(inputs())(x) is x
    scaled = Normalize(inputs(mean=(0.5,), std=(0.25,)))
    assert torch.allclose(scaled(x), (x - 0.5) / 0.25)
    assert set(scaled.state_dict()) == {"mean", "std"}
    for wrong in ({"mean": (0.0, 0.0)}, {"std": (0.0,)}):
        with pytest.raises(ValueError, match="expected 1 value, std above 0"):
            Normalize(inputs(**wrong))


def test_no_bias_meets_a_batchnorm(small):
    net, _ = small
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights(name):
    module, settings, size = SMALL[name]

    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in module.build(inputs("cifar10", size=size), **settings).parameters()])

    assert torch.equal(weights(7), weights(7))
    assert not torch.equal(weights(7), weights(8))


def test_in_eval_mode_no_image_sees_another(small):
    net, x = small
    net.eval()
    assert torch.allclose(net(x)[1:2], net(x[1:2]), atol=1e-5)


def test_the_norm_of_the_input_gradient_is_differentiable(small):
    """Closed-form defenses differentiate a Jacobian by the weights: against a central difference in float64."""
    net, x = small
    net.double().eval()
    x, weights = x.double().requires_grad_(), list(net.parameters())
    with torch.no_grad():
        for w in weights:
            w.add_(torch.randn_like(w), alpha=0.1)  # fresh biases of 0 leave narrow nets exactly at the kink of ReLU

    def size():
        (slope,) = torch.autograd.grad(net(x)[:, 0].sum(), x, create_graph=True)
        return slope.square().sum()

    slopes = torch.autograd.grad(size(), weights, allow_unused=True)  # the last bias has no part in a Jacobian
    way = [torch.randn_like(w) for w in weights]
    exact = sum((s * d).sum() for s, d in zip(slopes, way, strict=True) if s is not None)
    sizes = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for w, d in zip(weights, way, strict=True):
                w.add_(d, alpha=step)
        sizes.append(size())
    assert exact.abs() > 0
    assert torch.allclose((sizes[0] - sizes[1]) / 2e-6, exact, rtol=1e-4)


@pytest.mark.slow  # the first use of torch.func imports for seconds
def test_forward_mode_and_batching_transforms(small):
    net, x = small
    net.double().eval()
    x = x.double()
    way, weight = torch.randn_like(x), torch.randn(3, 10, dtype=torch.float64)
    logits, pushed = torch.func.jvp(net, (x,), (way,))
    (pulled,) = torch.func.vjp(net, x)[1](weight)
    assert torch.allclose((pushed * weight).sum(), (pulled * way).sum())
    assert torch.allclose(torch.func.vmap(lambda one: net(one[None])[0])(x), logits)


def test_closed_form_noise_trains_it(small):
    net, x = small
    defense = plugins.make("defenses", PluginChoice("noisy", {"sigma": 0.3, "structure": "jacobian"}), None)
    net = defense.wrap(net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        terms = defense.loss(net, Batch(x, torch.tensor([0, 1, 2]), torch.arange(3), 0, step / 2), None)
        assert all(torch.isfinite(term) for term in terms.values()), terms
        optimizer.zero_grad()
        sum(terms.values()).backward()
        # a fresh net's Jacobian grows with its depth: without the clip resnet50 and mobilenet_v2 diverge at once
        nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
    assert sum(moved) >= 0.8 * len(moved)


@pytest.mark.parametrize(
    ("module", "data", "expected"),
    [
        (mlp, "digits", 85_002),
        (lenet5, "mnist", 61_706),
        (small_cnn, "mnist", 467_818),
        (preact_resnet18, "cifar10", 11_172_170),
        (wide_resnet, "cifar10", 46_160_474),
        (resnet18, "cifar10", 11_173_962),
        (resnet50, "cifar10", 23_520_842),
        (resnet110, "cifar10", 1_730_714),  # with zero padding as shortcut it would be 1 727 962
        (resnet_cifar, "cifar10", 269_722 + 2_752),  # ResNet-20, with 1x1 convolutions as shortcuts
        (vgg11, "cifar10", 9_231_114 - 2_752),  # the usual form has biases before BatchNorm
        (mobilenet_v2, "cifar10", 2_296_922),
        (vit_tiny, "cifar10", 5_362_762),
    ],
)
def test_parameter_counts(module, data, expected):
    with torch.device("meta"):
        assert parameters(module.build(inputs(data))) == expected


@pytest.mark.parametrize(("width", "million"), [(16, 6.60), (32, 25.0), (64, 97.2)])
def test_multiplications_of_small_cnn(width, million):
    """By hand: convolutions with `width` channels at each position, two with twice as many at a quarter; the layers."""
    exact = 32**2 * (27 * width + 9 * width**2) + 16**2 * (18 + 36) * width**2 + 64 * 2 * width * 128 + 1280
    assert exact / 1e6 == pytest.approx(million, rel=5e-3)
    with FlopCounterMode(display=False) as counted, torch.device("meta"):
        small_cnn.build(inputs("cifar10"), width=width)(torch.rand(1, 3, 32, 32))
    assert counted.get_total_flops() == 2 * exact


@pytest.mark.parametrize(("depth", "expected"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6)])
def test_the_nets_of_the_paper_of_resnet_cifar(depth, expected):
    with torch.device("meta"):
        assert parameters(resnet_cifar.build(inputs("cifar10"), depth=depth)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("depth", "width", "million"), [(8, 16, 12.5), (20, 16, 40.8), (20, 32, 162), (32, 16, 69.1)])
def test_multiplications_of_resnet_cifar(depth, width, million):
    """By hand: at each position of the image the stem, depth - 2 convolutions of 9 w^2 (later stages have twice the
    channels at a quarter of the positions), less in two that have half of the inputs, and two shortcuts; the head.
    ResNet-20 is known for 41 million."""
    exact = 32**2 * (27 * width + (depth - 2) * 9 * width**2 - 9 * width**2 + width**2) + 40 * width
    assert exact / 1e6 == pytest.approx(million, rel=5e-3)
    with FlopCounterMode(display=False) as counted, torch.device("meta"):
        resnet_cifar.build(inputs("cifar10"), depth=depth, width=width)(torch.rand(1, 3, 32, 32))
    assert counted.get_total_flops() == 2 * exact


@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v2", "resnet18", "resnet50", "resnet110", "vit_tiny"])
@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_full_size_nets_accept_small_gray_images(name, data):
    facts = inputs(data)
    with torch.device("meta"):
        net = SMALL[name][0].build(facts)
        assert net(torch.rand(2, facts.channels, facts.size, facts.size)).shape == (2, facts.classes)


def test_a_layer_of_vit_tiny_is_the_pre_norm_layer_of_torch():
    ours = vit_tiny.Layer(12, 3).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
    pairs = {
        "norm1": "norm1", "qkv": "self_attn.in_proj_", "project": "self_attn.out_proj",
        "norm2": "norm2", "fc1": "linear1", "fc2": "linear2",
    }  # fmt: skip
    weights = ours.state_dict()
    named = {
        f"{b}{'' if b.endswith('_') else '.'}{k}": weights[f"{a}.{k}"]
        for a, b in pairs.items()
        for k in ("weight", "bias")
    }
    theirs.load_state_dict(named)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x))


@pytest.mark.parametrize(("width", "channels"), [(1.0, 1280), (1.4, 1792), (0.5, 1280)])
def test_the_last_convolution_of_mobilenet_v2_only_grows(width, channels):
    with torch.device("meta"):
        assert mobilenet_v2.build(inputs("cifar10"), width=width).head.in_features == channels


@pytest.mark.parametrize(("size", "pools"), [(8, 3), (28, 4), (32, 5), (64, 5)])
def test_vgg11_leaves_out_pools_of_a_single_pixel(size, pools):
    net = vgg11.build(inputs(size=size), width=1)
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.modules()) == pools
    assert net(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("module", [lenet5, small_cnn])
def test_pooling_before_the_activation(module):
    net = module.build(inputs())
    steps = [str(node.target) if node.op == "call_module" else node.name for node in fx.symbolic_trace(net).graph.nodes]
    pools = [i for i, step in enumerate(steps) if step == "pool"]
    assert len(pools) == 2
    for i in pools:
        assert steps[i - 1].startswith("conv")
        assert steps[i + 1] == "activation"


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
    ("build", "message"),
    [
        (lambda: lenet5.build(inputs(size=12)), "lenet5 needs images of at least 14 x 14 pixels, got 12"),
        (lambda: lenet5.build(inputs(size=15)), "even side of at least 14 pixels, got 15"),
        (lambda: small_cnn.build(inputs(size=7)), "small_cnn needs images of at least 8 x 8"),
        (lambda: small_cnn.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: preact_resnet18.build(inputs(size=7)), "preact_resnet18 needs images of at least 8 x 8"),
        (lambda: wide_resnet.build(inputs(size=4)), "wide_resnet needs images of at least 8 x 8"),
        (lambda: wide_resnet.build(inputs(), depth=20), "depth is 20; expected 6n"),
        (lambda: wide_resnet.build(inputs(), depth=4), "depth is 4; expected 6n"),
        (lambda: wide_resnet.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: preact_resnet18.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: resnet18.build(inputs(size=7)), "resnet18 needs images of at least 8 x 8"),
        (lambda: resnet18.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: resnet50.build(inputs(size=7)), "resnet50 needs images of at least 8 x 8"),
        (lambda: resnet50.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: resnet110.build(inputs(size=7)), "resnet110 needs images of at least 8 x 8"),
        (lambda: resnet110.build(inputs(), depth=18), "depth is 18; expected 6n"),
        (lambda: resnet110.build(inputs(), depth=2), "depth is 2; expected 6n"),
        (lambda: resnet110.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: resnet_cifar.build(inputs(), depth=16), "^resnet_cifar: depth is 16; expected 6n"),
        (lambda: vgg11.build(inputs(size=7)), "vgg11 needs images of at least 8 x 8"),
        (lambda: vgg11.build(inputs(), width=0), "width is 0; expected at least 1"),
        (lambda: mobilenet_v2.build(inputs(size=7)), "mobilenet_v2 needs images of at least 8 x 8"),
        (lambda: mobilenet_v2.build(inputs(), width=0.0), r"width is 0\.0; expected a factor above 0"),
        (lambda: vit_tiny.build(inputs(size=7)), "vit_tiny needs images of at least 8 x 8"),
        (lambda: vit_tiny.build(inputs(size=30)), "patch is 4; expected a divisor of the image's side, 30"),
        (lambda: vit_tiny.build(inputs(), dim=16), "dim is 16; expected a multiple of heads, 3"),
        (lambda: vit_tiny.build(inputs(), depth=0), "depth is 0; expected at least 1"),
        (lambda: mlp.build(inputs(), width=0), "mlp: width is 0"),
        (lambda: mlp.build(inputs(), depth=-1), "depth is -1; expected at least 0"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
