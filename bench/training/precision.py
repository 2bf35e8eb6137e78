"""`train.precision=auto`: whether training passes in bf16 are worth it on this device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import keep_buffers
from bench.core.precision import bf16_pays
from bench.core.rng import scope
from bench.training.optimizer import autocast_forward


def probe(net: nn.Module, x: Tensor, y: Tensor) -> str:
    """`bf16` if a forward and backward pass of a batch (`x` b c h w, labels `y`) is 1.5 times as fast in it, else
    `fp32`. Weights, gradients, buffers and random generators are left as they were."""
    weights = [p for p in net.parameters() if p.requires_grad]

    def train_pass(precision: str) -> None:
        with autocast_forward(net, precision):
            torch.autograd.grad(F.cross_entropy(net(x), y), weights, allow_unused=True)

    with keep_buffers(net), scope(0):
        return "bf16" if bf16_pays(train_pass, x.device) else "fp32"
