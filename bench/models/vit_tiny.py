"""Vision transformer of DeiT-Ti's size for small images: patches of 4x4, 12 pre-norm layers of 192 units and 3 heads.

Dosovitskiy et al. 2021 (arXiv:2010.11929); this size in Touvron et al. 2021 (DeiT, arXiv:2012.12877)

Differs from DeiT-Ti, which is for 224x224: patches of 4x4 instead of 16x16, so 64 of them at 32x32; no distillation
token, dropout or stochastic depth. Class token, learned positions, GELU, four times `dim` units in the perceptrons.
The shared recipe is Adam without warm-up or distillation: expect less than the paper.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.common import Inputs, Normalize, require

revision = 1


class Layer(nn.Module):
    """x + attention(LN(x)), then x + perceptron(LN(x)); tokens `b n d`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def attention(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt d) v for each head."""
        # not F.scaled_dot_product_attention: its fused kernels have no second derivative, which defenses need
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each b heads n d
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(3)
        return self.project((weights @ v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patch embedding, class token and positions, `depth` layers, LN, `head` on the class token."""

    def __init__(self, inputs: Inputs, depth: int, dim: int, heads: int, patch: int) -> None:
        super().__init__()
        self.normalise = Normalize(inputs)
        self.embed = nn.Conv2d(inputs.channels, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (inputs.size // patch) ** 2, dim))
        self.layers = nn.Sequential(*[Layer(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, inputs.classes)
        for table in (self.token, self.positions):
            nn.init.trunc_normal_(table, std=0.02)
        for linear in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.normalise(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand_as(x[:, :1]), x], 1) + self.positions
        return self.head(self.norm(self.layers(x)[:, 0]))


def build(inputs: Inputs, *, depth: int = 12, dim: int = 192, heads: int = 3, patch: int = 4) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below two patches or not a multiple of
    `patch`, for a `dim` that is not a multiple of `heads`, and for settings below 1."""
    require("vit_tiny", inputs, 2 * patch, depth=depth, dim=dim, heads=heads, patch=patch)
    if inputs.size % patch:
        raise ValueError(f"vit_tiny: patch is {patch}; expected a divisor of the image's side, {inputs.size}")
    if dim % heads:
        raise ValueError(f"vit_tiny: dim is {dim}; expected a multiple of heads, {heads}")
    return ViT(inputs, depth, dim, heads, patch)
