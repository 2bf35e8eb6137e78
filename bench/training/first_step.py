"""One step of a defense before it is trained or checked in full: the mistakes that its author makes most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses, total_loss
from bench.core.rng import scope
from bench.planning.plugin_source import MistakeError, place_of
from bench.plugins import line_after, line_of

LEARNING_RATE = 1e-3  # losses on moments diverge at the usual 0.05


class Recorder:
    """An Updater by SGD that records the names of the parameters with a nonzero gradient."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
        self.moved: set[str] = set()
        self.terms: Losses = {}

    def descend(self, terms: Losses) -> None:
        self.optimizer.zero_grad()
        total_loss(terms).backward()
        self.moved |= {n for n, p in self.net.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        self.terms = terms
        self.optimizer.step()


def check_first_step(build: Callable[[], tuple[Defense, nn.Module]], batch: Batch) -> None:
    """Take one training step. Raises MistakeError if it fails, has a loss that is not finite, writes into the batch, or
    leaves a state that cannot be stored. `build`: the defense and its wrapped net, new each time."""
    images, labels = batch.x.clone(), batch.y.clone()

    def step() -> tuple[dict[str, Tensor], Recorder]:
        batch.x.copy_(images)
        batch.y.copy_(labels)
        with scope(2), torch.enable_grad():
            defense, net = build()
            recorder = Recorder(net)
            returned = defense.step(net, recorder, batch)
            total_loss(returned)
            return defense.state_dict(), recorder

    def fail(text: str, method: str = "loss", fault: Callable[[FrameType, Any], bool] | None = None) -> MistakeError:
        code = getattr(type(build()[0]), method).__code__
        place = (fault and line_after(fault, step)) or place_of(Path(code.co_filename), code.co_firstlineno)
        return MistakeError(f"{place}: {text}")

    def written(frame: FrameType | None = None, returned: Any = None) -> bool:
        return not (torch.equal(batch.x, images) and torch.equal(batch.y, labels))

    try:
        state, recorder = step()
    except Exception as error:  # a plug-in under test may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        if line := line_of(error):
            raise MistakeError(f"{line}: {type(error).__name__}: {text}") from error
        raise fail(text, fault=_returns_no_loss) from error
    for name, value in recorder.terms.items():
        if not bool(torch.isfinite(value)):
            raise fail(f"term '{name}' of the loss must be finite, found {value.item()}", fault=_not_finite)
    if written():
        raise fail("the step writes into the images or labels of its batch; let it work on a copy", fault=written)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            found = type(value).__name__
            raise fail(
                f"state_dict must hold tensors only, which a checkpoint can store, found {found} for '{name}'",
                "state_dict",
            )


def _returns_no_loss(frame: FrameType, returned: Any) -> bool:
    """Does a function `loss` or `step` return here what `total_loss` refuses?"""
    if returned is None or frame.f_code.co_name not in ("loss", "step"):
        return False
    try:
        total_loss(returned)
    except Exception:
        return True
    return False


def _not_finite(frame: FrameType, returned: Any) -> bool:
    """Does a variable of the function, or what it returns, hold NaN, or a scalar that is infinite?"""
    terms = list(returned.values()) if isinstance(returned, dict) else [returned]
    tensors = [value for value in (*frame.f_locals.values(), *terms) if isinstance(value, Tensor)]
    return any(bool(value.isnan().any()) or (value.dim() == 0 and bool(value.isinf())) for value in tensors)
