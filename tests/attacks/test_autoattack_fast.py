"""autoattack_fast: each attack in the law of the package, the same verdicts whatever the batches, an honest audit."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import foreign_models
import pytest
import torch
from nets import Unproved, digits, fit, mlp
from torch import Tensor, nn

from attacks import _apgd, _fab, _rows, _square
from attacks._apgd import apgd
from attacks._fab import fab, to_plane
from attacks._rows import Found, PoolBySlices, Rows, gather, targeted, uniforms
from attacks._square import square
from attacks.autoattack_fast import LEAVE, AutoAttackFast
from bench.core import precision
from bench.core.attack import Context, Outcome
from bench.core.classifier import Classifier, frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import margin
from bench.core.rng import scope
from bench.core.threat import Threat

EPS = "0.1"


@functools.cache
def trained() -> nn.Module:
    """A net of the digits that is robust to about a third of the images at EPS."""
    return fit(mlp(), lambda x: (x + 0.2 * torch.randn_like(x)).clamp(0, 1))


@functools.cache
def convolutions() -> nn.Module:
    """Convolutions and pooling, trained without noise."""
    with scope(0):
        parts = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)]
    return fit(nn.Sequential(*parts))


def images(count: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    _, _, x, y = digits()
    return x[:count].repeat(1, channels, 1, 1), y[:count]


def threat(eps: str = EPS) -> Threat:
    return Threat("Linf", Epsilon(eps))


def found(net: nn.Module, count: int, eps: str = EPS) -> Found:
    """Images that the net gets right."""
    x, y = images(count)
    right = net(x).argmax(1) == y
    result = Found(net, x[right], y[right], threat(eps))
    result.number = 1
    return result


def rows(of: Found, targets: int) -> Rows:
    everything = torch.arange(len(of.x))
    return targeted(of, everything, of.model(of.x), targets)


def evaluate(net: nn.Module, count: int, ctx: Context | None = None, eps: str = EPS, **settings: Any) -> Outcome:
    """Of the net's first images, all of which are attacked."""
    x, y = images(count)
    return AutoAttackFast(threat(eps), **settings).evaluate(Unproved(net), x, y, ctx or Context(seed=1))


@functools.cache
def in_full(count: int) -> Outcome:
    return evaluate(trained(), count)


# the attacks against the package


