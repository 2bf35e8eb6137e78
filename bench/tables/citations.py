"""Which papers a plug-in comes from, as BibTeX: `methods.bib` beside this file, by arXiv number or author and year."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from bench.planning import catalog

STORED = Path(__file__).with_name("methods.bib")
_ENTRY = re.compile(r"^@\w+\{([^,]+),\n(.*?)^\}\n", re.DOTALL | re.MULTILINE)
_CITED = re.compile(  # Croce and Hein 2020, arXiv 2003.01690; Madry et al. (2018, ...; Jin et al. 2023, CVPR, arXiv ...
    r"\b([A-Z][\w'-]+)(?:(?:, [A-Z][\w-]+)* and [A-Z][\w-]+| et al\.)? \(?((?:19|20)[0-9]{2})"
    r"(?:, [A-Z][A-Za-z]+)?(?:, arXiv\s+([0-9]{4}\.[0-9]{4,5}))?"
)


class Cited(NamedTuple):
    """A paper as the docstring of a plug-in names it: first author, year, arXiv number or nothing."""

    author: str
    year: str
    arxiv: str

    @property
    def key(self) -> str:
        """The key in `methods.bib`; author and year of a paper that is not in it."""
        known = _keys()
        own = re.sub(r"[^a-z0-9]", "", f"{self.author}{self.year}".lower())
        return known.get(self.arxiv) or known.get(f"{self.author} {self.year}") or own


def papers(kind: catalog.Kind, name: str) -> list[Cited]:
    """The papers that the first paragraph below a plug-in's formula names, in order."""
    plugin = catalog.find(kind, name)
    found = _CITED.findall(plugin.source) if plugin else []
    return list(dict.fromkeys(Cited(*parts) for parts in found))


def paper_page(defense: str) -> str | None:
    """The address of the first paper of a defense that has one: on arXiv, or the `url` of its entry."""
    urls = {field["key"]: field["url"] for field in entries() if "url" in field}
    pages = [
        f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else urls.get(paper.key)
        for paper in papers("defenses", defense)
    ]
    return next(filter(None, pages), None)


def display_name(name: str, kind: catalog.Kind = "defenses") -> str:
    """The name of a method in print: what its docstring says before its paper; the plug-in's name where it has none."""
    plugin = catalog.find(kind, name)
    said = re.split(r"[,:(.]", plugin.source)[0].strip() if plugin else ""
    return said or name


def bibtex() -> str:
    """The stored entries, and for a plug-in of the user's what its docstring says of other papers."""
    text = STORED.read_text(encoding="utf-8")
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    for kind in kinds:
        for name in catalog.names(kind):
            for cited in papers(kind, name):
                if f"{{{cited.key}," not in text:
                    eprint = f"  eprint = {{{cited.arxiv}}},\n  archiveprefix = {{arXiv}},\n" if cited.arxiv else ""
                    said = f"  author = {{{cited.author} and others}},\n  title = {{{{{display_name(name, kind)}}}}},\n"
                    text += f"\n@misc{{{cited.key},\n{said}  year = {{{cited.year}}},\n{eprint}}}\n"
    return text


@functools.cache
def _keys() -> dict[str, str]:
    """Keys of the stored entries by arXiv number, and by the last name of the first author and the year."""
    found = {}
    for field in entries():
        found[f"{field['author'].split(',')[0]} {field['year']}"] = field["key"]
        if "eprint" in field:
            found[field["eprint"]] = field["key"]
    return found


@functools.cache
def entries() -> list[dict[str, str]]:
    """The fields of each stored entry, with its `key`."""
    text = STORED.read_text(encoding="utf-8")
    return [
        {"key": key, **dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, flags=re.MULTILINE))}
        for key, body in _ENTRY.findall(text)
    ]
