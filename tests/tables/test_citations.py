"""Every paper that a plug-in names has an entry of its own, and every entry a plug-in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.planning import catalog
from bench.tables import citations

KINDS: tuple[catalog.Kind, ...] = ("defenses", "attacks")


def test_each_plugin_cites_entries_of_the_file_and_each_entry_is_cited() -> None:
    text = citations.STORED.read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(\w+),$", text, flags=re.MULTILINE)
    cited = {
        (kind, name): [p.key for p in citations.papers(kind, name)] for kind in KINDS for name in catalog.names(kind)
    }
    assert [plugin for plugin, found in cited.items() if not found] == []
    assert {key for found in cited.values() for key in found} == set(keys)
    assert len(keys) == len(set(keys))
    assert citations.bibtex() == text
    for kind, name in cited:  # an arXiv number in a docstring that is not recognized would be lost
        numbers = re.findall(r"arXiv\s+([0-9.]{9,10})\b", getattr(catalog.find(kind, name), "source", ""))
        assert {paper.arxiv for paper in citations.papers(kind, name)} - {""} == set(numbers), name


def test_entries_are_well_formed() -> None:
    for entry in citations.STORED.read_text(encoding="utf-8").split("\n@")[1:]:
        assert entry.count("{") == entry.count("}"), entry
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, flags=re.MULTILINE))
        assert fields.keys() >= {"author", "title", "year"}
        first = re.sub(r"[^a-z]", "", fields["author"].split(",")[0].lower())
        assert entry.partition("{")[2].startswith(f"{first}{fields['year']}"), entry
        assert ("eprint" in fields) == ("archiveprefix" in fields)


def test_display_names_tell_methods_apart() -> None:
    names = [citations.display_name(name) for name in catalog.names("defenses")]
    assert len(set(names)) == len(names)
    assert (citations.display_name("mart"), citations.display_name("gone")) == ("MART", "gone")


def test_a_plugin_of_the_users_gets_an_entry_from_its_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        '"""min f\\n\\nOwn method (Mueller and Li 2031, arXiv 3101.00001), after TRADES (Zhang et al. 2019, arXiv '
        '1901.08573): more.\\n"""\n\nfrom dataclasses import dataclass\n\nfrom bench.core.defense import Defense\n\n\n'
        "@dataclass\nclass Own(Defense):\n    pass\n"
    )
    monkeypatch.setenv("BENCH_PLUGINS", str(path))
    assert [paper.key for paper in citations.papers("defenses", "own")] == ["mueller2031", "zhang2019theoretically"]
    assert "@misc{mueller2031,\n  author = {Mueller and others},\n  title = {{Own method}},\n" in citations.bibtex()
    assert "  eprint = {3101.00001},\n" in citations.bibtex()


def test_a_paper_without_an_arxiv_number_is_linked_by_the_address_of_its_entry() -> None:
    assert citations.paper_page("mart") == "https://openreview.net/forum?id=rklOg6EFwS"
    assert citations.paper_page("trades") == "https://arxiv.org/abs/1901.08573"
    assert citations.paper_page("standard") is None  # Vapnik 1991
