"""Builds a user's model from a checkpoint or a model file, deploys it and measures its clean accuracy."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from bench import plugins
from bench.atomic import file_hash
from bench.core.classifier import Classifier
from bench.core.rng import scope, seed
from bench.data.datasets import Facts
from bench.data.images import Data, test_block, to_channels_last, to_float
from bench.jobs.isolated_model import IsolatedModel
from bench.jobs.load_checkpoint import OWN, State, fill, read, unprefixed
from bench.models.common import Inputs, Normalize
from bench.planning import catalog
from bench.planning.job import ImportJob
from bench.planning.job_fields import Normalization
from bench.planning.user_models import MODEL_FILE
from bench.plugins import line_of
from bench.records.record import TrainMetrics
from bench.training.cost import inference_ms


def build(job: ImportJob, facts: Facts, state: State | None = None) -> nn.Module:
    """The net of an import job before its weights. `state`: a checkpoint, whose own normalization is used.

    Raises ValueError in one line.
    """
    typed = job.normalization
    drawn = seed(job.seed, "init", job.model.name)
    with scope(drawn):
        if job.model.sha256 is not None:
            net = _from_file(job.model.name, job.model.sha256, drawn)
            return net if typed is None else nn.Sequential(Normalize(_inputs(facts, typed)), net)
        held = _held(state or {}, facts)
        if typed is not None and held is not None and not _agree(typed, held):
            raise ValueError(f"the checkpoint holds its own normalization ({_described(held)}); leave --normalize out")
        inputs = _inputs(facts, typed or held)
        return plugins.build_model(job.model.name, job.model.settings, inputs)


def _inputs(facts: Facts, chosen: Normalization | None) -> Inputs:
    mean, std = (facts.mean, facts.std) if chosen is None else (chosen.mean, chosen.std)
    return Inputs(facts.channels, facts.size, facts.classes, mean, std)


def _held(state: State, facts: Facts) -> Normalization | None:
    """The normalization in a checkpoint of our own architectures."""
    found = unprefixed(state, set(OWN))
    if not all(name in found and found[name].numel() == facts.channels for name in OWN):
        return None
    own = {name.rpartition(".")[2]: tuple(found[name].double().flatten().tolist()) for name in OWN}
    return Normalization(own["mean"], own["std"])


def _agree(a: Normalization, b: Normalization) -> bool:
    return all(abs(x - y) < 1e-5 for x, y in zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True))


def _described(chosen: Normalization) -> str:
    parts = {"mean": chosen.mean, "std": chosen.std}
    return ", ".join(f"{name} {', '.join(f'{v:g}' for v in values)}" for name, values in parts.items())


def _from_file(named: str, sha256: str, drawn: int) -> nn.Module:
    """The net that the user's function returns, called with the seed `drawn`. The file runs as the user's own code,
    with its folder importable."""
    path = Path(os.environ.get(MODEL_FILE, ""))
    file, _, function = named.rpartition(":")
    if path.name != file or not path.is_file():
        raise ValueError(f"the model file {file} is not here; run the same `bench eval` again, or set {MODEL_FILE}")
    if file_hash(path) != sha256:
        raise ValueError(f"the model file {file} was changed since this job was planned; run `bench eval` again")
    try:
        module = _module(path, sha256)
        if not callable(getattr(module, function, None)):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            hint = catalog.suggest(function, known)
            raise LookupError(f"no function '{function}'.{hint} Known: {', '.join(known) or 'none'}")
        with scope(drawn):  # once more: the file may have drawn as it was imported, which it is once
            net = getattr(module, function)()
        if not isinstance(net, nn.Module):
            raise TypeError(f"{function}() gave {type(net).__name__}; expected a torch.nn.Module")
    except SystemExit as error:
        raise ValueError(
            f"{file} ends the program (sys.exit, or argparse, which finds no arguments here) when it is imported or "
            f'its function called; put that under `if __name__ == "__main__":`'
        ) from error
    except Exception as error:
        text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        text = error.msg if isinstance(error, SyntaxError) else text
        where = line_of(error).rpartition("/")[2] or file
        raise ValueError(f"{where}: {type(error).__name__}: {' '.join(text.split())}") from error
    if "torch._dynamo" in sys.modules:  # a net that torch.compile made runs as it was written, where audits see layers
        torch.compiler.set_stance("force_eager")
    return net


def _module(path: Path, sha256: str) -> ModuleType:
    name = f"bench_model_{sha256[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        words, sys.argv = sys.argv, [str(path)]  # a file that parses its arguments would read those of bench
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.argv = words
    return sys.modules[name]


def checkpoint(job: ImportJob, source: Path | None, name: str) -> tuple[State | None, str]:
    """The tensors of the checkpoint `source` and which of several sets of weights they are; None and "" without one.

    `name`: its name in errors. Raises ValueError in one line.
    """
    if source is None:
        return None, ""
    if file_hash(source) != job.checkpoint:
        expected = (job.checkpoint or "none")[:12]
        raise ValueError(f"{name} is not the checkpoint {expected} of this job; run the same `bench eval` again")
    return read(source)


def loaded(job: ImportJob, facts: Facts, state: State | None, name: str) -> nn.Module:
    """The net with the weights of a checkpoint, if it has one. Raises ValueError in one line."""
    net = build(job, facts, state)
    wrapped = job.model.sha256 is not None and job.normalization is not None
    if state is not None:
        fill(net[1] if wrapped and isinstance(net, nn.Sequential) else net, state, facts, name)
    return net


def deployed(job: ImportJob, net: nn.Module, device: torch.device) -> IsolatedModel:
    """The net in eval mode on the device, as attacks see it; `randomised` is what the user declared."""
    try:
        return IsolatedModel(net.to(device), job.randomized).eval()
    except (RuntimeError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{job.model.name} cannot be put in eval mode ({why}); give the model as Python code"
        ) from None


def reloaded(job: ImportJob, state: State, data: Data) -> Classifier:
    """The model of a finished import from the weights that it stored."""
    net = build(job, data.facts, state)
    net.load_state_dict(state, strict=True)
    return deployed(job, net, data.test.x.device)


def check(job: ImportJob, facts: Facts, source: Path | None) -> str:
    """Load on the CPU and try two blank images. Returns what `notes` does. Raises ValueError in one line."""
    name = source.name if source else job.model.name
    state, which = checkpoint(job, source, name)
    model = deployed(job, loaded(job, facts, state, name), torch.device("cpu"))
    x = torch.zeros(2, facts.channels, facts.size, facts.size)
    try:
        with scope(0), torch.no_grad():
            logits = model(x)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name} cannot take {facts.name} images: {type(error).__name__}: {text}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, facts.classes):
        raise ValueError(
            f"{name} gives {shape} for 2 images of {facts.name}; expected logits of shape {(2, facts.classes)}"
        )
    stochastic = _differ(model, model, facts, seeds=(2, 3))
    if stochastic and not job.randomized:
        raise ValueError(
            f"{name} gives two answers to one image; declare a stochastic model with --randomized, or "
            "switch its noise or dropout off"
        )
    if reason := not_repeatable(job, facts, state, model, name):
        raise ValueError(reason)
    if job.randomized and not stochastic:
        raise ValueError(
            f"{name} gives the same answer to an image twice: it draws no noise, or sets a seed in forward; "
            "leave --randomized out, or let it draw"
        )
    return notes(model, facts, which)


def not_repeatable(job: ImportJob, facts: Facts, state: State | None, model: IsolatedModel, name: str) -> str:
    """Why the workers could not build this model (on the CPU) again; empty where they can."""
    odd = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        return f"{name} keeps something other than a tensor in its state ({odd[0]}); it cannot be stored"
    if job.model.sha256 is None or _differ(model, model, facts, seeds=(2, 3)):  # of bench, or stochastic
        return ""
    again = deployed(job, loaded(job, facts, state, name), torch.device("cpu"))
    if _differ(model, again, facts, seeds=(2, 2)):
        return f"{name} is another model each time it is built; let it set a seed, or keep its draws in its weights"
    return ""


def notes(model: IsolatedModel, facts: Facts, which: str) -> str:
    """The normalization in words, `which` of several sets of weights were taken, and whether its input is changed."""
    found = [chosen(model), which]
    if model.writes_into(_random_images(facts)):
        found.append("the model writes into its input, of which it gets a copy")
    return "; ".join(note for note in found if note)


def _random_images(facts: Facts) -> Tensor:
    """Eight images of uniform noise."""
    with scope(1):
        return torch.rand(8, facts.channels, facts.size, facts.size)


def _differ(one: nn.Module, other: nn.Module, facts: Facts, seeds: tuple[int, int]) -> bool:
    """Do the logits of two models, each computed with its seed, differ by more than rounding?"""
    logits = []
    for model, value in zip((one, other), seeds, strict=True):
        with scope(value), torch.no_grad():
            logits.append(model(_random_images(facts)))
    return float((logits[0] - logits[1]).abs().max()) > 1e-3 * float(logits[0].abs().max())


def chosen(model: nn.Module) -> str:
    """The normalization that bench put into a model, in words."""
    inside = [module for module in model.modules() if isinstance(module, Normalize)]
    if not inside:
        return "normalization whatever the model itself does (--normalize puts one before it)"
    means = Normalization(tuple(inside[0].mean.flatten().tolist()), tuple(inside[0].std.flatten().tolist()))
    return "normalization none, images stay in [0,1]" if inside[0].identity else f"normalization {_described(means)}"


def measure(job: ImportJob, data: Data, source: Path | None) -> tuple[nn.Module, TrainMetrics]:
    """The loaded net and its metrics: clean accuracy on the test images of `data`, size, time per prediction."""
    state, _ = checkpoint(job, source, "the checkpoint")
    net = loaded(job, data.facts, state, "the checkpoint")
    model = deployed(job, net, data.test.x.device)
    right, n = 0, len(data.test.x)
    with torch.no_grad(), scope(seed(job.seed, "clean")):
        for start in range(0, n, 100):
            x, y = test_block(data, start, min(start + 100, n))
            logits = model(to_channels_last(x))
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(f"the model's output is not finite on images {start} to {start + len(x) - 1}")
            right += int((logits.argmax(1) == y).sum())
    return net, TrainMetrics(
        clean_accuracy=right / n,
        clean_n=n,
        parameters=sum(p.numel() for p in net.parameters()),
        inference_ms_per_image=inference_ms(model, to_channels_last(to_float(data.test.x[:64]))),
        predictor="randomised" if job.randomized else "deterministic",
        test_hash=data.test_hash,
    )
