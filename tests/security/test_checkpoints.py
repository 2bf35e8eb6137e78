"""S1: no checkpoint of somebody else's runs code, fills the memory or ends in anything but one line."""

from __future__ import annotations

import ast
import collections
import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from harness import Bench, Outcome
from safetensors.torch import save_file

from bench.records.store import Store

TREE = Path(__file__).parents[2]
ARCH = ("--arch", "mlp", "--arch-set", "width=64", "--arch-set", "depth=1")
FAST = ("--attack", "clean", "--n", 20, "--checks", "off", "--device", "cpu")
BOMB = 64 << 20  # bytes that a small file unfolds to


class Evil:
    """Writes a file when a loader runs what it finds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


class FromBytes:
    """A function of a module whose classes weights-only loading allows, which itself loads without that limit."""

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        torch.save(Evil(), file)
        return torch.storage._load_from_bytes, (file.getvalue(),)  # type: ignore[attr-defined]


class Rebuilt:
    """A tensor whose pickle claims what its storage does not hold."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self) -> tuple[Any, ...]:
        place = _Storage()
        return torch._utils._rebuild_tensor_v2, (place, 0, self.size, self.stride, False, collections.OrderedDict())  # type: ignore[attr-defined]


class _Storage:
    """Stands for the 16 bytes of storage 0."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, _Storage) else None


def _rewritten(target: str, edit: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> None:
    """A .pt with one tensor of 16 bytes, its members edited and packed again."""
    torch.save({"a": torch.zeros(4)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as source, zipfile.ZipFile(target, "w", kind) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, edit(entry.filename, source.read(entry)))
    Path("plain.pt").unlink()


def _pickled(content: Any) -> Callable[[str, bytes], bytes]:
    file = io.BytesIO()
    _Pickler(file, 2).dump(content)
    return lambda name, old: file.getvalue() if name.endswith("data.pkl") else old


def _bomb() -> None:
    """Deflated zeros, in a file that says of itself what it unfolds to."""
    torch.save({"a": torch.zeros(BOMB // 4)}, "big.pt")
    with zipfile.ZipFile("big.pt") as source, zipfile.ZipFile("net.pt", "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    Path("big.pt").unlink()
    assert Path("net.pt").stat().st_size < BOMB // 500


def _safetensors(header: dict[str, Any] | bytes, body: bytes = bytes(32), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path("net.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def _tensor(first: int, last: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": [(last - first) // 4], "data_offsets": [first, last]}


def _tar() -> None:
    """The format before zip: a tar whose member `pickle` is unpickled."""
    with tarfile.open("net.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Evil(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _nested() -> None:
    torch.save(Evil(), "inner.pt")
    with zipfile.ZipFile("net.pt", "w") as outer:
        outer.write("inner.pt", "archive/data.pkl")
        outer.write("inner.pt", "inner.pt")
        outer.writestr("archive/version", "3\n")
    Path("inner.pt").unlink()


def _link() -> None:
    torch.save({"state_dict": Evil()}, "elsewhere.bin")
    Path("net.pt").symlink_to("elsewhere.bin")


def _changed(**other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**nets.weights(), **{name.replace("_", "."): value for name, value in other.items()}}


def _script() -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "net.pt")


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "reduce": (lambda: torch.save({"state_dict": Evil()}, "net.pt"), "not a weights-only checkpoint (holds getattr)"),
    "bare pickle": (lambda: Path("net.pt").write_bytes(pickle.dumps(Evil())), "not a weights-only checkpoint"),
    "nested zip": (_nested, "not a weights-only checkpoint"),
    "TorchScript": (_script, "not a weights-only checkpoint"),
    "legacy tar": (_tar, "not a weights-only checkpoint"),
    "allow-listed module": (lambda: torch.save(FromBytes(), "net.pt"), "holds torch.storage._load_from_bytes"),
    "oversize header": (lambda: _safetensors(b"{", length=1 << 62), "damaged safetensors file"),
    "overlapping tensors": (
        lambda: _safetensors({"a": _tensor(0, 32), "b": _tensor(16, 32)}),
        "damaged safetensors file",
    ),
    "beyond the end": (lambda: _safetensors({"a": _tensor(0, 1 << 40)}), "damaged safetensors file"),
    "unknown dtype": (lambda: _safetensors({"a": _tensor(0, 32, "OBJ")}), "damaged safetensors file"),
    "truncated": (
        lambda: (torch.save(nets.weights(), "net.pt"), os.truncate("net.pt", 5000)),
        "not a weights-only checkpoint",
    ),
    "bomb": (_bomb, "bytes that would unfold to"),
    "storage too small": (
        lambda: _rewritten("net.pt", _pickled({"a": Rebuilt((4000,), (1,))})),
        "not a weights-only checkpoint",
    ),
    "alias of one value": (
        lambda: _rewritten("net.pt", _pickled({"head.bias": Rebuilt((1 << 40,), (0,))})),
        "does not fit this architecture",
    ),
    "symlink": (_link, "not a weights-only checkpoint (holds getattr)"),
    "dangling symlink": (lambda: Path("net.pt").symlink_to("nowhere"), "no checkpoint net.pt"),
    "directory": (lambda: Path("net.pt").mkdir(), "is a folder; expected a file"),
    "fifo": (lambda: os.mkfifo("net.pt"), "no checkpoint net.pt"),
    "complex weights": (
        lambda: torch.save(_changed(head_bias=torch.zeros(10, dtype=torch.complex64)), "net.pt"),
        "has torch.complex64 at head.bias",
    ),
    "whole numbers as weights": (
        lambda: torch.save(_changed(head_bias=torch.zeros(10, dtype=torch.int64)), "net.pt"),
        "has torch.int64 at head.bias",
    ),
    "sparse weights": (
        lambda: torch.save(_changed(head_bias=torch.zeros(10).to_sparse()), "net.pt"),
        "holds a tensor at head.bias that is not an ordinary one",
    ),
    "no values": (
        lambda: torch.save(_changed(head_bias=torch.zeros(10, device="meta")), "net.pt"),
        "holds a tensor at head.bias that is not an ordinary one",
    ),
}


def evaluate(bench: Bench, *words: object) -> Outcome:
    return bench("eval", *words, *FAST)


def test_at_least_twelve_hostile_files() -> None:
    assert len(HOSTILE) >= 12


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_one_line_and_runs_nothing(name: str, bench: Bench) -> None:
    make, says = HOSTILE[name]
    make()
    (file,) = Path().glob("net.*")
    outcome = evaluate(bench, file, *ARCH)
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    assert not Path("pwned").exists()
    assert not Path("results").exists()


@pytest.mark.parametrize("name", ["reduce", "bare pickle", "allow-listed module", "symlink"])
def test_the_attacks_are_real(name: str, bench: Bench) -> None:
    HOSTILE[name][0]()
    with contextlib.suppress(RuntimeError):  # told after it was done
        torch.load("net.pt", weights_only=False)
    assert Path("pwned").exists()


def test_the_sum_of_a_checkpoint_is_recorded(bench: Bench) -> None:
    save_file(nets.weights(), "net.safetensors")
    assert evaluate(bench, "net.safetensors", *ARCH).code == 0
    (job,) = (job for job in Store(Path("results")).jobs().values() if job.kind == "import")
    assert job.checkpoint == hashlib.sha256(Path("net.safetensors").read_bytes()).hexdigest()


MODEL = """\
import os, signal
from pathlib import Path
from torch import nn
def build():
    Path("pid").write_text(str(os.getpid()))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def crash():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_foreign_model_is_tried_in_a_child(bench: Bench) -> None:
    Path("my.py").write_text(MODEL)
    assert evaluate(bench, "my.py:build", "--dry-run").code == 0
    assert int(Path("pid").read_text()) != os.getpid()
    crashed = evaluate(bench, "my.py:crash")
    assert crashed.code == 2
    assert crashed.err.startswith("error: the process that loaded it died (exit code ")
    assert crashed.err.count("\n") == 1
    assert not Path("results").exists()


