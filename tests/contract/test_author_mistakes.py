"""Mistakes that authors make: `bench check FILE` names each once, with file and line; `bench run` before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Bench, tiny
from paths import ROOT

from bench.commands.new import write

pytest.importorskip("torch")

RETURN = "        return {"
CLASS = "    uses_threat: ClassVar[bool] = False\n"
NOISY = "        noisy = batch.x + self.sigma * torch.randn_like(batch.x)\n"
# by mistake: the text that it replaces, the new text, a text on the line to be named, the message
DEFENSE: dict[str, tuple[str, str, str, str]] = {
    "tensor": (
        '{"ce": F.cross_entropy(net(noisy), batch.y, label_smoothing=batch.smoothing)}',
        "net(noisy).mean()",
        "return net",
        'loss must return a dict of named scalars such as {"ce": loss}, found a tensor of shape ()',
    ),
    "nothing": (RETURN, "        _ = {", "def loss", "loss must return a dict of named scalars such as"),
    "not a scalar": (
        "batch.y, label_smoothing=batch.smoothing",
        'batch.y, reduction="none"',
        "return {",
        "term 'ce' of the loss must be a scalar tensor, found a tensor of shape (12,)",
    ),
    "detached": (
        "net(noisy)",
        "net(noisy).detach()",
        "return {",
        "no term of the loss depends on the weights",
    ),
    "own init": (
        CLASS,
        CLASS + "\n    def __init__(self, threat, sigma=0.1):\n        self.sigma = sigma\n",
        "def __init__",
        "a plug-in is a dataclass without __init__; declare settings as fields",
    ),
    "module without super": (
        "    def loss(",
        "    def wrap(self, net):\n        return _Wrapped(net)\n\n    def loss(",
        "self.net = net",
        "AttributeError: cannot assign module before Module.__init__() call",
    ),
    "shape": (
        "batch.y, label",
        "batch.y[1:], label",
        "return {",
        "ValueError: Expected input batch_size (12) to match",
    ),
    "NaN": (
        NOISY,
        NOISY + "        noisy = (noisy - 2).log()\n",
        ".log()",
        "term 'ce' of the loss must be finite, found nan",
    ),
    "infinite": (
        "F.cross_entropy(net(noisy),",
        "1 / 0.0 ** net(noisy).abs().mean() * F.cross_entropy(net(noisy),",
        "return {",
        "term 'ce' of the loss must be finite, found inf",
    ),
    "in place": (
        "noisy = batch.x + self",
        "noisy = batch.x.add_(1).clamp_(0, 1)  + self",
        "noisy = ",
        "the step writes into the images or labels of its batch; let it work on a copy",
    ),
    "constant without a type": (CLASS, "    uses_threat = False\n", "uses_threat", "'uses_threat' has no type; write"),
    "constant as a setting": (
        "ClassVar[bool] = False",
        "bool = False",
        "uses_threat",
        "'uses_threat' is a constant, not a setting; write uses_threat: ClassVar[bool] = False",
    ),
    "misspelled constant": (
        "    uses_threat",
        "    use_threat",
        "use_threat",
        "no constant is named 'use_threat'. Did you mean 'uses_threat'?",
    ),
    "missing constant": (
        '    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")\n',
        "",
        "def loss",
        "label_smoothing must be in supports_recipe if and only if",
    ),
    "no decorator": ("@dataclass\n", "", "class Mine", "class Mine needs the decorator @dataclass"),
    "syntax": (NOISY, NOISY.replace(")\n", "\n"), "noisy = ", "'(' was never closed"),
    "import": (
        "import torch\n",
        "import torch\nimport no_such_module\n",
        "no_such",
        "ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "unknown name": (
        NOISY,
        NOISY.replace("torch.randn", "randn"),
        "noisy = ",
        "NameError: name 'randn_like' is not defined",
    ),
    "state that cannot be stored": (
        "    def loss(",
        '    def state_dict(self):\n        return {"seen": print}\n\n    def loss(',
        "def state_dict",
        "state_dict must hold tensors only, which a checkpoint can store, found builtin_function_or_method for 'seen'",
    ),
}
MODULE = """

