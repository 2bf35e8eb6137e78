"""Where noise enters a network: the image, or what chosen convolution and linear layers put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# `first` is the layer 0; a number counts the Conv2d and Linear layers in the order in which they run
Site = Literal["first", "input"] | int
Unit = Literal["absolute", "relative"]
Edit = Callable[[int, Tensor], Tensor]  # place in the list of sites, quantity there -> what goes on


def layer_number(site: Site) -> int | None:
    """Which layer of the running order a site is, None for the image."""
    return None if site == "input" else 0 if site == "first" else int(site)


def absent(net: nn.Module, site: Site, layers: int, post_bn: bool) -> ValueError:
    """The one line that a site which `net` (with so many convolution and linear layers) does not have deserves."""
    name, number = type(net).__name__, layer_number(site)
    if not layers:
        return ValueError(f"{name} has no Conv2d or Linear layer to put the noise after; use site=input")
    if number is not None and number >= layers:
        return ValueError(
            f"site {number}, but {name} runs {layers} convolution and linear layers; expected 0 to {layers - 1}"
        )
    if post_bn:
        return ValueError(f"no BatchNorm takes the output of layer {number} of {name}; use noise_at=pre_bn")
    return ValueError(f"the forward pass of {name} did not reach site {site}")


@contextmanager
def edit_sites(net: nn.Module, sites: Sequence[Site], edit: Edit, post_bn: bool = False) -> Iterator[None]:
    """While open, `edit(place, z)` replaces the quantity z at each of `sites` in every forward pass of `net`.

    Layers count by the order in which they run, whatever their names and places in the module tree; each call of the
    plain forward pass of `net` starts anew. With `post_bn` the quantity is the output of the BatchNorm that takes the
    layer's own. Raises ValueError on leaving where a site was never reached.
    """
    places = {layer_number(site): place for place, site in enumerate(sites)}
    reached, waiting, ran, most = set[int](), list[tuple[int, Tensor]](), 0, 0

    def replaced(place: int, z: Tensor) -> Tensor:
        reached.add(place)
        return edit(place, z)

    def start(module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal ran
        ran = 0
        waiting.clear()
        return (replaced(places[None], args[0]), *args[1:]) if None in places else None

    def layer(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        nonlocal ran, most
        place, ran = places.get(ran), ran + 1
        most = max(most, ran)
        if place is None:
            return None
        if post_bn:
            waiting.append((place, z))
            return None
        return replaced(place, z)

    def norm(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        own = [place for place, before in waiting if before is args[0]]
        return replaced(own[0], z) if own else None

    hooks: list[Any] = [net.register_forward_pre_hook(start)]
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(layer))
        elif post_bn and isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_hook(norm))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        waiting.clear()
    for place, site in enumerate(sites):
        if place not in reached:
            raise absent(net, site, most, post_bn)


def signal_scale(z: Tensor, unit: Unit) -> Tensor:
    """What a noise scale multiplies at `z` (b c ...): 1, or each channel's standard deviation over the batch and all
    positions, a constant in the gradient: weights that grow cannot outrun a noise relative to it."""
    if unit == "absolute":
        return z.new_ones(())
    axes = [0, *range(2, z.dim())]
    return z.detach().std(axes, keepdim=True, unbiased=False)


def first_weight(net: nn.Module) -> Tensor:
    """The weights (detached) of the first Conv2d or Linear in module order, for the log: a fixed noise at its output
    is escaped by growing them."""
    return next(m.weight.detach() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