def product() -> list[Path]:
    return [path for part in ("bench", "attacks", "defenses", "benchmarks") for path in (TREE / part).rglob("*.py")]


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


def unsafe_loads(tree: ast.Module) -> list[str]:
    """Calls that may unpickle without a limit, however torch is named."""
    aliases = {"torch": "torch"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = _dotted(node.func).partition(".")
        name = f"{aliases.get(head, head)}{'.' + rest if rest else ''}"
        limited = any(
            k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
            for k in node.keywords
        )
        if name in ("torch.load", "torch.serialization.load") and not limited:
            found.append(f"{node.lineno}: {name}")
        if name.startswith(("torch.hub.", "torch.jit.load", "torch.package.", "torch.storage._load")):
            found.append(f"{node.lineno}: {name}")
    return found


def test_every_load_is_weights_only() -> None:
    found = {str(path.relative_to(TREE)): unsafe_loads(ast.parse(path.read_text())) for path in product()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert sum("torch.load(" in path.read_text() for path in product()) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\ntorch.hub.load(a, b)",
        "from torch.jit import load as l\nl(f)",
    ],
)
def test_the_rule_finds_what_breaks_it(source: str) -> None:
    assert len(unsafe_loads(ast.parse(source))) == 1


def test_torch_is_new_enough_that_weights_only_holds() -> None:
    """CVE-2025-32434 was fixed in 2.6 and CVE-2026-24747 in 2.10."""
    (floor,) = (
        line.removeprefix("torch>=")
        for line in tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("torch>=")
    )
    assert tuple(map(int, floor.split("."))) >= (2, 10)
    assert tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 10)
