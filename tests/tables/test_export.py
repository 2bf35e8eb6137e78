"""leaderboard.tex and leaderboard.json: same rows, same order, and no name is syntax."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import STANDARD, all_rows, evaluated, full, golden_store, trained

from bench.records.store import Store
from bench.tables.export import latex, latex_text, robustbench
from bench.tables.leaderboard import write_leaderboard
from bench.tables.sections import sections

KEYS = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "external", "unreliable", "footnote",
}  # fmt: skip
HOSTILE = [
    "\\input{/etc/passwd}", "\\write18{rm}", "50% off", "a & b \\\\ c", "$x$", "#1", "a_b^c~d", "{", "}", "a\nb",
    "[1ex]",
    '"quoted"', "<script>alert(1)</script>", "=1+1", "\u202egnihsif", "\u2028line", "\x1b[2J", "`tick`", "|x|",
]  # fmt: skip


def entries(store: Store) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(robustbench(sections(all_rows(store))))
    return found


def test_an_entry_has_robustbenchs_keys_and_numbers_as_text(store: Store) -> None:
    train = trained(store, "trades")
    keys = full(store, train, 400)
    (entry,) = entries(store)
    assert set(entry) == KEYS | {"bench"}
    assert (entry["clean_acc"], entry["autoattack_acc"], entry["external"]) == ("100.00", "40.00", None)
    assert (entry["eps"], entry["dataset"], entry["architecture"]) == ("0.1", "toy", "tiny")
    assert entry["link"] == "https://arxiv.org/abs/1901.08573"
    assert (entry["authors"], entry["footnote"], entry["unreliable"]) == ("Zhang et al.", None, None)
    own = entry["bench"]
    assert isinstance(own, dict)
    assert (own["rank"], own["n"], own["keys"], own["train_key"]) == ("1", 1000, sorted(keys), train.key)
    assert own["interval"] == ["37.01", "43.07"]


def test_a_stronger_attack_than_autoattack_is_external(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "autoattack", [1] * 5 + [0] * 5, STANDARD)
    evaluated(store, train, "steep", [0] + [1] * 9)
    (entry,) = entries(store)
    assert (entry["autoattack_acc"], entry["external"]) == ("50.00", "40.00")
    assert "needs 1000" in str(entry["footnote"])


def test_what_is_unknown_is_null_and_never_a_number(store: Store) -> None:
    evaluated(store, trained(store), "steep", state="error", n=10)
    (entry,) = entries(store)
    assert [entry[name] for name in ("clean_acc", "autoattack_acc", "external", "reported")] == [None] * 4
    assert " & incomplete & -- & -- & " in latex(sections(all_rows(store)))


def test_both_hold_the_rows_of_the_leaderboard_and_are_equal_twice(store: Store, tmp_path: Path) -> None:
    golden_store(store)
    seen = []
    for _ in range(2):
        write_leaderboard(store, tmp_path / "board.md", tmp_path / "tables")
        seen.append([(tmp_path / "tables" / f"leaderboard.{end}").read_bytes() for end in ("tex", "json")])
    assert seen[0] == seen[1]
    tex, text = (content.decode() for content in seen[0])
    rows = [line.split(" & ") for line in tex.splitlines() if " & " in line and not line.startswith("Rank")]
    assert [(row[0], row[1]) for row in rows] == [
        ("1", "guard (beta=6)"), ("2", "standard"), ("--", r"broken\_one"), ("unsound", "smooth"),
        ("1", "guard"),
    ]  # fmt: skip
    assert rows[0][3:9] == ["0.1", "100.00", "45.50", "45.50", "42.44--48.60", "1000"]
    assert [entry["name"] for entry in json.loads(text)] == [
        "guard (beta=6)",
        "standard",
        "broken_one",
        "smooth",
        "guard",
    ]
    assert [tex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}")] == [3] * 4
    assert {entry["name"]: entry["unreliable"] for entry in json.loads(text)}["smooth"] is True


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_syntax(store: Store, name: str) -> None:
    evaluated(store, trained(store, name, model={"name": name}, data={"name": name}), "steep", [1, 0])
    text = latex(sections(all_rows(store)))
    body = [line for line in text.splitlines() if line and not line.startswith("%")]
    assert len(body) == 7  # no line break gets in, and none is hidden in a comment
    row = body[4]
    assert row.count(" & ") == 9
    assert row.endswith(r" NOT CHECKED \\")
    assert not row.startswith("[")
    (entry,) = entries(store)
    assert (entry["name"], entry["dataset"]) == (name, name)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a_b 5%", r"a\_b 5\%"),
        ("\\x{y}", r"\textbackslash{}x\{y\}"),
        ("#1 & $2^~", r"\#1 \& \$2\textasciicircum{}\textasciitilde{}"),
        ("1† ⚑", r"1\dag{} $\ast$"),
        ("a\nb\x00c\u202ed", "a b c d"),
    ],
)
def test_latex_prints_text_as_it_is(text: str, printed: str) -> None:
    assert latex_text(text) == printed
