"""Faults in how a model is fed and read, on a few test images: input range, output, mode, class order.

Each check gives one Line. The checks ask whether the harness uses the model as its author does; whether its robustness
is real is asked by the soundness checks of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import predicted
from bench.core.rng import scope, seed
from bench.core.stats import paired_difference
from bench.data.datasets import Facts
from bench.soundness.catalog import CHECKS
from bench.soundness.forward_checks import last_function

State = Literal["OK", "WARN", "FAIL"]
IMAGES = 200
BATCH = 64
ALONE = 32  # images that are also classified in a batch of one
GAP = CHECKS["C1"].limits["U"]  # of the largest logit, between two passes; another order of the same sums costs more
GAIN_WARN, GAIN_FAIL = 0.02, 0.05  # share of images by which another input or class order is better, beyond chance


class Line(NamedTuple):
    """One check: its name, its outcome, the measured value, and what to do (empty if nothing)."""

    check: str
    state: State
    value: str
    todo: str = ""


def _line(check: str, state: State | bool, value: str, todo: str) -> Line:
    """A line whose `todo` is shown only where the check does not pass; True passes and False fails."""
    if isinstance(state, bool):
        state = "OK" if state else "FAIL"
    return Line(check, state, value, "" if state == "OK" else todo)


def examine(model: nn.Module, x: Tensor, y: Tensor, facts: Facts, randomised: bool) -> Iterator[Line]:
    """All checks of a model in eval mode on images `x` (b c h w in [0,1]) with labels `y`, each as soon as it is known.

    `randomised`: the user declares the model stochastic. Ends early where later checks make no sense.
    """
    try:
        with scope(seed("doctor", 0)), torch.no_grad():
            logits = model(x[:BATCH])
    except Exception as error:
        todo = f"the model must take images of shape {tuple(x[:BATCH].shape)}"
        yield Line("output shape", "FAIL", _message(error), todo)
        return
    shape, wanted = tuple(getattr(logits, "shape", ())), (min(BATCH, len(x)), facts.classes)
    value = str(shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    todo = f"{facts.name} has {facts.classes} classes: return one tensor of logits of shape {wanted}"
    yield _line("output shape", shape == wanted, value, todo)
    if shape != wanted:
        return
    with scope(seed("doctor", 0)):
        logits = all_logits(model, x)
    bad = int((~torch.isfinite(logits)).any(1).sum())
    todo = "NaN or infinity is never robustness: look for a division or a logarithm of zero, or damaged weights"
    yield _line("finite output", not bad, f"{bad} of {len(x)} images without finite logits", todo)
    if bad:
        return
    yield _mode(model)
    with scope(seed("doctor", 1)):
        gap, flips = _gap(logits, all_logits(model, x))
    yield _randomness(gap, flips, len(x), randomised)
    yield _batches(model, x, logits, noisy=gap > GAP or flips > 0)
    yield _probabilities(logits)
    yield _gradient(model, x, y, logits)
    yield from _accuracy(model, x, y, logits, facts)


def all_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all images, in batches, on the CPU in double precision."""
    with torch.no_grad():
        return torch.cat([model(part).detach().double().cpu() for part in x.split(BATCH)])


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _mode(model: nn.Module) -> Line:
    """Modules that are in train mode after eval(), and BatchNorm layers that have no running statistics to use."""
    modules = [(name.removeprefix("net.") or type(module).__name__, module) for name, module in model.named_modules()]
    training = [name for name, module in modules if module.training]
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [name for name, module in modules if isinstance(module, batch_norm) and module.running_mean is None]
    if training:
        value = f"{len(training)} modules in train mode after eval(), first {training[-1]}"
        return Line("eval mode", "FAIL", value, "let eval() reach every module, and call no train() in forward")
    value = (
        f"{len(norms)} BatchNorm layers without running statistics, first {norms[0]}" if norms else "eval everywhere"
    )
    return _line("eval mode", not norms, value, "they normalize an image by its batch: track_running_stats=True")


