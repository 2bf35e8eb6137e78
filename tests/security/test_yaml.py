"""S3: a spec that YAML would take for something else than its author meant is refused, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Bench

from bench.planning.spec import load

GOOD = "threat: {eps: 0.1}\ndefenses: [standard]\nattacks: [clean]\n"
ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
# content, the line that the message must name, and what it must say
BAD: dict[str, tuple[str, int, str]] = {
    "tag that runs code": (GOOD + "name: !!python/object/apply:os.system ['touch pwned']\n", 4, "tag "),
    "tag of a name": (GOOD + "name: !!python/name:os.system\n", 4, "tag "),
    "own tag": ("!Spec\n" + GOOD, 1, "tag "),
    "alias bomb": (GOOD + ALIASES, 5, "aliases (*a) are not allowed"),
    "merge key": (GOOD + "data: &d {name: digits}\nmodels: [{<<: *d}]\n", 5, "aliases (*d) are not allowed"),
    "duplicate key": (GOOD + "seeds: [0]\nseeds: [1]\n", 5, "duplicate key 'seeds' (first on line 4)"),
    "duplicate key below": (GOOD + "train:\n  epochs: 1\n  epochs: 9\n", 6, "duplicate key 'epochs' (first on line 5)"),
    "depth": (GOOD + f"name: {'[' * 21}{']' * 21}\n", 4, "nested deeper than 20 levels"),
    "version as a number": (GOOD + "name: 1.10\n", 4, "name: "),
    "date": (GOOD + "train: {epochs: 2026-01-01}\n", 4, "train.epochs: "),
    "not a number": (GOOD + "train: {lr: .nan}\n", 4, "train.lr: "),
    "unknown key": (GOOD + "atacks: [pgd]\n", 4, "unknown key 'atacks'"),
    "number as a key": (GOOD + "train: {1: 2}\n", 4, "a key must be text"),
    "broken": (GOOD + "data: {name: [}\n", 4, ""),
    "two documents": (GOOD + "---\nname: b\n", 4, ""),
    "expression as eps": ("defenses: [standard]\nattacks: [clean]\nthreat: {eps: '__import__(\"os\")'}\n", 3, "eps"),
}


def test_at_least_ten_bad_documents() -> None:
    assert len(BAD) >= 10


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_refused_with_its_line(name: str, bench: Bench) -> None:
    text, line, says = BAD[name]
    Path("spec.yaml").write_text(text)
    for command in ("plan", "run"):
        outcome = bench(command, "spec.yaml")
        assert outcome.code == 2, outcome.out
        assert outcome.err.startswith(f"error: spec.yaml, line {line}: "), outcome.err
        assert says in outcome.err
        assert outcome.err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"spec.yaml"}


def test_a_large_file_is_not_read(bench: Bench) -> None:
    Path("spec.yaml").write_text(GOOD + "#" + " " * 1_000_000)
    assert "a spec may have 1000000" in bench("plan", "spec.yaml").err


@pytest.mark.parametrize(
    ("written", "value"),
    [("lr: 1e-3", 0.001), ("lr: 0.10", 0.1), ("epochs: 010", 10), ("augment: no", False), ("augment: true", True)],
)
def test_plain_values_mean_what_they_say(tmp_path: Path, written: str, value: object) -> None:
    """YAML 1.1 alone would make text of the first and eight of the third."""
    path = tmp_path / "spec.yaml"
    path.write_text(f"threat: {{eps: 8/255}}\ndefenses: [standard]\nattacks: [clean]\ntrain: {{{written}}}\nname: no\n")
    spec = load(path)
    assert getattr(spec.train, written.partition(":")[0]) == value
    assert (spec.name, str(spec.threat.eps[0])) == ("no", "8/255")