class _Wrapped(nn.Module):
    def __init__(self, net):
        self.net = net
"""
PAIR = "return self.threat.project_to_image(x, x + delta), {}"
ATTACK: dict[str, tuple[str, str, str, str]] = {
    "images alone": (
        PAIR,
        PAIR.removesuffix(", {}"),
        "def perturb",
        "TypeError: perturb must return (images, columns), such as `return x_adv, {}`, found a tensor of shape (",
    ),
    "nothing": (
        PAIR,
        "pass",
        "def perturb",
        "TypeError: perturb must return (images, columns), such as `return x_adv, {}`, found None",
    ),
    "shape": (
        PAIR,
        PAIR.replace("x, x + delta)", "x, x + delta)[:1]"),
        "def perturb",
        "ValueError: perturb returned images of shape (1, 1, 8, 8) for (",
    ),
    "column": (
        PAIR,
        PAIR.replace("{}", '{"mine": delta.sum()}'),
        "def perturb",
        "ValueError: column 'mine' of perturb is a tensor of shape () for ",
    ),
    "outside the ball": (
        PAIR,
        "return x + 3 * delta, {}",
        "def perturb",
        "ValueError: adversarial images leave the pixel box [0,1]",
    ),
    "NaN": (PAIR, PAIR.replace("x + delta)", "x + delta / 0)"), "def perturb", "NotFiniteError: "),
}


def _write(kind: str, old: str, new: str, on_line: str) -> tuple[Path, str]:
    """A file that `bench new` writes, with the mistake in it, and the place to be named."""
    plugin, _ = write(kind, "mine", Path())
    text = plugin.read_text()
    assert text.count(old) == 1
    text = text.replace(old, new) + (MODULE if "_Wrapped" in new else "")
    plugin.write_text(text)
    (line,) = [k for k, words in enumerate(text.splitlines(), 1) if on_line in words][:1]
    return plugin, f"{plugin.parent}/mine.py:{line}: "


@pytest.mark.parametrize("name", DEFENSE)
def test_check_names_a_mistake_once_with_file_and_line(bench: Bench, name: str) -> None:
    _check(bench, "defense", *DEFENSE[name])


@pytest.mark.parametrize("name", ATTACK)
def test_check_names_a_mistake_of_an_attack(bench: Bench, name: str) -> None:
    _check(bench, "attack", *ATTACK[name])


def _check(bench: Bench, kind: str, old: str, new: str, line: str, message: str) -> None:
    plugin, place = _write(kind, old, new, line)
    checked = bench("check", plugin)
    if checked.code == 2:  # Python cannot read the file
        assert checked.err.startswith(f"error: {place}{message}")
        return
    assert checked.code == 1
    _, *found, step = checked.out.splitlines()
    assert found[0].strip().startswith(f"{place}{message}"), checked.out
    assert len(found) == 1, checked.out
    assert step == f"next: mend it, then bench check {plugin}"


# the others are covered by the check, as the same functions find them
@pytest.mark.parametrize("name", ["tensor", "shape", "NaN", "in place", "import", "state that cannot be stored"])
def test_run_names_a_mistake_before_it_trains(bench: Bench, name: str) -> None:
    old, new, line, message = DEFENSE[name]
    plugin, place = _write("defense", old, new, line)
    ran = bench(*tiny("--plugin", plugin, defense="mine", attack="clean"))
    assert ran.code == 2
    (error,) = ran.err.splitlines()
    assert f"{place}{message.replace('(12', '(2')}" in error, error
    assert not Path("results").exists()


def test_a_name_of_a_built_in_method_is_an_error_of_one_line(bench: Bench) -> None:
    plugin, _ = write("defense", "noisy", Path())
    checked = bench("check", plugin)
    (error,) = checked.err.splitlines()
    assert checked.code == 2
    assert error.endswith("defenses/noisy.py; rename the file")
    assert (
        bench("check", ROOT / "defenses" / "standard.py").out.splitlines()[-1] == "next: bench run --defense standard"
    )
