"""docs/reliability.md shows the figures that the fault tests run with."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "reliability.md").read_text(encoding="utf-8")


def constants(*names: str) -> dict[str, int]:
    """Upper-case numbers at the top of fault tests."""
    found: dict[str, int] = {}
    for name in names:
        for node in ast.parse((HERE / "fault" / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign):
                targets = node.targets[0]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                names_ = targets.elts if isinstance(targets, ast.Tuple) else [targets]
                for target, value in zip(names_, values, strict=False):
                    if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                        found[target.id] = int(value.value)
    return found


def test_the_page_shows_what_the_tests_run_with() -> None:
    c = constants("test_store_faults.py", "test_tampering.py")
    told = [
        f"| {c['KILLS']} kills |",
        f"| {c['REWRITES']} kills |",
        f"| {c['FLIPS'] + c['TRUNCATIONS'] + c['EMPTIED']} corruptions |",
        f"concurrent writers of {c['RESULTS']} results",
        f"| {c['WRITERS']} processes, {c['ROUNDS']} rounds |",
        f"| {c['DRIVERS']} rounds of {4 * c['TRAININGS']} jobs |",
        f"| {c['TAMPERED']} changes |",
    ]
    assert [text for text in told if text not in PAGE] == []
