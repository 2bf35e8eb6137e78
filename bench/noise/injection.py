"""The site at which a defense injects noise into a network: the image, or the output of its first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from bench.core.stochastic import OwnNoise

InjectionSite = Literal["first", "input"]  # the output of the first Conv2d or Linear layer that runs, or the image
Site = InjectionSite | OwnNoise  # injected by a defense, or the net's own noise, whose draws are switched off here


def no_first_layer(net: nn.Module) -> ValueError:
    """The error for a net without a layer to inject noise after."""
    return ValueError(f"{type(net).__name__} has no Conv2d or Linear layer to inject the noise after; use site=input")


@contextmanager
def edit_site(net: nn.Module, site: InjectionSite, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `edit(z)` replaces the quantity z at `site` in every forward pass of `net`.

    The first layer is the first to run, wherever it stands in the module tree. Raises ValueError on exit where the site
    was never reached.
    """
    reached, in_pass = False, False  # ever; in the present forward pass

    def on_pass(module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal reached, in_pass
        in_pass = False
        if site != "input":
            return None
        reached = True
        return (edit(args[0]), *args[1:])

    def on_layer(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        nonlocal reached, in_pass
        if in_pass:
            return None
        reached = in_pass = True
        return edit(z)

    hooks: list[Any] = [net.register_forward_pre_hook(on_pass)]
    if site == "first":
        layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        hooks += [layer.register_forward_hook(on_layer) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not reached:
        raise no_first_layer(net)


def first_weight(net: nn.Module) -> Tensor:
    """The weights (detached) of the first Conv2d or Linear in module order, for the log: a network can escape fixed
    noise at that layer's output by growing them."""
    return next(m.weight.detach() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
