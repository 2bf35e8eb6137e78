"""Checks on two training steps of a defense on the toy network."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.contract.toy import CLASSES, Toy, copy, images, modes, same, threat
from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, total_loss
from bench.core.rng import scope
from bench.core.threat import Norm
from bench.terminal import counted
from bench.training.first_step import Recorder, check_first_step
from bench.training.optimizer import autocast_forward


class TrainingChecks:
    """Two training steps of one defense on the toy network, and the checks on them."""

    def __init__(self, cls: type[Defense]) -> None:
        self.cls = cls
        norm: Norm = getattr(cls, "norms", ("Linf",))[0]
        self.threat = threat(norm)
        x, y = images()
        self.steps = False  # true after a step that works
        self.batch = Batch(x, y, torch.arange(len(x)), epoch=1, progress=0.6)

    def fresh(self) -> tuple[Defense, nn.Module]:
        defense = self.cls(self.threat, **self.cls.test_settings)
        return defense, defense.wrap(Toy()).train()

    def trained(self) -> tuple[Defense, nn.Module, Recorder]:
        with scope(2):
            defense, net = self.fresh()
            recorder = Recorder(net)
            for _ in range(2):
                defense.step(net, recorder, self.batch)
        return defense, net, recorder

    def every_parameter_learns(self) -> str | None:
        check_first_step(self.fresh, self.batch)
        self.steps = True
        _, net, recorder = self.trained()
        idle = sorted({name for name, _ in net.named_parameters()} - recorder.moved)
        return f"no gradient reaches {', '.join(idle)}" if idle else None

    def flags_are_restored(self) -> str | None:
        with scope(2):
            defense, net = self.fresh()
            for module in net.modules():
                module.train(not isinstance(module, nn.BatchNorm2d))  # a frozen BatchNorm must stay frozen
            before = modes(net)
            defense.step(net, Recorder(net), self.batch)
        return None if modes(net) == before else "a module's training mode or a parameter's requires_grad changed"

    def inner_has_no_side_effects(self) -> str | None:
        with scope(2):
            defense, net = self.fresh()
            before = copy(net)
            defense.inner(net, self.batch)
        if any(parameter.grad is not None for parameter in net.parameters()):
            return "gradients remain on parameters"
        # in this mode, as published, each attack step moves the running statistics
        moving = {n for n, _ in net.named_buffers()} if getattr(defense, "attack_bn_mode", "") == "train" else set()
        after = net.state_dict()
        return same(*({n: v for n, v in state.items() if n not in moving} for state in (before, after)))

    def inner_is_feasible(self) -> str | None:
        defense, net, _ = self.trained()
        with scope(3):
            adv = defense.inner(net, self.batch)
        if self.cls.uses_threat and isinstance(adv, Tensor):
            if adv.requires_grad:
                return "the images that inner returns must be detached"
            self.threat.check(self.batch.x, adv)
        return None

    def is_reproducible(self) -> str | None:
        return same(self.trained()[1].state_dict(), self.trained()[1].state_dict())

    def deploys_as_declared(self) -> str | None:
        defense, net, _ = self.trained()
        model, x = defense.deploy(net.eval()), self.batch.x
        if not isinstance(model, Classifier):
            return f"deploy must return a Classifier, found {type(model).__name__}"
        kind = "smoothed" if model.smoothed else "randomised" if model.stochastic else "deterministic"
        if kind != self.cls.predictor:
            return f"predictor is {self.cls.predictor}, the deployed model is {kind}"
        with torch.no_grad(), scope(4):
            logits, labels, again = model(x), model.predict(x), model(x)
        if tuple(logits.shape) != (len(x), CLASSES) or labels.shape != (len(x),):
            return f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} for {counted(len(x), 'image')}"
        if model.stochastic == torch.equal(logits, again):
            return f"two passes {'agree' if model.stochastic else 'differ'}, but stochastic is {model.stochastic}"
        return None

    def supports_recipe(self) -> str | None:
        """Label smoothing must change the loss if and only if it is declared; declared 16-bit passes must train."""
        declared = self.cls.supports_recipe
        unknown = sorted(set(declared) - {"label_smoothing", "bf16", "fp16"})
        if unknown:
            return f"supports_recipe knows label_smoothing, bf16 and fp16, found '{unknown[0]}'"
        totals = [self._total(smoothing, "fp32") for smoothing in (0.0, 0.5)]
        if torch.equal(*totals) == ("label_smoothing" in declared):
            return "label_smoothing must be in supports_recipe if and only if the loss uses batch.smoothing"
        for name in ("bf16", "fp16"):
            if name in declared and not bool(torch.isfinite(self._total(0.0, name))):
                return f"the loss of {name} passes is not finite"
        return None

    def _total(self, smoothing: float, precision: str) -> Tensor:
        """The loss of one step."""
        with scope(2):
            defense, net = self.fresh()
            with autocast_forward(net, precision):
                terms = defense.step(net, Recorder(net), replace(self.batch, smoothing=smoothing))
        return total_loss(terms).detach()

    def state_is_restored(self) -> str | None:
        defense, _, _ = self.trained()
        state = {name: value.clone() for name, value in defense.state_dict().items()}
        fresh, _ = self.fresh()
        fresh.load_state_dict(state)
        return same(state, fresh.state_dict())

    def continues_from_state(self) -> str | None:
        """`state_dict` must hold all that a step depends on beside weights and random generators, for checkpoints."""
        defense, net, _ = self.trained()
        with scope(2):
            fresh, other = self.fresh()
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict({name: value.clone() for name, value in defense.state_dict().items()})
        found = []
        for one, its in ((defense, net), (fresh, other)):
            with scope(6):
                terms = one.step(its, Recorder(its), self.batch)
            logged = {**terms, **one.metrics(its)}
            values = {f"'{name}' of the next step": value.detach().nan_to_num(-7.0) for name, value in logged.items()}
            found.append({**copy(its), **values})
        failure = same(*found)
        return failure and f"{failure}; state_dict must hold what a step depends on"