@pytest.mark.parametrize("target_class", [None, 2, 5])
def test_apgd_takes_the_steps_of_the_package(target_class: int | None) -> None:
    """From equal starts, 100 steps later: the same best loss of every row. At a small eps nothing is broken."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    net = trained()
    ours = found(net, 60, "0.02")
    everything = torch.arange(len(ours.x))
    order = net(ours.x).sort(dim=1)[1]
    target = None if target_class is None else order[:, -target_class]
    state = _apgd._Rows(ours, Rows(everything, torch.zeros_like(everything), target), 3, "fp32")
    start = state.point.clone()
    peer: Any
    if target_class is None:
        peer = APGDAttack(net, eps=0.02, loss="ce", device=ours.x.device)
    else:
        peer = APGDAttack_targeted(net, eps=0.02, device=ours.x.device)
        peer.y_target = target
    peer.init_hyperparam(ours.x)
    with frozen(net):
        _, robust, theirs, _ = peer.attack_single_run(ours.x, ours.y, x_init=start)
        state.pass_()
        state.begin()
        losses = []
        interval, since = _apgd.FIRST, 0
        for _ in range(_apgd.STEPS):
            state.move()
            state.pass_()
            state.track()
            losses.append(state.best_loss)
            since += 1
            if since == interval:
                state.check(interval)
                interval, since = max(interval - _apgd.SHORTER, _apgd.SHORTEST), 0
    keep = ours.robust & robust.bool()
    assert int(keep.sum()) > 40
    assert torch.allclose(losses[-1][keep], theirs[keep], atol=1e-5, rtol=1e-4)


def test_the_step_is_halved_where_the_loss_rose_in_at_most_three_of_four_steps() -> None:
    """Equal to the package also where it rose in exactly 12 of 16."""
    from pyautoattack.autopgd_base import APGDAttack

    ours = found(trained(), 20, "0.02")
    count, interval = len(ours.x), 16
    ups = torch.arange(count) % (interval + 1)  # the number of rises of each row
    rose = torch.arange(interval)[:, None] < ups
    losses = torch.cat([torch.zeros(1, count), torch.where(rose, 1.0, -1.0).cumsum(0)])
    everything = torch.arange(count)
    state = _apgd._Rows(ours, Rows(everything, torch.zeros_like(everything), None), 3, "fp32")
    state.pass_()
    state.begin()
    state.rises, state.best_loss = rose.sum(0).float(), state.checked_loss + 1  # so that the best did not stand still
    state.check(interval)
    theirs = APGDAttack(trained(), eps=0.02, device="cpu").check_oscillation(losses, interval, interval, None)
    assert torch.equal(state.halved, theirs.bool())
    assert 12 in ups[state.halved]


def test_a_row_leaves_by_its_best_loss_and_not_by_the_last() -> None:
    ours = found(trained(), 4, "0.02")
    everything = torch.arange(len(ours.x))
    state = _apgd._Rows(ours, Rows(everything, torch.zeros_like(everything), None), 3, "fp32")
    state.pass_()
    state.begin()
    state.best_loss, state.loss = torch.linspace(0, 1, len(ours.x)), torch.linspace(1, 0, len(ours.x))
    assert state.shrink(0.9)
    assert state.rows.image.tolist() == [len(ours.x) - 1]


def test_the_loss_of_apgd_is_the_packages() -> None:
    from pyautoattack.autopgd_base import APGDAttack_targeted

    torch.manual_seed(0)
    logits, y, target = torch.randn(50, 10), torch.randint(10, (50,)), torch.randint(10, (50,))
    peer = APGDAttack_targeted(nn.Identity(), eps=0.1)
    peer.y_target = target
    assert torch.allclose(_apgd.targeted_dlr(logits, y, target), peer.dlr_loss_targeted(logits, y), atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_step_to_a_plane_is_the_smallest(scale: float) -> None:
    """Equal to the projection of the package, by sorting, in float64; nearer to the plane in float32."""
    from pyautoattack.fab_projections import projection_linf

    torch.manual_seed(0)
    point = (1.5 * torch.rand(64, 3, 6, 6, dtype=torch.float64) - 0.5).clamp_min(0)
    normal = torch.randn_like(point) * (torch.rand_like(point) > 0.1)
    height = scale * torch.randn(64, 1, 1, 1, dtype=torch.float64)
    offset = (normal * point).sum((1, 2, 3)) - height.flatten()
    theirs = projection_linf(point.flatten(1), normal.flatten(1), offset).view_as(point)
    ours = to_plane(point, normal, height)
    assert torch.allclose(ours, theirs, atol=1e-12)
    reached = (normal * ours).sum((1, 2, 3), keepdim=True).abs() >= height.abs() * (1 - 1e-9)
    corner = ours.abs().flatten(1).amax(1) > 0.99
    assert bool((reached.flatten() | corner).all())
    single = to_plane(point.float(), normal.float(), height.float())
    assert torch.allclose(single.double(), ours, atol=1e-6)
    assert float((point.float() + single).min()) >= 0
    assert float((point.float() + single).max()) <= 1


def test_a_step_of_fab_mixes_both_projections_by_their_sizes() -> None:
    """The formula at the top of attacks/_fab.py: a = min(|d(x_t)| / (|d(x_t)| + |d(x_0)|), 0.1); no step back."""
    torch.manual_seed(0)
    center = 0.5 + 0.1 * torch.rand(8, 1, 4, 4, dtype=torch.float64)
    point = center + 0.1 * torch.randn_like(center)
    normal = torch.randn_like(center)
    # near the plane at first, so that a is below its limit; then far from it
    ahead = torch.tensor([-1e-4, -1e-3, -1e-2, -0.1, -0.3, -0.5, -1.0, -2.0], dtype=torch.float64)
    height = ahead.view(-1, 1, 1, 1)
    d, d_0 = (
        to_plane(point, normal, height),
        to_plane(center, normal, height + (normal * (center - point)).sum((1, 2, 3), keepdim=True)),
    )
    size, size_0 = (each.abs().flatten(1).amax(1) for each in (d, d_0))
    a = (size / (size + size_0)).clamp_max(0.1).view(-1, 1, 1, 1)
    expected = (1 - a) * (point + 1.05 * d) + a * (center + 1.05 * d_0)
    assert 0 < int((a < 0.1).sum()) < 8
    moved = _fab._step(center, point, ahead, normal, torch.zeros(8, dtype=torch.bool))
    assert torch.allclose(moved, expected.clamp(0, 1), atol=1e-12)


@pytest.mark.parametrize("name", ["noisy", "standard", "convolutions"])
def test_fab_comes_as_near_as_the_package(name: str) -> None:
    """The distance of each row at an eps that breaks none, against the package's, which spends a pass more a step."""
    from pyautoattack.fab_pt import FABAttack_PT

    net = {"noisy": trained, "standard": lambda: fit(mlp()), "convolutions": convolutions}[name]()
    ours = found(net, 40, "0.001")
    with frozen(net):
        left, distance = fab(ours, rows(ours, 3))
        peer = FABAttack_PT(net, norm="Linf", eps=0.001, n_iter=100, device=ours.x.device)
        theirs = []
        for target_class in (2, 3, 4):
            peer.target_class = target_class
            with torch.no_grad():
                adversarial = peer.attack_single_run(ours.x, ours.y, is_targeted=True)
            theirs.append((adversarial - ours.x).abs().flatten(1).amax(1))
    ratio = distance / torch.cat(theirs)
    assert len(left.image) == 3 * len(ours.x)
    assert bool((ratio < 1.02).float().mean() >= 0.97)
    assert 0.98 < float(ratio.median()) < 1.005


