"""Adversarial training as it is commonly written, one class per method: the reference of `p1_train`.

Written from the papers' formulas with the loop structure of the released scripts (clean logits recomputed at every
attack step, `.backward()` to get the gradient of one tensor, a copy of the net for each perturbation of weights). Each
has `step(x, y)`, one update on a batch, which returns the loss (a tensor) and the adversarial images.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sgd(net: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def divergence(moved: Tensor, clean: Tensor) -> Tensor:
    """Mean KL(p(x) || p(x')) of logits."""
    return F.kl_div(F.log_softmax(moved, 1), F.softmax(clean, 1), reduction="batchmean")


class PGDAT:
    """torchattacks.PGD, then cross-entropy on what it gives."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, eps: float, alpha: float) -> None:
        import torchattacks

        self.net, self.optimizer = net, optimizer
        self.attack = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=10)
        # BatchNorm as in training; without this the library attacks in eval mode
        self.attack.set_model_training_mode(model_training=True, batchnorm_training=True)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = self.attack(x, y)
        self.net.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x_adv), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), x_adv


class TRADES:
    """39F: three passes an attack step, and the clean logits twice in the loss."""

    beta = 6.0

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, eps: float, alpha: float) -> None:
        self.net, self.optimizer, self.eps, self.alpha = net, optimizer, eps, alpha

    def attack(self, net: nn.Module, x: Tensor) -> Tensor:
        net.eval()
        x_adv = x.detach() + 0.001 * torch.randn_like(x)
        for _ in range(10):
            x_adv.requires_grad_()
            loss = F.kl_div(F.log_softmax(net(x_adv), 1), F.softmax(net(x), 1), reduction="sum")
            grad = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + self.alpha * torch.sign(grad)
            x_adv = torch.min(torch.max(x_adv, x - self.eps), x + self.eps)
            x_adv = torch.clamp(x_adv, 0.0, 1.0)
        net.train()
        return x_adv.detach()

    def loss(self, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y) + self.beta * divergence(net(x_adv), net(x))

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = self.attack(self.net, x)
        self.optimizer.zero_grad()
        loss = self.loss(self.net, x, x_adv, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), x_adv


class TRADESAWP(TRADES):
    """48F: TRADES, its loss once more on a proxy net whose change of weights gives the perturbation."""

    gamma = 5e-3

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, eps: float, alpha: float) -> None:
        super().__init__(net, optimizer, eps, alpha)
        self.proxy = copy.deepcopy(net)
        self.climb = torch.optim.SGD(self.proxy.parameters(), lr=0.1)

    def perturbation(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.proxy.load_state_dict(self.net.state_dict())
        self.proxy.train()
        self.climb.zero_grad()
        (-self.loss(self.proxy, x, x_adv, y)).backward()
        self.climb.step()
        found, moved = {}, dict(self.proxy.named_parameters())
        for name, weight in self.net.named_parameters():
            if weight.dim() > 1 and "weight" in name:
                change = moved[name].detach() - weight.detach()
                found[name] = weight.detach().norm() / (change.norm() + 1e-20) * change
        return found

    def shift(self, by: dict[str, Tensor], sign: float) -> None:
        with torch.no_grad():
            for name, weight in self.net.named_parameters():
                if name in by:
                    weight.add_(sign * self.gamma * by[name])

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = self.attack(self.net, x)
        perturbation = self.perturbation(x, x_adv, y)
        self.shift(perturbation, 1)
        self.optimizer.zero_grad()
        loss = self.loss(self.net, x, x_adv, y)
        loss.backward()
        self.optimizer.step()
        self.shift(perturbation, -1)
        return loss.detach(), x_adv


class ATAWP(TRADESAWP):
    """36F: the attack by `.backward()`, which makes the gradients of all weights too, at every step."""

    gamma = 1e-2

    def attack(self, net: nn.Module, x: Tensor) -> Tensor:
        net.train()
        delta = torch.zeros_like(x).uniform_(-self.eps, self.eps)
        delta.data = torch.clamp(x + delta, 0, 1) - x
        delta.requires_grad_()
        for _ in range(10):
            F.cross_entropy(net(x + delta), self.y).backward()
            moved = torch.clamp(delta + self.alpha * torch.sign(delta.grad), -self.eps, self.eps)
            delta.data = (torch.clamp(x + moved, 0, 1) - x).detach()
            delta.grad.zero_()
        return (x + delta).detach()

    def loss(self, net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x_adv), y)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.y = y
        return super().step(x, y)


class RATRelease(TRADES):
    """56F: TRADES' attack on a noisy copy, two backward passes to read one gradient, eight passes in train mode.

    The formulas of defenses/rat_release.py: soft labels from the gaps between the last layer's gradients.
    """

    alpha_soft, cc, noise = 0.2, 0.8, 1e-4

    def row_sums(self, loss: Tensor) -> Tensor:
        """The last layer's gradient summed over its inputs, by a backward pass through all of the net."""
        self.optimizer.zero_grad()
        loss.backward(retain_graph=True)
        return self.net.head.weight.grad.detach().sum(1)

    def labels(self, gap: Tensor, y: Tensor) -> Tensor:
        share = gap - gap.min()
        share = share / share.sum()
        k = len(gap)
        matrix = torch.zeros(k, k, device=gap.device)
        for c in range(k):
            others = [j for j in range(k) if j != c]
            matrix[c, others] = self.cc * share[others] / share[others].sum()
            matrix[c, c] = 1 - self.cc
        return matrix[y]

    def soft(self, q: Tensor, logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), q, reduction="batchmean")

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        net, noisy = self.net, copy.deepcopy(self.net)
        with torch.no_grad():
            for module in noisy.modules():
                if isinstance(module, nn.Conv2d):
                    for parameter in module.parameters():
                        parameter.add_(self.noise * torch.randn_like(parameter))
        x_adv = self.attack(noisy, x)
        net.train()
        natural, robust = F.cross_entropy(net(x), y), F.cross_entropy(net(x_adv), y)
        clean, moved = self.row_sums(natural), self.row_sums(robust)
        first, second = clean.abs() - moved.abs(), moved**2 - clean**2
        one = 0.5 * (self.soft(self.labels(first, y), net(x_adv)) + self.soft(self.labels(-first, y), net(x)))
        two = 0.5 * (self.soft(self.labels(second, y), net(x_adv)) + self.soft(self.labels(second, y), net(x)))
        loss = (1 - self.alpha_soft) * natural + self.alpha_soft * (one + 0.5 * two)
        loss = loss + self.beta * divergence(net(x_adv), net(x))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), x_adv
