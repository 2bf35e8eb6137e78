"""S2: nothing of ours writes or reads a pickle; of others' data, only files whose SHA-256 is known are unpickled."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import pickle
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bench.data import checksums, datasets, vision

TREE = Path(__file__).parents[2]
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "joblib",
    "cloudpickle",
    "shelve",
    "marshal",
    "jsonpickle",
    "pickletools",
}
CALLS = ("read_pickle", "to_pickle", "torch.save", "numpy.savez_pickle")


def product() -> list[Path]:
    return [path for part in ("bench", "attacks", "defenses") for path in sorted((TREE / part).rglob("*.py"))]


def pickling(tree: ast.Module) -> list[str]:
    """Imports and calls by which something is pickled or unpickled."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value for word in node.keywords}
        allowed = given.get("allow_pickle")
        if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            found.append(f"{node.lineno}: allow_pickle in {name}")
        if name in ("np.load", "numpy.load") and allowed is None:
            found.append(f"{node.lineno}: {name} without allow_pickle=False")
        if name.endswith(CALLS):
            found.append(f"{node.lineno}: {name}")
        if name in ("__import__", "importlib.import_module") and node.args and isinstance(node.args[0], ast.Constant):
            found += [f"{node.lineno}: {name}"] if node.args[0].value in MODULES else []
    return found


def test_no_file_of_the_product_pickles() -> None:
    found = {str(path.relative_to(TREE)): pickling(ast.parse(path.read_text(encoding="utf-8"))) for path in product()}
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import joblib as j", "import numpy as np\nnp.load(f)"),
        *("np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "pd.read_pickle(f)", "frame.to_pickle(f)"),
        *("import torch\ntorch.save(a, f)", "importlib.import_module('dill')", "import concurrent, marshal"),
    ],
)
def test_the_rule_finds_what_breaks_it(source: str) -> None:
    assert len(pickling(ast.parse(source))) == 1


def test_the_linter_has_the_rules_too() -> None:
    rules = tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"S301", "S302", "S307", "S506", "S102", "S202", "S602", "S605", "S701"} <= set(rules["select"])
    ignored = {rule for part, rules in rules["per-file-ignores"].items() if part != "tests/**" for rule in rules}
    assert not {rule for rule in ignored if rule.startswith("S")}


class Bomb:
    """Unpickling this writes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def test_every_cifar_file_has_a_sum() -> None:
    assert set(checksums.FILES) == {"cifar10", "cifar100"}
    for name, sums in checksums.FILES.items():
        assert set(sums) == set(datasets.FILES[name])
        assert {len(value) for value in sums.values()} == {64}
    assert len({value for sums in checksums.FILES.values() for value in sums.values()}) == 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_file_that_fools_md5_is_not_unpickled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own check is told that these files are right; the SHA-256 is asked before it."""
    monkeypatch.chdir(tmp_path)
    known = getattr(vision.torchvision_datasets(), name.upper())
    sums: dict[str, str] = {}
    for relative in datasets.FILES[name]:
        path = tmp_path / relative
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Bomb()))
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(known, part, [[file, sums[file]] for file, _ in getattr(known, part)])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": sums[known.meta["filename"]]})
    with pytest.raises(ValueError, match=rf"{name} under .* is damaged or another: .* nothing in it was unpickled"):
        vision.read(name, tmp_path, print)
    assert not Path("unpickled").exists()
    with pytest.raises(TypeError):  # the attack is real: torchvision unpickles, and then misses its keys
        known(str(tmp_path), train=True)
    assert Path("unpickled").exists()


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def test_another_archive_is_neither_unpacked_nor_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root, known = tmp_path / "data", vision.torchvision_datasets().CIFAR10
    root.mkdir()
    members = dict.fromkeys(datasets.FILES["cifar10"], pickle.dumps(Bomb()))
    archive(root / known.filename, {**members, "../../outside": b"escaped"})
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5((root / known.filename).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is not cifar10: SHA-256 "):
        vision.read("cifar10", root, print)
    assert [path.name for path in root.iterdir()] == [known.filename]
    assert not Path("unpickled").exists()
    assert not (tmp_path / "outside").exists()


def test_an_archive_whose_sum_is_right_is_unpacked_inside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, known = tmp_path / "data" / "deep", vision.torchvision_datasets().CIFAR10
    root.mkdir(parents=True)
    archive(root / known.filename, {**dict.fromkeys(datasets.FILES["cifar10"], b"x"), "../../outside": b"escaped"})
    content = (root / known.filename).read_bytes()
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setitem(checksums._ARCHIVES, "cifar10", (known.filename, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(vision, "_PAUSES", ())
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("Python before 3.11.4 has no filters; the archive's sum alone stands there")
    with pytest.raises((ConnectionError, tarfile.TarError)):
        vision.download("cifar10", root)
    assert list(tmp_path.rglob("outside")) == []
    assert sorted(os.listdir(root)) == [known.filename]
