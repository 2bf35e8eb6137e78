"""The sites at which noise enters a network: the image, the output of the first layer, or the net's own noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn

from bench.core.stochastic import OwnNoise

InjectionSite = Literal["first", "input"]  # the output of the first Conv2d or Linear layer that runs, or the image
Site = InjectionSite | OwnNoise  # injected by a defense, or the net's own noise, whose draws are switched off here


def on_weight(site: Site) -> TypeGuard[OwnNoise]:
    """True for noise on the weights of a layer."""
    return isinstance(site, OwnNoise) and site.kind == "weight"


def no_first_layer(net: nn.Module) -> ValueError:
    """The error for a net without a layer to inject noise after."""
    return ValueError(f"{type(net).__name__} has no Conv2d or Linear layer to inject the noise after; use site=input")


@contextmanager
def edit_site(net: nn.Module, site: Site, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `edit(z)` replaces the quantity z at `site` in every forward pass of `net`.

    The first layer is the first to run, whatever its position in the module tree. For noise on weights z is the output
    of the layer. Raises ValueError on exit if no pass reached the site.
    """
    reached, in_pass = False, False  # ever; in the present forward pass
    layers: list[nn.Module] = []
    if isinstance(site, OwnNoise):
        layers = [site.layer if on_weight(site) else site.source]
    elif site == "first":
        layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

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
        # a disabled source returns its very input, which a skip connection may use as well
        return edit(z.clone() if isinstance(site, OwnNoise) and module is site.source else z)

    with ExitStack() as hooks:
        hooks.enter_context(net.register_forward_pre_hook(on_pass))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(on_layer))
        yield
    if not reached:
        raise no_first_layer(net)


def first_weight(net: nn.Module) -> Tensor:
    """The weights (detached) of the first Conv2d or Linear in module order, for the log: a network can escape fixed
    noise at that layer's output by growing them."""
    return next(m.weight.detach() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
