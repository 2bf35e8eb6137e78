"""Cost of a training step and of a prediction: passes, work in units of one forward pass F, milliseconds."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.core.classifier import Classifier, keep_buffers
from bench.core.defense import Batch, Defense, Losses, Updater
from bench.core.rng import restored


def inference_ms(model: Classifier, x: Tensor, repeats: int = 5) -> float:
    """Milliseconds per image of the deployed prediction (with all its draws) on `x` (b c h w), best of `repeats`."""
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            synchronize(x.device)
            started = time.perf_counter()
            model.predict(x)
            synchronize(x.device)
            times.append(time.perf_counter() - started)
    return min(times) * 1000 / len(x)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Flops(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products.

    torch's FlopCounterMode also counts per module, with hooks that fail on autograd.grad at a leaf (every attack step).
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add its cost from torch's registry."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def profile_step(defense: Defense, net: nn.Module, updater: Updater, batch: Batch) -> tuple[Losses, dict[str, float]]:
    """One training step and its cost: passes through the network, and work in units of one forward pass F.

    The work includes every convolution and matrix product, also of methods that bypass the network's forward.
    """
    counts = {"forwards": 0, "backwards": 0}

    def backward(grad: Tensor) -> None:
        counts["backwards"] += len(batch.x)

    def forward(module: nn.Module, args: Any, logits: Any) -> None:
        counts["forwards"] += len(args[0])
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(backward)

    handle = net.register_forward_hook(forward)
    with _Flops() as step:
        terms = defense.step(net, updater, batch)
    handle.remove()
    with _Flops() as single, torch.no_grad(), keep_buffers(net), restored():  # training goes on as if never measured
        net(batch.x)
    n = len(batch.x)
    return terms, {
        "forwards_per_image": counts["forwards"] / n,
        "backwards_per_image": counts["backwards"] / n,
        "work_per_image_f": step.total / max(single.total, 1),
    }
