"""S6: a plug-in runs because somebody named it, and every record says which file it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from harness import Bench, tiny, write_plugins

from bench.planning import catalog
from bench.records.store import Store

EVIL = '''"""min CE

Nobody (2024).
"""
from pathlib import Path
Path({mark!r}).write_text("imported")
from dataclasses import dataclass
from typing import Any, ClassVar
import torch.nn.functional as F
from torch import nn
from bench.core.defense import Batch, Defense, Losses

@dataclass
class {title}(Defense):
    uses_threat: ClassVar[bool] = False
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {{"ce": F.cross_entropy(net(batch.x), batch.y)}}
'''
PLACES = (
    "evil.py",
    "defenses/evil.py",
    "attacks/evil.py",
    "plugins/evil.py",
    "results/evil.py",
    "bench/models/evil.py",
)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Where an import of the unlisted plug-in shows."""
    return tmp_path / "imported"


def plant(mark: Path) -> None:
    """The same plug-in wherever a search for some might look, and announced as other packages announce theirs."""
    for place in PLACES:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_text(EVIL.format(mark=str(mark), title="Evil"))
    about = Path("evil-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bench.plugins]\nevil = evil\n[bench.defenses]\nevil = evil:Evil\n")


def test_an_unlisted_plugin_is_never_imported(
    bench: Bench, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(mark)
    monkeypatch.syspath_prepend(tmp_path)
    assert bench(*tiny(*write_plugins(tmp_path), attack="clean")).code == 0
    for words in (("list",), ("status",), ("leaderboard",), ("plan", "--defense", "standard"), ("check", "fgsm")):
        outcome = bench(*words)
        assert outcome.code == 0, outcome.err
        assert "evil" not in outcome.out
    refused = bench("run", "--defense", "evil")
    assert (refused.code, "no defense 'evil'" in refused.err) == (2, True)
    assert not mark.exists()


def test_one_that_is_named_is_read_without_running_and_imported_by_its_job(bench: Bench, mark: Path) -> None:
    Path("evil.py").write_text(EVIL.format(mark=str(mark), title="Evil"))
    assert "evil" in bench("list", "defenses", "--plugin", "evil.py").out
    assert bench("plan", "--defense", "evil", "--plugin", "evil.py", "--no-check").code == 0
    assert not mark.exists()  # read by `ast`
    assert bench(*tiny("--plugin", "evil.py", defense="evil", attack="clean")).code == 0
    assert mark.exists()  # the canary is real
    (record,) = (record for job, record in Store(Path("results")).records() if job.kind == "train")
    digest = hashlib.sha256(Path("evil.py").read_bytes()).hexdigest()
    assert record.provenance.plugin_sha256 == digest[:16]


def test_every_record_of_a_plugin_says_which_file_it_was(bench: Bench, tmp_path: Path) -> None:
    assert bench(*tiny(*write_plugins(tmp_path))).code == 0
    found = {}
    for job, record in Store(Path("results")).records():
        name = (job.defense if job.kind == "train" else job.attack).name
        found[name] = record.provenance.plugin_sha256
        assert {"defense-bench", "torch", "python"} <= set(record.provenance.versions)
    assert set(found) == {"plain", "wobble", "clean"}
    files = {name: tmp_path / f"{name}.py" for name in ("plain", "wobble")}
    files["clean"] = catalog.get("attacks", "clean").path
    assert found == {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}


def test_no_plugins_forgets_what_the_environment_names(
    bench: Bench, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil.py").write_text(EVIL.format(mark=str(mark), title="Evil"))
    monkeypatch.setenv("BENCH_PLUGINS", str(Path("evil.py").resolve()))
    catalog.get.cache_clear()
    assert "evil" in catalog.names("defenses")
    from bench.commands.arguments import plugins, refuse_plugins

    refuse_plugins(True)
    try:
        assert "BENCH_PLUGINS" not in os.environ
        assert "evil" not in catalog.names("defenses")
        with pytest.raises(ValueError, match=r"--no-plugins refuses every plug-in, and --plugin names evil\.py"):
            plugins([Path("evil.py")])
    finally:
        refuse_plugins(False)


def test_the_option_stands_before_any_command(bench: Bench, mark: Path) -> None:
    Path("evil.py").write_text(EVIL.format(mark=str(mark), title="Evil"))
    refused = bench("--no-plugins", "list", "defenses", "--plugin", "evil.py")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--no-plugins refuses every plug-in" in refused.err
    assert bench("--no-plugins", "list", "defenses").code == 0
    assert "evil" in bench("list", "defenses", "--plugin", "evil.py").out  # it holds for one command only


def test_the_documentation_says_that_it_is_no_sandbox() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    assert "no sandbox" in text
    assert "--no-plugins" in text
