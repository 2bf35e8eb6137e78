"""What is wrong with how a model is fed and read, on a few test images: range, normalization, output, mode, classes.

Each check gives one Line with what was measured. They ask whether the harness sees the model as its author does;
whether its robustness is real is asked by the soundness checks of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.rng import scope, seed
from bench.core.stats import paired_difference
from bench.data.datasets import Facts
from bench.doctor import rivals

State = Literal["OK", "WARN", "FAIL"]
IMAGES = 200
BATCH = 64
# of the largest logit: what another order of the same sums may cost, as in AutoAttack's check for randomness
GAP = 1e-4
GAIN_WARN, GAIN_FAIL = 0.02, 0.05  # share of images that another input or class order must win, beyond chance
ZERO_WARN, ZERO_FAIL = 0.01, 0.1  # share of correct images without a gradient, as in check C4


class Line(NamedTuple):
    """One check: its name, how it ended, what was measured, and what to do (empty where nothing)."""

    check: str
    state: State
    value: str
    todo: str = ""


def examine(model: nn.Module, x: Tensor, y: Tensor, facts: Facts, randomised: bool) -> Iterator[Line]:
    """All checks of a model in eval mode on images `x` (b c h w in [0,1]) with labels `y`, each as soon as it is known.

    `randomised`: the user says that it draws at test time. Ends early where nothing further can be asked.
    """
    try:
        with scope(seed("doctor", 0)), torch.no_grad():
            logits = model(x[:BATCH])
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Line("output shape", "FAIL", said, f"the model must take images of shape {tuple(x[:BATCH].shape)}")
        return
    shape = _shape(logits, min(BATCH, len(x)), facts)
    yield shape
    if shape.state == "FAIL":
        return
    with scope(seed("doctor", 0)):
        logits = answers(model, x)
    finite = _finite(logits)
    yield finite
    if finite.state == "FAIL":
        return
    yield _mode(model)
    drawn = _randomness(model, x, logits, randomised)
    yield drawn[0]
    yield _batches(model, x, logits, noisy=drawn[1])
    yield _probabilities(logits)
    yield _gradient(model, x, y, logits)
    yield from _accuracy(model, x, y, logits, facts)


def answers(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all images, in batches, on the CPU in double precision."""
    with torch.no_grad():
        return torch.cat([model(part).detach().double().cpu() for part in x.split(BATCH)])


def _shape(logits: object, n: int, facts: Facts) -> Line:
    wanted = (n, facts.classes)
    if not isinstance(logits, Tensor):
        return Line("output shape", "FAIL", f"a {type(logits).__name__}", f"return one tensor of logits {wanted}")
    if tuple(logits.shape) != wanted:
        todo = f"{facts.name} has {facts.classes} classes: return logits of shape {wanted}"
        return Line("output shape", "FAIL", str(tuple(logits.shape)), todo)
    return Line("output shape", "OK", str(wanted))


def _finite(logits: Tensor) -> Line:
    bad = int((~torch.isfinite(logits)).any(1).sum())
    value = f"{bad} of {len(logits)} images without a finite answer"
    todo = "NaN or infinity is never robustness: look for a division or a logarithm of zero, or damaged weights"
    return Line("finite output", "FAIL" if bad else "OK", value, todo if bad else "")


def _mode(model: nn.Module) -> Line:
    """Modules that still train after eval(), and BatchNorm layers that have no running statistics to use."""
    on = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if on:
        value = f"{len(on)} modules in train mode after eval(), first {_own(on[-1])}"
        return Line("eval mode", "FAIL", value, "let eval() reach every module, and call no train() in forward")
    if norms:
        value = f"{len(norms)} BatchNorm layers without running statistics, first {_own(norms[0])}"
        return Line("eval mode", "FAIL", value, "they judge an image by its batch: track_running_stats=True")
    return Line("eval mode", "OK", "no module in train mode")


def _own(name: str) -> str:
    """A module's name without the wrapper that holds the user's net."""
    return name.removeprefix("net.")


def _gap(a: Tensor, b: Tensor) -> tuple[float, int]:
    """Largest difference of two sets of logits, as a share of the largest logit, and how many labels flip."""
    scale = max(float(a.abs().max()), 1e-12)
    return float((a - b).abs().max()) / scale, int((a.argmax(1) != b.argmax(1)).sum())


def _randomness(model: nn.Module, x: Tensor, logits: Tensor, randomised: bool) -> tuple[Line, bool]:
    with scope(seed("doctor", 1)):
        gap, flips = _gap(logits, answers(model, x))
    value = f"two passes differ by {gap:.1e} of the largest logit, {flips} of {len(x)} labels flip"
    noisy = gap > GAP or flips > 0
    if noisy == randomised:
        return Line("randomness", "OK", value + (", as declared" if noisy else "")), noisy
    if noisy:
        todo = "switch dropout and noise off, or declare a model that draws at test time with --randomised"
        return Line("randomness", "FAIL", value, todo), noisy
    return Line("randomness", "WARN", value, "leave --randomised out: nothing is drawn at test time"), noisy


