"""Whose commit a record tells: that of the code, never that of a repository it happens to lie in."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from bench.jobs.provenance import git

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a clean package `bench`, and a folder of installed packages that it ignores."""
    top = (tmp_path / "mine").resolve()
    installed = top / "venv" / "site-packages" / "bench"
    for folder in (top / "bench", installed):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("one = 1\n")
    (top / ".gitignore").write_text("venv/\n")
    about = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(top), *about, *words], check=True, capture_output=True)
    return top


def test_a_checkout_says_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    assert git(checkout) == (commit[:12], False)
    (checkout / "bench" / "code.py").write_text("one = 2\n")
    git.cache_clear()
    assert git(checkout) == (commit[:12], True)
    git.cache_clear()


def test_what_is_installed_below_a_repository_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    for folder in (checkout / "venv" / "site-packages", checkout / "bench", tmp_path):
        assert git(folder.resolve()) == (None, None)