def _gap(a: Tensor, b: Tensor) -> tuple[float, int]:
    """Largest difference of two sets of logits as a share of the largest logit, inf for NaN; how many labels change."""
    scale = max(float(a.abs().max()), 1e-12)
    return float((a - b).abs().nan_to_num(float("inf")).max()) / scale, int((predicted(a) != predicted(b)).sum())


def _randomness(gap: float, flips: int, n: int, declared: bool) -> Line:
    value = f"two passes differ by {gap:.1e} of the largest logit, {flips} of {n} labels change"
    if gap > GAP or flips:
        todo = "switch dropout and noise off, or declare a stochastic model with --randomised"
        return _line("randomness", declared, value + (", as declared" if declared else ""), todo)
    return _line(
        "randomness", "WARN" if declared else "OK", value, "leave --randomised out: the model is deterministic"
    )


def _batches(model: nn.Module, x: Tensor, logits: Tensor, noisy: bool) -> Line:
    """Do the logits of an image depend on the other images of the batch?"""
    if noisy:
        return Line("batch", "WARN", "not measured, since two passes differ anyway")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(logits)
    shuffled[order] = all_logits(model, x[order.to(x.device)])
    try:
        with torch.no_grad():
            single = torch.cat([model(image).detach().double().cpu() for image in x[:ALONE].split(1)])
    except Exception as error:
        todo = "a model must classify a single image: use running statistics instead of those of the batch"
        return Line("batch", "FAIL", f"a batch of 1 raises {_message(error)}", todo)
    gaps = [_gap(logits, shuffled), _gap(logits[:ALONE], single)]
    gap, flips = max(g for g, _ in gaps), max(f for _, f in gaps)
    value = f"batches of 1 and shuffled ones of {BATCH} differ by {gap:.1e} of the largest logit, {flips} labels change"
    todo = "images must be classified independently: BatchNorm in eval mode, nothing computed over the batch"
    return _line("batch", gap <= 100 * GAP and not flips, value, todo)


def _probabilities(logits: Tensor) -> Line:
    name = last_function(logits)
    if name == "softmax":
        todo = "return the logits before softmax: probabilities hide the gradient from attacks"
        return Line("logits", "FAIL", "probabilities: rows are in [0,1] and sum to 1", todo)
    if name == "log_softmax":
        todo = "return the logits before log_softmax, as every other row does"
        return Line("logits", "WARN", "log-probabilities: their exponentials sum to 1", todo)
    return Line("logits", "OK", f"from {float(logits.min()):.3g} to {float(logits.max()):.3g}")


def _gradient(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> Line:
    """Does the loss have a gradient at the images? Without one, gradient attacks prove nothing."""
    todo = "gradient attacks have nothing to follow; let every operation be differentiable, no detach, no no_grad"
    images = x[:BATCH].clone().requires_grad_(True)
    try:
        with torch.enable_grad(), scope(seed("doctor", 0)):
            loss = F.cross_entropy(model(images), y[:BATCH], reduction="sum")
            (grad,) = torch.autograd.grad(loss, images)
    except RuntimeError as error:
        return Line("gradient", "FAIL", f"none: {' '.join(str(error).split())}", todo)
    correct = (predicted(logits[:BATCH]) == y[:BATCH].cpu()).to(grad.device)
    chosen = grad[correct] if bool(correct.any()) else grad
    share = float((chosen.flatten(1).abs().amax(1) == 0).double().mean())
    limits = CHECKS["C4"].limits
    state: State = "FAIL" if share > limits["U"] else "WARN" if share > limits["F"] else "OK"
    return _line("gradient", state, f"exactly zero at {share:.1%} of {len(chosen)} images", todo)


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, facts: Facts) -> Iterator[Line]:
    """Input range and normalization, class order, and accuracy under the best of them."""
    labels, best, meaning = y.cpu(), "x", ""
    guesses = {"x": predicted(logits)}
    share = {"x": _share(guesses["x"], labels)}
    for name, (images, explanation) in other_inputs(x, facts).items():
        with scope(seed("doctor", 0)):
            guesses[name] = predicted(all_logits(model, images))
        share[name] = _share(guesses[name], labels)
        if share[name] > share[best]:
            best, meaning = name, explanation
    value = "accuracy " + ", ".join(f"{each:.3f} at {name}" for name, each in share.items())
    known = 3 / facts.classes  # an untrained net has a best input too
    state = _better(guesses[best] == labels, guesses["x"] == labels) if share[best] > known else "OK"
    certain = state == "FAIL"
    todo = f"{best} is correct and x is not; {meaning}" if certain else f"{best} does better than x; perhaps {meaning}"
    yield _line("input", state, value, todo)
    guess = guesses["x" if state == "OK" else best]
    renamed = rename_classes(guess, labels, facts.classes)
    before, after = _share(guess, labels), _share(renamed, labels)
    value = f"accuracy {before:.3f}, {after:.3f} under the best renaming of classes"
    state = _better(renamed == labels, guess == labels) if after > known else "OK"
    todo = "the model numbers its classes in another order: reorder its outputs (alphabetical folders are a cause)"
    yield _line("class order", state, value, todo)
    low = before <= 1.5 / facts.classes and state == "OK"
    todo = "no better than chance under every input and class order tried: other weights, another task, or not trained"
    yield _line("accuracy", not low, f"{before:.3f} on {len(y)} images", todo)


