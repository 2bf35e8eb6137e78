"""leaderboard.tex and leaderboard.json: same rows, same order, and no name is syntax."""

from __future__ import annotations

import json
from pathlib import Path

from factories import STANDARD, all_rows, evaluated, full, golden_store, trained

from bench.records.store import Store
from bench.tables.export import robustbench
from bench.tables.leaderboard import write_leaderboard
from bench.tables.sections import sections

KEYS = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "external", "unreliable", "footnote",
}  # fmt: skip


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
        ("1", "guard (beta=6)"), ("2", r"Standard training~\cite{vapnik1991principles}"), ("--", r"broken\_one"),
        ("unsound", "smooth"), ("1", "guard"),
    ]  # fmt: skip
    assert rows[0][2:] == [r"\textbf{100.0}", r"\textbf{45.5}", r"\textbf{45.5} $\pm$ 3.1", "1000", r"NOT CHECKED \\"]
    assert [entry["name"] for entry in json.loads(text)] == [
        "guard (beta=6)",
        "standard",
        "broken_one",
        "smooth",
        "guard",
    ]
    assert [tex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}")] == [3] * 4
    assert {entry["name"]: entry["unreliable"] for entry in json.loads(text)}["smooth"] is True
