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
                        found |= {target.id: value.value} if isinstance(value.value, int) else {}
    return found


FILES = (
    *("test_store_faults.py", "test_tampering.py", "test_scheduler_faults.py", "test_resume_faults.py"),
    *("test_download_faults.py", "test_torch_faults.py", "test_schedules.py", "../training/test_resume_training.py"),
)


def test_the_page_shows_what_the_tests_run_with() -> None:
    c = constants(*FILES)
    told = [
        f"| {c['KILLS']} kills |",
        f"| {c['REWRITES']} kills |",
        f"| {c['FLIPS'] + c['TRUNCATIONS'] + c['EMPTIED']} corruptions |",
        f"concurrent writers of {c['RESULTS']} results",
        f"| {c['WRITERS']} processes, {c['ROUNDS']} rounds |",
        f"| {c['DRIVERS']} rounds of {4 * c['TRAININGS']} jobs |",
        f"| {c['TAMPERED']} changes |",
        f"| {c['WORKER_KILLS']} kills, 4 workers, {c['NEIGHBOURS']} jobs beside them |",
        f"| {c['RESUME_KILLS']} kills |",
        f"| {c['SIGNALS']} times once, {c['SIGNALS']} times twice |",
        f"| {c['SIGNALS']} times |",
        f"| {c['STEP_KILLS']} kills |",
        f"| {c['CHANGED']} inputs of a key, {c['IRRELEVANT']} others |",
        f"{c['REPEATED']} duplicates among {c['LISTED']} defenses",
        f"| {c['CROWD']} jobs |",
        f"| {c['POINTS']} points |",
        f"| {c['HANGS']} jobs |",
        f"| {c['STAGES']} stages |",
        f"{c['TRIES']} tries",
        f"| {c['SOAKED']} jobs |",
        f"| {c['TORN']} torn logs |",
        f"| 3 runs of {c['AGAIN']} jobs |",
        f"| {c['SCHEDULES']} schedules of up to {c['MOVES']} steps |",
    ]
    assert [text for text in told if text not in PAGE] == []
