"""`bench new`: writes a plug-in and its test. Both work as written; the author then changes one function."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from bench.atomic import write_atomic
from bench.commands.arguments import command
from bench.planning import catalog

DEFENSE = '''"""min E[ CE(f(x'), y) ],  x' = x + sigma N(0, I)  (replace this line by your objective).

{name} (authors year, arXiv number).

What differs from the paper or its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import nn

from bench.core.defense import Batch, Defense, Losses


@dataclass
class {title}(Defense):
    """Training on Gaussian noise: a start to change."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "3F"
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    sigma: Annotated[float, Gt(0)] = 0.1
    """Standard deviation of the noise, in pixel units ([0,1])."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Cross-entropy at the noisy images; `adv` is what `inner` returns (here the clean images)."""
        noisy = batch.x + self.sigma * torch.randn_like(batch.x)
        return {{"ce": F.cross_entropy(net(noisy), batch.y, label_smoothing=batch.smoothing)}}
'''
ATTACK = '''"""x' = Pi(x + eps * sign(u)),  u ~ N(0, I)  (replace this line by your attack).

{name} (authors year, arXiv number).

What differs from the paper or its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context


@dataclass
class {title}(Attack):
    """One random step to the edge of the ball: a start to change."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Images inside ball and box; the base class checks and scores them."""
        delta = self.threat.radius * self.threat.steepest_direction(self.threat.sample(x))
        return self.threat.project_to_image(x, x + delta), {{}}
'''
TEST = '''"""{name}: its contract with the harness; add tests of its own claims (limits, a hand-computed value)."""

from pathlib import Path

import pytest

from bench import contract

FILE = Path(__file__).resolve().parents[2] / "{kind}s" / "{name}.py"


def test_{name}_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_PLUGINS", str(FILE))
    assert [result for result in contract.check("{kind}s", "{name}") if not result.ok] == []
'''


def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="Lower-case name; it becomes the file name.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Where (default: the checkout, or else here).")] = None,
) -> None:
    """Write a new defense or attack and its test. Both work unchanged; `bench check FILE` verifies it."""
    plugin, test = write(kind, name, folder)
    print(f"{plugin}\n{test}")
    method = "loss" if kind == "defense" else "perturb"
    print(f"next: write your own `{method}` into {plugin.name}, then {command('check', kind, plugin)}")


def write(kind: str, name: str, folder: Path | None) -> list[Path]:
    """Write plug-in and test; returns their paths. Raises ValueError or FileExistsError; nothing is overwritten."""
    if kind not in ("defense", "attack"):
        hint = catalog.suggest(kind, ["defense", "attack"])
        raise ValueError(f"cannot make a new '{kind}'; expected defense or attack.{hint}".removesuffix("."))
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ValueError(f"'{name}' is not a plug-in name; expected lower-case letters, digits and underscores")
    if re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", name):
        raise ValueError(f"'{name}' is a device on some systems, where no file can have it; choose another name")
    kinds: catalog.Kind = "defenses" if kind == "defense" else "attacks"
    # a method belongs in a checkout; an installed copy is not for the user's own files
    root = folder or (catalog.ROOT if (catalog.ROOT / "pyproject.toml").is_file() else Path())
    plugin = root / kinds / f"{name}.py"
    test = root / "tests" / kinds / f"test_{name}.py"
    for path in (plugin, test):
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    if keyword.iskeyword(title) or title in re.findall(r"\w+", DEFENSE + ATTACK):
        raise ValueError(
            f"'{name}' would make the class {title}, a word that the file itself uses; choose another name"
        )
    for path, text in ((plugin, DEFENSE if kind == "defense" else ATTACK), (test, TEST)):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.format(name=name, title=title, kind=kind).encode()
        write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return [plugin, test]
