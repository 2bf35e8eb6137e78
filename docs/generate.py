"""Write the generated pages: one a defense, one an attack, their indexes, the options in cli.md, rows in README.md, and
the papers in CITATION.cff.

    python docs/generate.py          # writes what differs and names it
    python docs/generate.py --check  # writes nothing; exit code 1 and the names where something differs

Everything comes from the plug-in files (docstring, settings, class constants), the command line,
docs/findings/README.md, leaderboard.md, results/tables/timing_attacks.csv and bench/tables/methods.bib. In README.md
and docs/cli.md only the text between the markers is replaced.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from typer.main import get_command  # noqa: E402

from bench import cli  # noqa: E402
from bench.planning import catalog, describe  # noqa: E402
from bench.soundness.catalog import CHECKS  # noqa: E402
from bench.tables import citations  # noqa: E402

KINDS: tuple[catalog.Kind, ...] = ("defenses", "attacks")
BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"
OPTIONS_BEGIN, OPTIONS_END = "<!-- options:begin -->", "<!-- options:end -->"
PICTURE = "docs/report-desktop.png"
SECTION = ("## mnist, Linf eps = 0.1", "### Deterministic")
TOP = 5
ACCENTS = {"`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", '"': "\u0308"}  # of LaTeX, as marks that combine
# how the findings speak of a plug-in where it does not write its name
SPOKEN = {
    "closed_form": "Does the closed form beat EOT",
    "eot": "Does the closed form beat EOT",
    "flatness": "Weight flatness does not follow",
    "pgd": "PGD on cross-entropy flatters",
    "smoothing": "A vote under Gaussian noise",
    "square": "Square alone is not an attack",
    "noisy_sampled": "Sampling the same noise does not",
    "noisy_vote": "Keeping the noise at prediction",
    "transfer": "The undefended baseline's images",
}
INTRO = {
    "defenses": "What can be trained. The cost is that of a training step in forward passes F of the net per image; a "
    "backward pass is 2F, one to the image alone F. How they compare when run: [leaderboard](../../leaderboard.md), "
    "[findings](../findings/README.md).",
    "attacks": "What evaluates a trained model. The worst case counts, for each image, all attacks that were run "
    "([concepts](../concepts.md)).",
}


def prose(text: str) -> str:
    """A docstring paragraph as Markdown: formulas stay literal, `code` and *emphasis* keep their meaning."""
    parts = re.split(r"(`[^`]+`)", text)
    for place in range(0, len(parts), 2):
        plain = parts[place].replace("&", "&amp;").replace("<", "&lt;").replace("_", r"\_").replace("|", r"\|")
        plain = plain.replace("][", r"]\[")  # no reference
        plain = re.sub(r"\*(?!\w[^*]*\w\*)(?<!\w\*)", r"\\*", plain)
        parts[place] = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", plain)
    return "".join(parts)


def code(text: str) -> str:
    """Literal text in a table cell."""
    return f"`{text}`".replace("|", r"\|")


def anchor(heading: str) -> str:
    """The fragment that a heading has on GitHub and in most renderers."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def findings(name: str, text: str) -> list[str]:
    """Items of the findings whose lead (bold text, or first sentence) names the plug-in, each with its section."""
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        link = f"[{heading.replace('`', '')}](../findings/README.md#{anchor(heading)})"
        if f"`{name}`" in heading:
            found.append(f"- {link}: the whole section.")
        for item in re.split(r"^(?:- |\d+\. )", body, flags=re.MULTILINE)[1:]:
            flat = " ".join(item.split("\n\n")[0].split())
            lead = re.match(r"\*\*.+?\*\*|.+?[.:](?= |$)", flat)
            if lead and (f"`{name}`" in lead[0] or SPOKEN.get(name, "`") in lead[0].replace("`", "")):
                found.append(f"- {relative(flat)} ({link})")
    return found


def relative(text: str) -> str:
    """Links of a page in docs/findings/ as a page in docs/defenses/ or docs/attacks/ writes them."""
    return re.sub(r"\]\((?!https?:|#|\.\./)", "](../findings/", text)


