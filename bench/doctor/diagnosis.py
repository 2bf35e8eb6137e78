"""Faults in how a model is fed and read, on a few test images: input range, output, mode, class order.

Each check gives one Line. The checks ask whether the harness uses the model as its author does; whether its robustness
is real is asked by the soundness checks of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import predicted
from bench.core.rng import scope, seed
from bench.core.stats import paired_difference, wilson
from bench.data.datasets import Facts
from bench.planning.job_fields import Normalization
from bench.soundness.catalog import CHECKS, LAYER_RUNS
from bench.soundness.forward_checks import last_function
from bench.soundness.test_time_optimization import autograd_calls, layer_runs, repeats
from bench.terminal import counted

State = Literal["OK", "WARN", "FAIL"]
IMAGES = 200
BATCH = 64
ALONE = 32  # images that are also classified in a batch of one
GAP = CHECKS["C1"].limits["U"]  # of the largest logit, between two passes; another order of the same sums costs more
GAIN_WARN, GAIN_FAIL = 0.02, 0.05  # share of images by which another input or class order is better, beyond chance
LOSS_RATIO = 2.0  # cross-entropy at x over that at another input of about the same accuracy, above which it is a WARN
TEMPERED_RATIO = 1.05  # the same at the best temperature, at which nets that are only too unsure do not differ
FLAT = 0.1  # share of pixels without a gradient at 0 or 1 that have one inside
SURPLUS = 0.2  # of all images: those given a class beyond those labeled with it; one logit may have an offset
STANDARD = {  # mean and deviation that published nets use where bench leaves images in [0,1]
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}


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


def examine(
    model: nn.Module, x: Tensor, y: Tensor, facts: Facts, randomised: bool, applied: Normalization | None = None
) -> Iterator[Line]:
    """All checks of a model in eval mode on images `x` (b c h w in [0,1]) with labels `y`, each as soon as it is known.

    `randomised`: the user declares the model stochastic. `applied`: the normalization that bench puts before the model.
    Ends early where later checks make no sense.
    """
    try:
        with scope(seed("doctor", 0)), torch.no_grad(), autograd_calls() as derivatives:
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
    yield _test_time_optimization(model, x[:1], derivatives[0], randomised)
    with scope(seed("doctor", 1)):
        gap, flips = _gap(logits, all_logits(model, x))
    yield _randomness(gap, flips, len(x), randomised)
    yield _batches(model, x, logits, noisy=gap > GAP or flips > 0)
    yield _probabilities(logits)
    yield _gradient(model, x, y, logits)
    yield _predictions(predicted(logits), y.cpu(), facts.classes)
    yield from _accuracy(model, x, y, logits, facts, applied)


def _test_time_optimization(model: nn.Module, x: Tensor, derivatives: int, stochastic: bool) -> Line:
    """What check C6 measures: derivatives in a forward pass, and how often layers run for the one image `x`."""
    value = f"{derivatives} calls of automatic differentiation in one forward pass"
    todo = "an evaluation marks it UNSOUND: attacks do not reach what is optimized (bench explain C6)"
    with scope(seed("doctor", 0)), torch.no_grad(), layer_runs(model) as runs:
        with suppress(Exception):  # of a batch of one, which has a line of its own
            model(x)
    typical, _ = repeats(runs) or (0.0, 0)
    if typical > LAYER_RUNS and not stochastic:  # draws repeat layers too
        return Line("test-time optimization", "WARN", f"layers run {counted(typical, 'time')} for one image", todo)
    return _line("test-time optimization", "WARN" if derivatives else "OK", value, todo)


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
        value = f"{counted(len(training), 'module')} in train mode after eval(), first {training[-1]}"
        return Line("eval mode", "FAIL", value, "let eval() reach every module, and call no train() in forward")
    if any(isinstance(module, torch.jit.ScriptModule) for _, module in modules):
        todo = "give the model as Python code: checks C6 and C19 are not made on TorchScript (bench explain C6)"
        return Line("eval mode", "WARN", "TorchScript, which hides its layers", todo)
    count = counted(len(norms), "BatchNorm layer")
    value = f"{count} without running statistics, first {norms[0]}" if norms else "eval everywhere"
    return _line("eval mode", not norms, value, "they normalize an image by its batch: track_running_stats=True")


def _gap(a: Tensor, b: Tensor) -> tuple[float, int]:
    """Largest difference of two sets of logits as a share of the largest logit, inf for NaN; how many labels change."""
    scale = max(float(a.abs().max()), 1e-12)
    return float((a - b).abs().nan_to_num(float("inf")).max()) / scale, int((predicted(a) != predicted(b)).sum())


def _randomness(gap: float, flips: int, n: int, declared: bool) -> Line:
    value = f"two passes differ by {gap:.1e} of the largest logit, {flips} of {n} labels change"
    if gap > GAP or flips:
        todo = "switch dropout and noise off, or declare a stochastic model with --randomized"
        return _line("randomness", declared, value + (", as declared" if declared else ""), todo)
    return _line(
        "randomness", "WARN" if declared else "OK", value, "leave --randomized out: the model is deterministic"
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
    value = f"batches of 1 and shuffled ones of {BATCH} differ by {gap:.1e} of the largest logit"
    value += f", {counted(flips, 'changed label')}"
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
    if float(logits.min()) >= 0 and float(logits.max()) <= 1:
        todo = "if they are outputs of a sigmoid, return what it is given: where it saturates, attacks have no gradient"
        return Line("logits", "WARN", "all in [0,1], rows do not sum to 1", todo)
    return Line("logits", "OK", f"from {float(logits.min()):.3g} to {float(logits.max()):.3g}")


def _gradient(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> Line:
    """Does the loss have a gradient at the images? Without one, gradient attacks prove nothing."""
    todo = "gradient attacks have nothing to follow; let every operation be differentiable, no detach, no no_grad"

    def slope(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_(True)
        with torch.enable_grad(), scope(seed("doctor", 0)):
            loss = F.cross_entropy(model(images), y[:BATCH], reduction="sum")
            return torch.autograd.grad(loss, images)[0]

    try:
        grad, inside = slope(x[:BATCH]), slope(x[:BATCH].clamp(1 / 255, 254 / 255))
    except RuntimeError as error:
        return Line("gradient", "FAIL", f"none: {' '.join(str(error).split())}", todo)
    bad = int((~torch.isfinite(grad)).flatten(1).any(1).sum())
    if bad:
        todo = "attacks cannot follow NaN or infinity: look for a root, a norm or a logarithm at zero"
        return Line("gradient", "FAIL", f"not finite at {bad} of {len(grad)} images", todo)
    correct = (predicted(logits[:BATCH]) == y[:BATCH].cpu()).to(grad.device)
    chosen = grad[correct] if bool(correct.any()) else grad
    share = float((chosen.flatten(1).abs().amax(1) == 0).double().mean())
    limits = CHECKS["C4"].limits
    state: State = "FAIL" if share > limits["U"] else "WARN" if share > limits["F"] else "OK"
    value = f"exactly zero at {share:.1%} of {len(chosen)} images"
    flat = float(((grad == 0) & (inside != 0)).double().mean())
    if state == "OK" and flat > FLAT:
        state, value = (
            "WARN",
            f"exactly zero at {flat:.0%} of the pixels, which are 0 or 1, and not one gray level inside",
        )
        todo = "leave out the ReLU or clamp of the input, which stops attacks at black and white pixels"
    return _line("gradient", state, value, todo)


def _predictions(guess: Tensor, labels: Tensor, classes: int) -> Line:
    """Is one class predicted for far more images than are labeled with it?"""
    given, labeled = guess.bincount(minlength=classes), labels.bincount(minlength=classes)
    surplus, index = (given - labeled).max(0)
    value = (
        f"class {int(index)} is predicted for {given[index]} of {len(guess)} images and the label of {labeled[index]}"
    )
    todo = "look for an offset of this class's logit, or for another input or class order (lines below)"
    return _line("predictions", "WARN" if surplus >= SURPLUS * len(guess) else "OK", value, todo)


def _accuracy(
    model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, facts: Facts, applied: Normalization | None
) -> Iterator[Line]:
    """Input range and normalization, class order, and accuracy under the best of them."""
    labels, outputs, meanings = y.cpu(), {"x": logits}, {}
    for name, (images, meanings[name]) in other_inputs(x, facts, applied).items():
        with scope(seed("doctor", 0)):
            outputs[name] = all_logits(model, images)
    guesses = {name: predicted(each) for name, each in outputs.items()}
    share = {name: _share(guess, labels) for name, guess in guesses.items()}
    best = max(share, key=lambda name: share[name])
    value = "accuracy " + ", ".join(f"{each:.3f} at {name}" for name, each in share.items())
    state: State = "OK"
    renamed = rename_classes(guesses["x"], labels, facts.classes)
    # with two classes another order of them looks like inverted images
    if _knows(guesses[best], labels, facts.classes) and share[best] > _share(renamed, labels):
        state = _better(guesses[best] == labels, guesses["x"] == labels)
    todo = f"{best} is correct and x is not; " if state == "FAIL" else f"{best} does better than x; perhaps "
    lower = None
    if state == "OK" and _knows(guesses["x"], labels, facts.classes):
        lower = _lower_loss(outputs, share, labels)
    if lower is not None:
        state, best = "WARN", lower
        losses = [f"{float(F.cross_entropy(outputs[name], labels)):.3g} at {name}" for name in ("x", lower)]
        todo = f"cross-entropy is {' and '.join(losses)}; perhaps "
    yield _line("input", state, value, todo + meanings.get(best, ""))
    taken = "x" if state == "OK" else best
    guess, given = guesses[taken], "" if taken == "x" else f" given {taken}"
    renamed = rename_classes(guess, labels, facts.classes)
    before, after = _share(guess, labels), _share(renamed, labels)
    value = f"accuracy {before:.3f}, {after:.3f} under the best renaming of classes{given}"
    state = "OK"
    if _knows(renamed, labels, facts.classes):
        state = _better(renamed == labels, guess == labels)
    todo = "the model numbers its classes in another order: reorder its outputs (alphabetical folders are a cause)"
    yield _line("class order", state, value, todo)
    low = state == "OK" and wilson(int((guess == labels).sum()), len(y))[0] <= _chance(guess, labels, facts.classes)
    todo = "no better than chance under every input and class order tried: other weights, another task, or not trained"
    yield _line("accuracy", not low, f"{before:.3f} on {counted(len(y), 'image')}{given}", todo)


def _chance(guess: Tensor, labels: Tensor, classes: int) -> float:
    """Accuracy of the same predictions in random order, as in Cohen's kappa (1960); a prediction of -1 is no class.

    For a model that always predicts one class it is the share of that class.
    """
    shares = [each[each >= 0].bincount(minlength=classes).double() / len(each) for each in (guess, labels)]
    return float(shares[0] @ shares[1])


def _knows(guess: Tensor, labels: Tensor, classes: int) -> bool:
    """Is the accuracy far above chance? An untrained net has a best input and a best class order too."""
    chance = _chance(guess, labels, classes)
    known = min(3 * chance, chance + 2 / 9 * (1 - chance))  # 0.3 for 10 equal classes, 0.61 for 2
    return _share(guess, labels) > known and wilson(int((guess == labels).sum()), len(labels))[0] > chance


def _lower_loss(outputs: dict[str, Tensor], share: dict[str, float], labels: Tensor) -> str | None:
    """The input of lowest cross-entropy, if it is far below that of `x` at no less accuracy; None if there is none.

    An input of higher contrast lowers the loss of every net that is too unsure; so it must also be lower after each
    set of logits is divided by its best temperature (Guo et al. 2017).
    """

    def tempered(logits: Tensor) -> float:
        return min(float(F.cross_entropy(logits / t, labels)) for t in torch.logspace(-3, 4, 57))

    raw = {name: F.cross_entropy(logits, labels, reduction="none") for name, logits in outputs.items()}
    fair = [name for name in outputs if share[name] > share["x"] - GAIN_WARN and bool(raw[name].isfinite().all())]
    best = min(fair, key=lambda name: float(raw[name].mean()))
    gain = raw["x"] - raw[best]
    by_few_images = gain.mean() <= 3 * gain.std() / len(gain) ** 0.5
    if raw["x"].mean() <= LOSS_RATIO * raw[best].mean() or by_few_images:
        return None
    # where every image is correct, the best temperature takes both to zero
    lower = tempered(outputs["x"]) > TEMPERED_RATIO * tempered(outputs[best]) + 1e-3
    return best if lower else None


def _share(guess: Tensor, labels: Tensor) -> float:
    return float((guess == labels).double().mean())


def _better(a: Tensor, b: Tensor) -> State:
    """Is `a` correct more often than `b` on the same images, beyond chance? OK if not."""
    gain, low, _ = paired_difference(a.tolist(), b.tolist())
    if low <= 0 or gain < GAIN_WARN:
        return "OK"
    return "FAIL" if gain > GAIN_FAIL else "WARN"


def other_inputs(x: Tensor, facts: Facts, applied: Normalization | None = None) -> dict[str, tuple[Tensor, str]]:
    """Inputs that a model may have been trained on, by formula, and what it means if one of them is correct.

    The explanation of an input `x * scale + shift` ends with the option that gives it, after the normalization
    `applied` that bench puts before the model.
    """
    if facts.name in STANDARD:
        mean, std = map(x.new_tensor, STANDARD[facts.name])
    elif all(m == 0 for m in facts.mean) and all(s == 1 for s in facts.std):
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))  # bench does not normalize these images; others do
    else:
        mean, std = x.new_tensor(facts.mean), x.new_tensor(facts.std)
    one = torch.ones_like(mean)
    inside = "do it inside the model or with"
    affine = {
        "x * 255": (255 * one, 0 * one, f"the model expects pixels from 0 to 255: {inside}"),
        "x / 255": (one / 255, 0 * one, "the model is given pixels 255 times too bright: leave that out or use"),
        "2 x - 1": (2 * one, -one, f"the model expects pixels from -1 to 1: {inside}"),
        "(x - mean) / std": (1 / std, -mean / std, f"normalization is missing: {inside}"),
        "x * std + mean": (std, mean, "images are normalized twice: leave one out, such as by"),
        "(x + 1) / 2": (one / 2, one / 2, "pixels are taken to [-1,1] twice: leave one out, such as by"),
    }
    found = {}
    for name, (scale, shift, meaning) in affine.items():
        images = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        found[name] = (images, f"{meaning} --normalize {_option(scale, shift, applied)}")
    found["1 - x"] = (1 - x, "the model expects inverted images")
    if facts.channels == 3:
        found["BGR"] = (x.flip(1), "the model expects its channels in the order blue, green, red")
    return found


def _option(scale: Tensor, shift: Tensor, applied: Normalization | None) -> str:
    """The value of --normalize that gives a model what `x * scale + shift` gives after the normalization `applied`."""
    mean, std = torch.zeros_like(shift), torch.ones_like(scale)
    if applied is not None:
        mean, std = scale.new_tensor(applied.mean), scale.new_tensor(applied.std)
    mean, std = (mean - shift) / scale, std / scale
    if torch.allclose(mean, 0 * mean, atol=1e-5) and torch.allclose(std, torch.ones_like(std), rtol=1e-3):
        return "none"
    return "/".join(",".join(f"{v:.4g}" for v in part.tolist()) for part in (mean + 0.0, std))


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