@pytest.mark.parametrize(("widest", "size"), [(1, 500), (6, 500), (6, 7)])
def test_square_accepts_what_one_square_at_a_time_accepts(
    widest: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop without shortcuts: the same pixels, margins and numbers of queries."""
    monkeypatch.setattr(_square, "WIDEST", widest)
    monkeypatch.setattr(_square, "QUERIES", 700)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), nn.ReLU(), nn.Linear(30, 10)).double()
    for parameter in net.parameters():  # of few bits, so that sums are exact, and equal margins are equal in any batch
        parameter.data = (512 * parameter.data).round() / 512
    net[1].weight.data[:, ::2] = 0  # every second column of pixels changes nothing: an equal margin is no gain
    x = (64 * torch.rand(12, 3, 8, 8, dtype=torch.float64)).round() / 64
    ours = Found(net, x, net(x).argmax(1), threat("0.03125"))
    with torch.inference_mode():
        search = _square._Search(ours, torch.arange(12), 5, size)
        start = search.high.clone()
        search.run(lambda share: None, [])
    total = 0
    for image in range(12):
        high, least, made, accepted = one_at_a_time(ours, search, start[image], image)
        total += accepted
        assert torch.equal(search.high[image], high)
        assert float(search.least[image]) == pytest.approx(least, abs=1e-12)
        assert min(int(search.query[image]), 700) == made
    assert total > 60


@torch.no_grad()
def one_at_a_time(ours: Found, search: _square._Search, high: Tensor, image: int) -> tuple[Tensor, float, int, int]:
    """The search as the paper has it: pixels, margin, queries made and squares accepted."""
    center, radius, side = ours.x[image], ours.threat.radius, _square.sides(tuple(ours.x.shape[1:]))
    low, top = (center - radius).clamp_min(0), (center + radius).clamp_max(1)

    def margin_of(high: Tensor) -> float:
        return -float(margin(ours.model(torch.where(high, top, low)[None]), ours.y[image : image + 1]))

    least, made, accepted = margin_of(high), 0, 0
    while made < _square.QUERIES and least > 0:
        row, column, length = int(search.row[image, made]), int(search.column[image, made]), int(side[made])
        tried = high.clone()
        tried[:, row : row + length, column : column + length] = search.up[image, made][:, None, None]
        value = margin_of(tried)
        if value < least or value <= 0:
            high, least, accepted = tried, value, accepted + 1
        made += 1
    return high, least, made, accepted


def test_squares_have_the_sides_and_places_of_the_package() -> None:
    from pyautoattack.square import SquareAttack

    peer = SquareAttack(nn.Identity(), eps=0.1, resc_schedule=False)
    side = _square.sides((1, 28, 28))
    for query in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        assert int(side[query]) == max(round((peer.p_selection(query) * 28 * 28) ** 0.5), 1)
    ours = found(trained(), 20)
    search = _square._Search(ours, torch.arange(len(ours.x)), 1, 100)
    assert int((search.row + search.side).max()) == int((search.column + search.side).max()) == 7  # never the last


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pooling_by_slices_gives_the_same_numbers(layout: torch.memory_format) -> None:
    """Windows that it does not know, and passes with gradients, are left to max_pool2d."""
    torch.manual_seed(0)
    x = torch.randint(5, (3, 6, 12, 10)).float().contiguous(memory_format=layout)
    x[0, 0, 0, 0] = float("nan")
    pools = [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d((2, 2), (2, 2), padding=1),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
    ]
    for pool in pools:
        for images in (x, x[:, :, :11, :7]):
            expected = pool(images)
            with PoolBySlices():
                assert torch.equal(pool(images).nan_to_num(-1), expected.nan_to_num(-1))
    seen = x.nan_to_num(0).requires_grad_()
    (expected,) = torch.autograd.grad(pools[0](seen).sum(), seen)
    with PoolBySlices():
        (got,) = torch.autograd.grad(pools[0](seen).sum(), seen)
        assert len(nn.MaxPool2d(2, return_indices=True)(x)) == 2
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gathered_images_keep_their_layout(layout: torch.memory_format) -> None:
    x, rows = torch.rand(5, 3, 4, 6).contiguous(memory_format=layout), torch.tensor([4, 0, 0])
    assert torch.equal(gather(x, rows), x[rows])
    assert gather(x, rows).is_contiguous(memory_format=layout)


# the whole


def test_it_breaks_what_the_package_breaks() -> None:
    from attacks.autoattack import AutoAttack

    x, y = images(60)
    ours = in_full(60)
    theirs = AutoAttack(threat()).evaluate(Classifier(trained()), x, y, Context(seed=1))
    assert 10 < int(ours.columns["correct"].sum()) < 50
    assert int((ours.columns["correct"] != theirs.columns["correct"]).sum()) <= 1
    assert set(ours.columns["stage"].tolist()) <= {-1, 0, 1, 2, 3, 4}
    quick = evaluate(trained(), 60, mode="quick")
    assert int((ours.columns["correct"] != quick.columns["correct"]).sum()) <= 1
    assert float(quick.columns["forwards"][0]) < 0.6 * float(ours.columns["forwards"][0])


@pytest.mark.parametrize("eps", ["1/255", "4/255"])
def test_a_hit_at_the_edge_of_a_small_ball_counts(eps: str) -> None:
    """x + eps, rounded to float32, lies up to 3e-8 outside a ball around an x near 1: more than a millionth of 4/255.

    A linear model is broken at eps iff its margin is below eps |w_y - w_j|_1, as no pixel is near the box's edge.
    """
    with scope(0):
        x = 0.1 + 0.8 * torch.rand(60, 3, 8, 8)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    weight, logits = net[1].weight.detach(), net(x).detach()
    y = logits.argmax(1)
    gap = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight).abs().sum(2).clamp_min(1e-9)
    room = gap.scatter(1, y[:, None], float("inf")).amin(1) / float(Epsilon(eps))
    clear = (room - 1).abs() > 0.05
    got = AutoAttackFast(threat(eps)).evaluate(Unproved(net), x[clear], y[clear], Context(seed=1))
    assert 0.05 < float((room[clear] > 1).float().mean()) < 0.95
    assert got.columns["correct"].tolist() == (room[clear] > 1).tolist()
    assert int(got.columns["stage"].max()) <= 2  # APGD at the edge, not FAB before it


def test_batches_and_restarts_change_no_verdict() -> None:
    whole = evaluate(trained(), 30, mode="quick", audit=5)
    small = evaluate(trained(), 30, mode="quick", audit=5, batch_size=17)
    assert torch.equal(whole.columns["stage"], small.columns["stage"])
    assert torch.equal(whole.columns["audited"], small.columns["audited"])
    states: list[dict[str, Tensor]] = []
    evaluate(trained(), 30, Context(seed=1, save=states.append), mode="quick", audit=5, batch_size=17)
    assert len(states) > 10
    for saved in (states[0], states[len(states) // 2], states[-1]):
        again = evaluate(trained(), 30, Context(seed=1, saved=saved), mode="quick", audit=5, batch_size=17)
        assert torch.equal(again.columns["correct"], small.columns["correct"])
        for name in ("stage", "audited", "screened"):
            assert torch.equal(again.columns[name], small.columns[name])
        assert again.x_adv is not None
        assert torch.equal(again.x_adv, small.x_adv)


class Masked(nn.Module):
    """A net whose input is rounded: its gradient is zero, and squares alone can break it."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = trained()((x * 8).round() / 8)
        return logits


def test_masked_gradients_are_judged_in_full() -> None:
    """Nothing leaves early and nothing stays screened: squares break what gradients cannot."""
    quick = evaluate(Masked(), 30, mode="quick")
    full = evaluate(Masked(), 30, mode="full")
    assert int(evaluate(Masked(), 10, audit=2).columns["screened"].sum()) == 0
    stages = set(full.columns["stage"].tolist())
    assert 4 in stages
    assert 3 not in stages
    assert torch.equal(quick.columns["stage"], full.columns["stage"])


def test_a_model_may_take_a_gradient_of_its_own() -> None:
    ours = found(foreign_models.purifies(), 4)
    square(ours, torch.arange(len(ours.x)), 1, 500, lambda share: None, LEAVE["square"])
    assert not ours.robust.all()


def test_an_answer_of_nan_is_an_error_of_the_model() -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = trained()(x)
            return logits * float("nan")

    ours = found(trained(), 10)
    ours.model = Undefined()
    square(ours, torch.arange(len(ours.x)), 1, 100, lambda share: None)
    assert not bool(ours.robust.any())


def test_large_logits_change_nothing() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = 100 * trained()(x)
            return logits

    plain, large = evaluate(trained(), 60, mode="quick"), evaluate(Large(), 60, mode="quick")
    assert int((plain.columns["correct"] != large.columns["correct"]).sum()) <= 1


def test_an_audit_judges_random_survivors_of_the_screen() -> None:
    audited = evaluate(trained(), 60, audit=5).columns
    full = in_full(60).columns
    drawn, left = audited["audited"], audited["screened"]
    assert int(drawn.sum()) == 5
    assert bool(audited["correct"][drawn].all())
    assert int(left.sum()) == int(audited["correct"].sum()) - 5 > 0
    assert int((audited["correct"] != full["correct"]).sum()) <= 1
    other = evaluate(trained(), 60, Context(seed=2), audit=5).columns
    assert not torch.equal(drawn, other["audited"])
    everything = evaluate(trained(), 20, audit=1000).columns
    assert not bool(everything["screened"].any())


@pytest.mark.parametrize("audit", [0, 2])
def test_progress_ends_with_the_last_attack(audit: int) -> None:
    shares: list[float] = []
    evaluate(trained(), 20, Context(seed=1, report=lambda done, total, note: shares.append(done / total)), audit=audit)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_one_broken_image_of_the_audit_sends_all_through_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAVE, "apgd-t", {1: float("inf")})  # a screen that breaks only what its start breaks
    audited = evaluate(trained(), 60, audit=20).columns
    full = in_full(60).columns
    assert not bool(audited["screened"].any())
    assert bool((audited["audited"] & ~audited["correct"]).any())
    assert int((audited["correct"] != full["correct"]).sum()) <= 1