def page(plugin: catalog.Plugin, told: list[str]) -> str:
    """All that a plug-in's file says, in one page."""
    kind = plugin.kind[:-1]
    lines = [f"# {plugin.name}", "", prose(plugin.source), "", "```text", plugin.formula, "```", ""]
    lines += ["## What differs from the source, and what to know", "", prose(plugin.notes), ""] if plugin.notes else []
    lines += ["## Facts", "", "| | |", "| --- | --- |"]
    lines += [f"| {fact} | {prose(words)} |" for fact, words in describe.facts(plugin).items()]
    lines += ["", "## Settings", "", *settings(plugin)]
    lines += ["", "## Measured cost", "", *measured(plugin.name)] if plugin.kind == "attacks" else []
    lines += ["", "## Run it", "", "```", describe.example(plugin), "```", ""]
    none = f"[The findings](../findings/README.md) name no result for this {kind} yet."
    lines += ["## Findings", "", *(told or [none]), ""]
    lines += [f"Generated from [{plugin.kind}/{plugin.name}.py](../../{plugin.kind}/{plugin.name}.py) by "
              "`python docs/generate.py`; [all " + plugin.kind + "](README.md)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def settings(plugin: catalog.Plugin) -> list[str]:
    """A table of its fields, and its presets."""
    if not plugin.fields:
        return ["None."]
    lines = [f"Written `--set {plugin.name}.NAME=VALUE`, or under `set:` in a spec.", ""]
    lines += ["| name | default | takes | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{f.name}` | {code(describe.default(f.default))} | {code(describe.values(f))} | {prose(f.doc)} |"
        for f in plugin.fields
    ]
    named = [f"- `preset={name}` stands for `{values}`" for name, values in describe.presets(plugin).items()]
    return [*lines, "", *named] if named else lines


def measured(name: str) -> list[str]:
    """Passes of an attack as the committed records counted them: they depend on no device. Means over models."""
    sums: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    with (ROOT / "results" / "tables" / "timing_attacks.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["attack"].split(" (")[0] == name and row["forwards"]:
                counted = (int(row["models"]), float(row["forwards"]), float(row["backwards"]))
                sums.setdefault((row["attack"], f"{row['dataset']}, {row['model']}, {row['deploys']}"), []).append(
                    counted
                )
    if not sums:
        return ["No committed record counts its passes."]
    lines = [
        "Passes an image in the committed records, mean over models. An image that is wrong already costs little.",
        "",
    ]
    lines += ["| attack | on | models | forward | backward |", "| --- | --- | --- | --- | --- |"]
    for (attack, place), found in sorted(sums.items()):
        models = sum(count for count, _, _ in found)
        means = [sum(each[0] * each[column] for each in found) / models for column in (1, 2)]
        lines.append(f"| {prose(attack)} | {prose(place)} | {models} | {means[0]:.0f} | {means[1]:.0f} |")
    return lines


def index(kind: catalog.Kind) -> str:
    """All plug-ins of a kind, a row each."""
    column = "cost of a step" if kind == "defenses" else "norms"
    lines = [f"# {kind.capitalize()}", "", INTRO[kind], "", f"| name | {column} | what it is |", "| --- | --- | --- |"]
    for name in catalog.names(kind):
        plugin = catalog.get(kind, name)
        norms = ", ".join(plugin.norms)
        middle = plugin.constant("cost", "") if kind == "defenses" else norms
        middle = middle if kind == "defenses" or plugin.uses_threat else "no budget"
        brief = plugin.source[: plugin.source.find(")") + 1] or plugin.source
        lines.append(f"| [{name}]({name}.md) | {prose(middle)} | {prose(brief)} |")
    lines += ["", f"Generated by `python docs/generate.py`; `bench list {kind}` shows the same."]
    return "\n".join(lines) + "\n"


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def top_rows(board: str) -> str:
    """The first rows of one section of leaderboard.md and the undefended row, with the caption of the section."""
    section = board.partition(SECTION[0])[2].partition("\n## ")[0].partition(SECTION[1])[2].partition("\n### ")[0]
    caption, _, rest = section.strip().partition("\n")
    table = [cells(line) for line in rest.partition("<details>")[0].splitlines() if line.startswith("| ")]
    if len(table) < 3:
        raise ValueError(f"leaderboard.md has no table under '{SECTION[0]}', '{SECTION[1]}'")
    header, rule, *rows = table
    for before, row in itertools.pairwise(rows):
        row[0] = before[0] if row[0] == "=" else row[0]
    plain = [row for row in rows if re.match(r"\[?standard\b", row[1])]
    plain = sorted(plain, key=lambda row: row[1] != "standard")[:1]  # not that of an architecture which few rows have
    chosen = rows[:TOP] + [row for row in plain if row not in rows[:TOP]]
    lines = [header, rule, *chosen]
    told = (
        f"{SECTION[0].removeprefix('## ')}: the first {TOP} of {len(rows)} rows of [leaderboard.md](leaderboard.md), "
        f"and `standard`. {caption} See [what a number means](#what-a-number-means)."
    )
    return "\n".join(["", told, "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def between(text: str, name: str, begin: str, end: str, content: str) -> str:
    """The page with new content between two markers. Raises ValueError if it does not hold each of them once."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name} must hold one '{begin}' and then one '{end}'")
    return f"{text.partition(begin)[0]}{begin}\n{content}{end}{text.partition(end)[2]}"


def readme(text: str, board: str) -> str:
    """README.md with the current rows between its markers. Raises ValueError if the markers are not one pair."""
    picture = f"\n![the report: what won, by how much, what is flagged and missing, above the table]({PICTURE})\n"
    seen = picture if (ROOT / PICTURE).exists() else ""
    return between(text, "README.md", BEGIN, END, f"{seen}{top_rows(board)}")


def options() -> str:
    """Every command of the CLI with its help text and a table of its arguments and options, as Markdown."""
    lines: list[str] = []
    group = get_command(cli.app)
    for name in cli.COMMANDS:
        command = group.get_command(None, name)  # type: ignore[attr-defined]
        context = command.make_context(f"bench {name}", [], resilient_parsing=True)
        usage = command.get_usage(context).removeprefix("Usage: ")
        text = " ".join((command.help or "").split())
        lines += ["", f"### bench {name}", "", prose(text), "", "```text", " ".join(usage.split()), "```"]
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        if records:
            lines += ["", "| option | meaning |", "| --- | --- |"]
            lines += [
                f"| {code(' '.join(names.split()))} | {prose(' '.join(text.split()))} |" for names, text in records
            ]
    return "\n".join([*lines, "", ""])


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    told = (ROOT / "docs" / "findings" / "README.md").read_text(encoding="utf-8")
    found: dict[Path, str] = {}
    for kind in KINDS:
        found[ROOT / "docs" / kind / "README.md"] = index(kind)
        for name in catalog.names(kind):
            found[ROOT / "docs" / kind / f"{name}.md"] = page(catalog.get(kind, name), findings(name, told))
    board = (ROOT / "leaderboard.md").read_text(encoding="utf-8")
    cli_page = ROOT / "docs" / "cli.md"
    found[cli_page] = between(cli_page.read_text(encoding="utf-8"), "cli.md", OPTIONS_BEGIN, OPTIONS_END, options())
    found[ROOT / "docs" / "checks.md"] = checks()
    found[ROOT / "CITATION.cff"] = citation((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    found[ROOT / "README.md"] = readme((ROOT / "README.md").read_text(encoding="utf-8"), board)
    return found


def accented(text: str) -> str:
    """A text in which LaTeX writes accents, with the letters themselves: `Schönherr` for `Sch{\\"o}nherr`."""

    def letter(found: re.Match[str]) -> str:
        return unicodedata.normalize("NFC", found[2] + ACCENTS[found[1]])

    return re.sub(r"\{\\([`'^~\"])(\w)\}", letter, text)


def citation(text: str) -> str:
    """CITATION.cff with every paper of methods.bib as a reference, and who implements it."""
    plugins: dict[str, list[str]] = {}
    for kind in KINDS:
        for name in catalog.names(kind):
            for paper in citations.papers(kind, name):
                plugins.setdefault(paper.key, []).append(name)
    head, _, _ = text.partition("references:\n")
    papers = [reference(entry, sorted(set(plugins[entry["key"]]))) for entry in citations.entries()]
    listed = yaml.safe_dump({"references": papers}, allow_unicode=True, sort_keys=False, width=120)
    return head + listed


def reference(entry: dict[str, str], plugins: list[str]) -> dict[str, object]:
    """A paper in the Citation File Format."""
    authors = []
    for name in accented(entry["author"]).split(" and "):
        last, _, first = name.partition(", ")
        authors.append({"family-names": last, "given-names": first} if first else {"name": last})
    kind = "conference-paper" if "booktitle" in entry else "article"
    found: dict[str, object] = {"type": kind, "title": entry["title"].strip("{}"), "authors": authors}
    found["year"] = int(entry["year"])
    venues = {"collection-title": entry.get("booktitle"), "journal": entry.get("journal")}
    found |= {key: value for key, value in venues.items() if value}
    if "eprint" in entry:
        found["identifiers"] = [{"type": "other", "value": f"arXiv:{entry['eprint']}"}]
    return found | {"notes": f"in bench: {', '.join(plugins)}"}


def checks() -> str:
    """The page of the soundness checks, from the catalog."""
    lines = [
        "# Soundness checks",
        "",
        "Symptoms of false robustness. `worst` is the most severe level of a failure: I (information), F (the row is "
        "flagged), U (unsound: not ranked), X (invalid: no number is shown). `bench explain CODE` adds why a failure "
        "matters and what to do; [concepts](concepts.md#verdicts) defines the verdicts.",
        "",
        "| check | measures | threshold | worst | from |",
        "| --- | --- | --- | --- | --- |",
    ]
    for check in CHECKS.values():
        about = (f"{check.code}: {check.title}", check.measures, check.threshold, check.worst, check.source)
        lines.append(f"| {' | '.join(map(prose, about))} |")
    return "\n".join([*lines, ""])


def stale() -> dict[Path, str]:
    """Files that differ from what would be generated; those of plug-ins that are gone have no text."""
    wanted = pages()
    old = {path: "" for kind in KINDS for path in (ROOT / "docs" / kind).glob("*.md") if path not in wanted}
    return old | {p: text for p, text in wanted.items() if not p.exists() or p.read_bytes() != text.encode()}


def main(words: list[str]) -> int:
    """Write, or with --check only say, what differs."""
    if words not in ([], ["--check"]):
        print("error: the only option is --check", file=sys.stderr)
        return 2
    differing = stale()
    for path, text in sorted(differing.items()):
        print(path.relative_to(ROOT).as_posix())
        if not words and text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        elif not words:
            path.unlink()
    return 1 if words and differing else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
