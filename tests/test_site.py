"""The documentation site: built without a warning, with notebooks that ran, no dead link, and a layout that fits."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import PROGRAM, Browser
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SEEN = ("index.html", "leaderboard.html", "docs/api/core.html", "docs/notebooks/own_model.ipynb.html")


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    named = [line.split()[-1] for line in nav.splitlines() if "/" in line or "." in line]
    assert [name for name in named if not (ROOT / name).exists()] == []
    covered = {path for name in named for path in (ROOT / name).glob("*.md")} | {ROOT / name for name in named}
    assert {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *NOTEBOOKS} - covered == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda path: path.name)
def test_no_text_reads_as_a_reference(path: Path) -> None:
    """`[a][b]` outside code is a link by reference, of which there are none: a warning of the site."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"\[[^][\n]+\]\[[^][\n]+\]", text) == []


class Page(HTMLParser):
    """What a page links to, and the names that a link may lead to within it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.names |= {found[name] for name in ("id", "name") if name in found}


def dead(site: Path) -> list[str]:
    """Links between the pages that lead nowhere, and what a page would load from elsewhere."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name not in ("404.html", "report.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            if not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].names):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'")
def test_the_site_is_built_without_a_warning_and_reads_well(tmp_path: Path) -> None:
    """One test, so that two workers do not build it twice. A cell of a notebook that raises stops the build."""
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    build = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert build.returncode == 0, build.stderr
    assert [line for line in build.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))] == []
    assert dead(site) == []

    tables = (site / "docs/notebooks/own_defense.ipynb.html").read_text(encoding="utf-8")
    shown = ("worst case", "pairing", "autoattack_fast")
    assert [word for word in shown if f"<th>{word}</th>" not in tables] == []
    assert "\x1b" not in tables
    assert len([*(site / "docs/notebooks/own_model_files").glob("*.png")]) == 1
    assert 'id="bench.core.defense.Defense.loss"' in (site / "docs/api/core.html").read_text(encoding="utf-8")
    report = (site / "report.html").read_text(encoding="utf-8")
    for pack in (ROOT / "results").glob("*.zip"):
        keys = {name.split("/")[0] for name in zipfile.ZipFile(pack).namelist() if name.endswith("record.json")}
        assert any(key in report for key in keys), pack.name
    if PROGRAM is not None:
        with Browser() as browser:
            for name in SEEN:
                for width in (1280, 390):
                    browser.open(site / name, width=width, phone=width == 390)
                    assert browser.js("document.documentElement.scrollWidth <= innerWidth"), f"{name} at {width}"
                    assert browser.log == [], name
                    assert [each for each in browser.requests if not each.startswith(("file:", "data:"))] == []