def _batches(model: nn.Module, x: Tensor, logits: Tensor, noisy: bool) -> Line:
    """Does the answer to an image depend on the images beside it?"""
    if noisy:
        return Line("batch", "WARN", "not asked, since two passes differ anyway")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = torch.empty_like(logits)
    mixed[order] = answers(model, x[order.to(x.device)])
    alone = min(len(x), 32)
    try:
        with torch.no_grad():
            single = torch.cat([model(x[k : k + 1]).detach().double().cpu() for k in range(alone)])
    except Exception as error:
        value = f"a batch of 1 raises {type(error).__name__}: {' '.join(str(error).split())}"
        return Line("batch", "FAIL", value, "a model must answer one image: use running statistics, no batch ones")
    gaps = [_gap(logits, mixed), _gap(logits[:alone], single)]
    gap, flips = max(g for g, _ in gaps), max(f for _, f in gaps)
    value = f"batches of 1 and shuffled ones of {BATCH} differ by {gap:.1e} of the largest logit, {flips} labels flip"
    todo = "an image must be judged without its neighbors: BatchNorm in eval mode, nothing computed over the batch"
    return Line("batch", "FAIL" if gap > 100 * GAP or flips else "OK", value, todo if gap > 100 * GAP or flips else "")


def _probabilities(logits: Tensor) -> Line:
    off = float((logits.sum(1) - 1).abs().max())
    if off < 1e-4 and float(logits.min()) >= -1e-6:
        todo = "return the logits before softmax: probabilities hide the gradient from attacks"
        return Line("logits", "FAIL", f"probabilities: rows are in [0,1] and sum to 1 within {off:.0e}", todo)
    off = float(logits.logsumexp(1).abs().max())
    if off < 1e-4:
        value = f"log-probabilities: their exponentials sum to 1 within {off:.0e}"
        return Line("logits", "WARN", value, "return the logits before log_softmax, as every other row does")
    return Line("logits", "OK", f"from {float(logits.min()):.3g} to {float(logits.max()):.3g}")


def _gradient(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> Line:
    """Does the loss have a gradient at the images? Without one, gradient attacks prove nothing."""
    todo = "gradient attacks cannot see through it; let every operation be differentiable, no detach, no no_grad"
    images = x[:BATCH].clone().requires_grad_(True)
    try:
        with torch.enable_grad(), scope(seed("doctor", 0)):
            loss = F.cross_entropy(model(images), y[:BATCH], reduction="sum")
            (grad,) = torch.autograd.grad(loss, images)
    except RuntimeError as error:
        return Line("gradient", "FAIL", f"none: {' '.join(str(error).split())}", todo)
    right = (logits[:BATCH].argmax(1) == y[:BATCH].cpu()).to(grad.device)
    kept = grad[right] if bool(right.any()) else grad
    share = float((kept.flatten(1).abs().amax(1) == 0).double().mean())
    state: State = "FAIL" if share > ZERO_FAIL else "WARN" if share > ZERO_WARN else "OK"
    value = f"exactly zero at {share:.1%} of {len(kept)} images"
    return Line("gradient", state, value, "" if state == "OK" else todo)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, facts: Facts) -> Iterator[Line]:
    """Input range and normalization, class order, and whether the model is any good under the best of them."""
    labels = y.cpu()
    guess, best = logits.argmax(1), "x"
    share, told = {"x": float((guess == labels).double().mean())}, ""
    chosen = guess
    for name, (image, meaning) in rivals.inputs(x, facts).items():
        with scope(seed("doctor", 0)):
            found = answers(model, image).nan_to_num().argmax(1)
        share[name] = float((found == labels).double().mean())
        if share[name] > share[best]:
            best, told, chosen = name, meaning, found
    value = "accuracy " + ", ".join(f"{each:.3f} at {name}" for name, each in share.items())
    known = 3 / facts.classes  # below, nothing is right: an untrained net has a best input too
    state = _wins(chosen == labels, guess == labels) if share[best] > known else "OK"
    says = {"FAIL": f"{best} is right and x is not; {told}", "WARN": f"{best} does better than x; perhaps {told}"}
    yield Line("input", state, value, says.get(state, ""))
    taken = guess if state == "OK" else chosen
    mapped = rivals.relabelled(taken, labels, facts.classes)
    before, after = (float((each == labels).double().mean()) for each in (taken, mapped))
    value = f"accuracy {before:.3f}, {after:.3f} under the best renaming of classes"
    state = _wins(mapped == labels, taken == labels) if after > known else "OK"
    todo = "the model numbers its classes in another order: reorder its outputs (alphabetical folders are a cause)"
    yield Line("class order", state, value, "" if state == "OK" else todo)
    low = before <= 1.5 / facts.classes and state == "OK"
    todo = "no better than chance under every input and class order tried: other weights, another task, or not trained"
    yield Line("accuracy", "FAIL" if low else "OK", f"{before:.3f} on {len(y)} images", todo if low else "")


def _wins(a: Tensor, b: Tensor) -> State:
    """Is `a` right more often than `b` on the same images, beyond chance? OK where it is not."""
    gain, low, _ = paired_difference(a.tolist(), b.tolist())
    if low <= 0 or gain < GAIN_WARN:
        return "OK"
    return "FAIL" if gain > GAIN_FAIL else "WARN"
