"""The pages under docs/ are what their generator writes, links lead somewhere, and what they type can be typed."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from harness import Bench

from bench.data import datasets
from bench.planning import catalog, describe

pytestmark = pytest.mark.usefixtures("fresh_catalog")
ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
PLUGINS = [(kind, name) for kind in ("defenses", "attacks") for name in catalog.names(kind)]
TYPED = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("README", "cli", "quickstart", "faq", "concepts", "tutorial", "training", "own_model")
    ),
)


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = script("generate")


def plain(text: str) -> str:
    """Markdown without what is not markup: fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings as GitHub makes them: lower case, letters, digits, `-` and `_`, spaces as `-`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("\\", "")
        slug = "".join(c if c.isalnum() or c in "-_" else "-" if c == " " else "" for c in shown.lower())
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    changed = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [heading for heading in changed if heading != "Unreleased"]
    assert cited["version"] == version
    assert released[0] == f"{version} ({cited['date-released']})"


def test_authors_are_cited_by_their_letters_and_not_by_latex() -> None:
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["references"]
    names = {author.get("family-names", "") for paper in references for author in paper["authors"]}
    assert {"Tramèr", "Rodríguez-Muñoz", "Schönherr"} <= names
    assert not [name for name in names if "\\" in name]


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `bench.load`: one *row*\n```\n# no heading\n```\n## What's 2.1? Yes\n## A_b\n## A_b\n")
    assert anchors(page) == {"benchload-one-row", "whats-21-yes", "a_b", "a_b-1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", plain(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, fragment = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or (fragment and fragment not in anchors(place)):
            broken.append(target)
    assert broken == []


def test_the_glossary_defines_at_least_30_terms_and_names_a_source_for_each() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    rows = [generate.cells(line) for line in lines if line.startswith("| ")][2:]
    terms = [row[0] for row in rows]
    assert len(terms) == len(set(terms)) >= 30
    assert [row for row in rows if len(row) != 4 or not row[1]] == []
    for term, _, _, source in rows:
        path = re.fullmatch(r"bench, `(.+)`", source)
        assert (ROOT / path[1]).exists() if path else re.search(r" \d{4}, (\[arXiv|doi:)", source), term


def test_the_files_to_read_first_exist_and_are_at_most_13() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.partition("## Read these first\n")[2].partition("\n## ")[0]
    read_these_first = re.findall(r"^\d+\. \[(bench/\S+\.py)\]\((\S+)\): \S", part, flags=re.MULTILINE)
    paths = [path for path, target in read_these_first if path == target]
    assert len(paths) == len(re.findall(r"^\d+\. ", part, flags=re.MULTILINE))
    assert len(set(paths)) == len(paths) <= 13
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    assert (paths[0], paths[-1]) == ("bench/commands/run.py", "bench/tables/leaderboard.py")


def test_no_page_names_a_path_of_a_machine() -> None:
    found = [
        f"{page.name}: {word}"
        for page in PAGES
        for word in re.findall(r"(?<![\w./])/(?:home|root|tmp|work|mnt|Users|opt)/\S*", page.read_text("utf-8"))
    ]
    assert found == []


def test_the_index_names_every_page_of_docs() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = [*docs.glob("*.md"), *(docs / "findings").glob("*.md")]
    names = {path.relative_to(docs).as_posix() for path in pages} - {"README.md"}
    assert {name for name in names if f"]({name})" not in index} == set()


def test_generated_pages_are_what_the_generator_writes() -> None:
    assert sorted(path.relative_to(ROOT).as_posix() for path in generate.stale()) == []  # else: python docs/generate.py


def test_the_readme_names_only_what_there_is() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is in it")[2]
    there = [*datasets.KNOWN, *(name for kind in catalog.KINDS for name in catalog.names(kind))]
    named = re.findall(r"`([^`]+)`", table)
    assert len(named) > 30
    assert set(named) - {*there, "folder:PATH", "timm:NAME"} == set()


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_a_page_holds_all_that_the_file_says(kind: catalog.Kind, name: str) -> None:
    plugin = catalog.get(kind, name)
    text = (ROOT / "docs" / kind / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert plugin.formula in text
    for field in plugin.fields:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{field.name}` |"))
        assert f"| `{describe.default(field.default)}` |" in row.replace("\\|", "|")
        assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells: what a setting says is no table syntax
    for number in re.findall(r"arXiv (\d{4}\.\d+)", plugin.source):
        assert f"[arXiv {number}](https://arxiv.org/abs/{number})" in text
    if kind == "defenses":
        assert plugin.constant("cost", "?").split(" ")[0] in text


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_the_example_of_a_page_can_run(kind: catalog.Kind, name: str, bench: Bench) -> None:
    example = describe.example(catalog.get(kind, name))
    assert name in re.split(r"[ ,]", example)
    outcome = bench("plan", "--check", *shlex.split(example)[2:])
    if "does not import: " in outcome.err or "is not installed: " in outcome.err:
        pytest.skip(outcome.err)  # an extra
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("steps of a * eps * g, not *the* image", r"steps of a \* eps \* g, not *the* image"),
        ("x_t and `x_t | y`", r"x\_t and `x_t | y`"),
        ("NAME[/FILE][@REVISION]", r"NAME[/FILE]\[@REVISION]"),
        ("||w|| < d<name>", r"\|\|w\|\| &lt; d&lt;name>"),
        ("AT&T (arXiv 1312.6199)", "AT&amp;T ([arXiv 1312.6199](https://arxiv.org/abs/1312.6199))"),
    ],
)
def test_formulas_in_prose_stay_literal(text: str, shown: str) -> None:
    assert generate.prose(text) == shown


def test_measured_costs_are_means_over_models() -> None:
    kind = {"attack": "pgd", "dataset": "mnist", "model": "lenet5", "deploys": "deterministic"}
    with (ROOT / "results" / "tables" / "timing_attacks.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if kind.items() <= row.items()]
    counts = [int(row["models"]) for row in rows]
    mean = sum(n * float(row["forwards"]) for n, row in zip(counts, rows, strict=True)) / sum(counts)
    lines = generate.measured("pgd")
    line = next(line for line in lines if line.startswith("| pgd | mnist, lenet5, deterministic |"))
    assert generate.cells(line)[2:4] == [str(sum(counts)), f"{mean:.0f}"]
    assert not any("square" in line for line in lines)
    assert generate.measured("clean") == ["No committed record counts its passes."]


def test_findings_are_found_by_the_lead_of_an_item() -> None:
    text = (
        "# F\n\n## First of `pgd`\n\n1. **`awp` wins.** Not `fgsm`.\n2. A tie\n   of `awp` too: yes. Then `mart`.\n"
        "\n## Second\n\n- **Square alone is not an attack**: see [x](y.md) and [z](https://z).\n\nNo item of `awp`.\n"
    )
    first, second = "[First of pgd](../findings/README.md#first-of-pgd)", "[Second](../findings/README.md#second)"
    assert generate.findings("awp", text) == [
        f"- **`awp` wins.** Not `fgsm`. ({first})",
        f"- A tie of `awp` too: yes. Then `mart`. ({first})",
    ]
    assert generate.findings("fgsm", text) == generate.findings("mart", text) == []
    assert generate.findings("pgd", text) == [f"- {first}: the whole section."]
    assert generate.findings("square", text) == [
        f"- **Square alone is not an attack**: see [x](../findings/y.md) and [z](https://z). ({second})"
    ]


def test_every_phrase_for_a_finding_still_finds_one() -> None:
    text = (ROOT / "docs" / "findings" / "README.md").read_text(encoding="utf-8")
    for name, phrase in generate.SPOKEN.items():
        assert any(phrase in found.replace("`", "") for found in generate.findings(name, text)), name


BOARD = """\
## mnist, Linf eps = 0.2

### Deterministic

Architecture lenet5.

| Rank | Method | Clean |
| --- | --- | --- |
| 1 | wrong | 5 |

## mnist, Linf eps = 0.1

### Deterministic

Architecture mlp; clean on 100 images.

| Rank | Method | Clean |
| --- | --- | --- |
"""


def row(rank: object, method: str) -> str:
    return f"| {rank} | {method} | 90.0 |\n"


def test_the_readme_shows_the_first_rows_and_the_undefended_one_as_they_stand() -> None:
    names = [rf"[m\_{place} (a=\|b)](https://arxiv.org/abs/1)" for place in range(1, 8)]
    board = BOARD + row("1–2", names[0]) + row("=", names[1])
    board += "".join(row(place, names[place - 1]) for place in range(3, 8)) + row(8, r"standard \[lr=0.1\]")
    board += "\n<details>\n\n| Rank | More |\n| --- | --- |\n| 1 | all |\n\n</details>\n\n### Certified\n\n" + row(
        9, "other"
    )
    told = generate.top_rows(board)
    shown = [line for line in told.splitlines() if line.startswith("| ")]
    assert shown[0] == "| Rank | Method | Clean |"
    assert [line.split(" | ")[:2] for line in shown[2:]] == [
        *([f"| {rank}", name] for rank, name in zip(("1–2", "1–2", 3, 4, 5), names, strict=False)),
        ["| 8", r"standard \[lr=0.1\]"],
    ]
    assert "mnist, Linf eps = 0.1: the first 5 of 8 rows" in told
    assert "Architecture mlp; clean on 100 images." in told
    others = BOARD + "".join(row(place, f"m{place}") for place in range(1, 6))
    assert "| 7 | standard |" in generate.top_rows(others + row(6, "standard, other net") + row(7, "standard"))
    twice = generate.top_rows(BOARD + row(1, "standard") + row(2, "trades"))
    assert twice.count("| standard |") == 1  # among the first already


def test_a_readme_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README\.md must hold one '<!-- rows:begin -->' and then one"):
        generate.readme(f"{generate.END} {generate.BEGIN}", BOARD + row(1, "standard"))
    with pytest.raises(ValueError, match=r"leaderboard\.md has no table under"):
        generate.top_rows("# Leaderboard\n")


def commands(page: str) -> list[str]:
    """The `bench` lines in blocks of a page, without comments."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.M)
    blocks = [block for language, block in fences if language in ("", "console")]
    lines = [line.removeprefix("$ ").split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("bench ")]


@pytest.mark.parametrize("page", TYPED)
def test_every_option_that_a_page_types_exists(page: str, bench: Bench) -> None:
    inline = re.findall(r"`(bench [a-z]+ [^`\n]*)`", (ROOT / page).read_text(encoding="utf-8"))
    for line in [*commands(page), *inline]:
        _, command, *words = shlex.split(line)
        shown = bench(command, "--help").out
        for option in [word for word in words if word.startswith("-")]:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), line


@pytest.mark.parametrize("line", [line for line in commands("docs/quickstart.md") if line.startswith("bench run")])
def test_a_run_of_the_quick_start_can_be_planned(line: str, bench: Bench) -> None:
    if "mine.yaml" in line:
        text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
        Path("mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    words = [word for word in shlex.split(line)[2:] if word not in ("--data-dir", "FOLDER")]
    outcome = bench("plan", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert " to do" in outcome.out