def test_every_hit_is_verified_by_the_model_itself() -> None:
    """A model whose answers depend on whether gradients are on, as bf16 gradient passes differ from fp32 verdicts."""

    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = trained()(x)
            return logits.roll(1, 1) if torch.is_grad_enabled() else logits

    got = evaluate(Split(), 40, eps="0.001", mode="quick")
    assert bool(got.columns["correct"].eq(got.columns["clean"]).all())


def test_bf16_gradients_break_the_same_images() -> None:
    exact, coarse = evaluate(trained(), 60, mode="quick"), evaluate(trained(), 60, mode="quick", precision="bf16")
    assert int((exact.columns["correct"] != coarse.columns["correct"]).sum()) <= 1


def test_auto_chooses_bf16_where_it_pays_and_remembers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts passes: verdicts and passes are those of the choice, and a restart keeps it."""
    passes = {torch.float32: 0, torch.bfloat16: 0}
    cost = {torch.float32: 1.6, torch.bfloat16: 1.0}
    net = trained()

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = net(x)
            passes[logits.dtype] += 1
            return logits

    def auto(**ctx: Any) -> dict[str, Tensor]:
        return evaluate(Watched(), 20, Context(seed=1, **ctx), mode="quick", precision="auto").columns

    for module in (_rows, precision):
        monkeypatch.setattr(module, "clock", lambda device: 0.01 * sum(cost[each] * passes[each] for each in passes))
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    states: list[dict[str, Tensor]] = []
    chosen, fixed = auto(save=states.append), evaluate(net, 20, mode="quick", precision="bf16").columns
    assert bool(chosen["bf16"][chosen["clean"]].all())
    assert "bf16" not in fixed
    assert torch.equal(chosen["stage"], fixed["stage"])
    assert torch.equal(chosen["forwards"], fixed["forwards"])
    cost[torch.float32] = 1.4
    kept, exact = auto(saved=states[0]), auto()
    assert bool(kept["bf16"][kept["clean"]].all())
    assert torch.equal(kept["stage"], chosen["stage"])
    assert not bool(exact["bf16"].any())
    assert torch.equal(exact["stage"], evaluate(net, 20, mode="quick").columns["stage"])


def test_streams_are_keyed_by_image_and_target() -> None:
    image = torch.tensor([0, 1, 1])
    drawn = uniforms((4,), 7, Rows(image, torch.tensor([0, 0, 1]), None))
    alone = uniforms((4,), 7, Rows(image[2:], torch.tensor([1]), None))
    assert torch.equal(drawn[2:], alone)
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    assert not torch.equal(drawn, uniforms((4,), 8, Rows(image, torch.tensor([0, 0, 1]), None)))


def test_the_most_likely_targets_come_first() -> None:
    ours = found(trained(), 30)
    got = rows(ours, 2)
    logits = ours.model(ours.x).scatter(1, ours.y[:, None], float("-inf"))
    assert torch.equal(got.target, logits.topk(2, dim=1).indices.T.flatten())
    assert torch.equal(got.image, torch.arange(len(ours.x)).repeat(2))


def test_what_it_does_not_support_is_told() -> None:
    noisy = Classifier(trained())
    noisy.stochastic = True
    fast = AutoAttackFast(threat())
    assert "needs a deterministic model" in str(fast.unsupported_reason(noisy))
    assert "L2" in str(replace(fast, threat=Threat("L2", Epsilon("0.1"))).unsupported_reason(Classifier(trained())))
    x, y = images(10)
    few = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with torch.no_grad():
        y = few.predict(x)
    with pytest.raises(ValueError, match="4 classes, this model has 3; use autoattack"):
        fast.evaluate(few, x, y, Context(seed=0))


def test_rows_of_broken_images_leave() -> None:
    ours = found(trained(), 60, "0.3")
    passed: list[int] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            passed.append(len(x))
            logits: Tensor = trained()(x)
            return logits

    ours.model = Watched()
    with frozen(trained()):
        apgd(ours, rows(ours, 9), 1)
        assert not bool(ours.robust.any())
        assert sum(passed) < 12 * 9 * len(ours.x)
        passed.clear()
        fab(ours, rows(ours, 9))
        square(ours, torch.arange(len(ours.x)), 1, 100, lambda share: None)
    assert sum(passed) == len(ours.x)  # the clean logits that order the targets
    assert _fab.STEPS == _apgd.STEPS == 100
