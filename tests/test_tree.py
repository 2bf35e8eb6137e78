"""The tests' own files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_no_two_files_of_the_tests_share_a_name() -> None:
    # without packages pytest imports by bare name: a second nets.py would be the first one, whichever came first
    names = Counter(file.name for file in Path(__file__).parent.rglob("*.py") if file.name != "conftest.py")
    assert [name for name, times in names.items() if times > 1] == []
