"""The tests' own files."""

from __future__ import annotations

from collections import Counter

from paths import ROOT, TESTS


def test_no_two_files_of_the_tests_share_a_name() -> None:
    # without packages pytest imports by bare name: a second nets.py would be the first one, whichever came first
    names = Counter(file.name for file in TESTS.rglob("*.py") if file.name != "conftest.py")
    assert [name for name, times in names.items() if times > 1] == []


def test_the_folders_of_the_tests_mirror_the_tree() -> None:
    """A folder holds the tests of the package of its name; faults and security cross packages; what tests the whole
    product (pages, demo, golden tables) lies beside the folders."""
    packages = {path.parent.name for path in (ROOT / "bench").glob("*/__init__.py")}
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")}
    assert folders - {"attacks", "defenses", "fault", "security"} == packages