def _share(guess: Tensor, labels: Tensor) -> float:
    return float((guess == labels).double().mean())


def _better(a: Tensor, b: Tensor) -> State:
    """Is `a` correct more often than `b` on the same images, beyond chance? OK if not."""
    gain, low, _ = paired_difference(a.tolist(), b.tolist())
    if low <= 0 or gain < GAIN_WARN:
        return "OK"
    return "FAIL" if gain > GAIN_FAIL else "WARN"


def other_inputs(x: Tensor, facts: Facts) -> dict[str, tuple[Tensor, str]]:
    """Inputs that a model may have been trained on, by formula, and what it means if one of them is correct."""
    if all(m == 0 for m in facts.mean) and all(s == 1 for s in facts.std):
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))  # bench does not normalize these images; others do
    else:
        mean, std = x.new_tensor(facts.mean), x.new_tensor(facts.std)
    mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
    text = "/".join(",".join(f"{v:.4g}" for v in part.flatten().tolist()) for part in (mean, std))
    fix = "do it inside the model or with --normalise {}"
    found = {
        "x * 255": (x * 255, "the model expects pixels from 0 to 255: " + fix.format("0/" + repr(1 / 255)[:12])),
        "2 x - 1": (2 * x - 1, "the model expects pixels from -1 to 1: " + fix.format("0.5/0.5")),
        "(x - mean) / std": ((x - mean) / std, "normalization is missing: " + fix.format(text)),
        "x * std + mean": (x * std + mean, "images are normalized twice: leave one out, such as by --normalise none"),
        "(x + 1) / 2": ((x + 1) / 2, "pixels are taken to [-1,1] twice: leave one out"),
        "1 - x": (1 - x, "the model expects inverted images"),
    }
    if facts.channels == 3:
        found["BGR"] = (x.flip(1), "the model expects its channels in the order blue, green, red")
    return found


def rename_classes(guess: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Predictions renamed by the best one-to-one map of classes, found on the other half of the images.

    Kuhn's Hungarian method on the confusion matrix; evaluated on other images, since n images always have a map. A
    prediction of -1 (NaN) is no class and keeps its name.
    """
    from scipy.optimize import linear_sum_assignment

    renamed, known = guess.clone(), guess >= 0
    halves = torch.arange(len(labels)) % 2 == 0
    for half, other in ((halves & known, ~halves & known), (~halves & known, halves & known)):
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        counts.index_put_((guess[half], labels[half]), torch.ones(int(half.sum()), dtype=torch.float64), True)
        rows, columns = linear_sum_assignment(counts + 1e-3 * torch.eye(classes), maximize=True)
        named = torch.empty(classes, dtype=torch.int64)
        named[torch.from_numpy(rows)] = torch.from_numpy(columns)
        renamed[other] = named[guess[other]]
    return renamed
