"""Hooks of mkdocs.yml. The site has the layout of the repository, so that a link leads to the same place on both.

- Pages are the Markdown files of the root and of docs/, and the notebooks, which are run for it.
- What they link to else (code, specs, data) becomes a page that shows the file; a folder, one that lists it.
- report.html is what `bench report` writes from the committed packs.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Link, Navigation, Section
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.filters import strip_ansi
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tutorial import environment  # noqa: E402

from bench.records.store import Store  # noqa: E402
from bench.report import write_report  # noqa: E402

PAGES = ("*.md", "docs/**/*.md")
NOTEBOOKS = "docs/notebooks/*.ipynb"
ASSETS = ("docs/**/*.png", "docs/**/*.svg", "docs/*.css")
REPORT = "report.html"
_LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)")


class Shown(File):
    """A page made from a file that is no Markdown; its address is the file's with `.html` behind it."""

    def is_documentation_page(self) -> bool:
        return True

    @functools.cached_property
    def dest_uri(self) -> str:  # type: ignore[override]
        return f"{self.src_uri}.html"


def on_config(config: MkDocsConfig) -> None:
    """In the navigation, the pages of a folder in place of its name."""

    def expanded(entry: object) -> object:
        if isinstance(entry, dict):
            return {title: expanded(below) for title, below in entry.items()}
        if isinstance(entry, list):
            return [expanded(below) for below in entry]
        found = sorted((ROOT / str(entry)).glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
        return [path.relative_to(ROOT).as_posix() for path in found] if str(entry).endswith("/") else entry

    config.nav = expanded(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, and ours by their place in the repository."""
    kept = [file for file in files if file.src_dir != config.docs_dir]
    texts = {path: path.read_text(encoding="utf-8") for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    found = [_own(path, config) for path in itertools.chain(texts, *map(ROOT.glob, ASSETS))]
    for path in sorted(ROOT.glob(NOTEBOOKS)):
        texts[path], images = _run(path, path.read_text(encoding="utf-8"))
        uri = path.relative_to(ROOT)
        found.append(Shown.generated(config, uri.as_posix(), content=texts[path]))
        found += [File.generated(config, (uri.parent / name).as_posix(), content=png) for name, png in images.items()]
    known = {file.src_uri for file in found}
    linked = sorted({(path.parent / link).resolve() for path, text in texts.items() for link in _LINK.findall(text)})
    for path in linked:  # and the files of a folder among them
        uri = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.exists() else ""
        if uri and uri not in known:
            known.add(uri)
            found.append(_shown(path, config))
            linked += filter(Path.is_file, path.iterdir()) if path.is_dir() else ()
    found.append(File.generated(config, REPORT, content=_report(tuple(sorted((ROOT / "results").glob("*.zip"))))))
    return Files([*kept, *found])


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """The report, which is no page of MkDocs, beside the page about it."""
    for section in nav.items:
        if isinstance(section, Section) and section.title == "Gallery":
            section.children.insert(1, Link("Report of the committed records", REPORT))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Markdown within <details> is Markdown, as on GitHub; a picture of the report leads to the report."""
    markdown = markdown.replace("<details>", '<details markdown="1">')
    target = f"{'../' * page.file.src_uri.count('/')}{REPORT}"
    return re.sub(r"(!\[[^]]*\]\([^)]*report-desktop\.png\))", rf"[\1]({target})", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A bar in the code of a table's cell is escaped in Markdown, and shown without its backslash, as on GitHub."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def _own(path: Path, config: MkDocsConfig) -> File:
    return File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)


def _shown(path: Path, config: MkDocsConfig) -> File:
    """A page with the text of a file, or with the names in a folder, that the search leaves out; else the file."""
    name, fence = path.relative_to(ROOT).as_posix(), "````"
    if path.is_dir():
        below = sorted(path.iterdir())
        lines = [f"- [{each.name}]({path.name}/{each.name})" if each.is_file() else f"- {each.name}/" for each in below]
    else:
        try:
            text = path.read_text(encoding="utf-8").rstrip()
        except UnicodeDecodeError:
            return _own(path, config)
        lines = [fence + {".py": "python", ".json": "json"}.get(path.suffix, "yaml"), text, fence]
    content = "\n".join(["---", "search: {exclude: true}", "---", "", f"# {name}", "", *lines, ""])
    return Shown.generated(config, name, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


@functools.cache  # for `mkdocs serve`, which builds after each edit
def _run(path: Path, text: str) -> tuple[str, dict[str, bytes]]:
    """A notebook, run in an empty folder, as Markdown, and its images. Raises CellExecutionError where a cell does."""
    with tempfile.TemporaryDirectory() as folder:
        book = nbformat.reads(text, as_version=4)
        # sockets in the folder, as others on the machine could read a port
        own = Config(KernelManager={"transport": "ipc", "ip": f"{folder}/.kernel"})
        client = NotebookClient(book, timeout=900, resources={"metadata": {"path": folder}}, config=own)
        client.startup_timeout, client.coalesce_streams = 300, True
        client.execute(env=environment())
    names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    body, resources = MarkdownExporter().from_notebook_node(book, resources=names)
    body = strip_ansi(body)
    body = re.sub(r"<style scoped>.*?</style>\n?", "", body, flags=re.DOTALL)  # of pandas; the theme has its own
    return body.replace('<table border="1" class="dataframe">', "<table>"), resources["outputs"]


@functools.cache
def _report(packs: tuple[Path, ...]) -> bytes:
    """The report of these packs alone: a checkout's other results stay out of the site."""
    with tempfile.TemporaryDirectory() as folder:
        for pack in packs:
            shutil.copy(pack, folder)
        page = Path(folder) / REPORT
        write_report(Store(Path(folder)), page)
        return page.read_bytes()
