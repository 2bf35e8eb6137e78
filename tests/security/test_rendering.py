"""S5: 500 hostile strings as names, in everything that is rendered: shown as they are, and nothing else."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import fuzzed
import pytest
from factories import evaluated, toy_job, trained
from fuzzed import joined, mark, printable
from harness import Bench
from markdown_it import MarkdownIt
from rich.console import Console

from bench.commands.output import show_table
from bench.planning.job import Job
from bench.records.record import JobError, Provenance, Record
from bench.records.store import Store
from bench.report.page import write_report
from bench.results.evaluations import frame
from bench.tables.latex import latex_text
from bench.tables.leaderboard import write_leaderboard
from bench.tables.markdown import BEGIN, END, escape
from bench.tables.summary import matrix

STRINGS = fuzzed.strings()
ODD = re.compile(r"[^\n\t -~]")


class Outputs(NamedTuple):
    """Every file that is rendered, as text by name, from one store that holds these strings.

    `failed` are errors too; `others` names of data sets, models and attacks too, each of which is a table or a column.
    """

    store: Store
    files: dict[str, str]
    strings: list[str]

    @property
    def failed(self) -> list[str]:
        return self.strings[1::2]

    @property
    def others(self) -> list[str]:
        return self.strings[:: len(self.strings) // 18]


def failed(store: Store, train: Job, message: str) -> None:
    """An evaluation that ended in this message, on a machine of this name."""
    what = {"attack": {"name": "steep", "set": {}, "revision": 1}, "threat": {"norm": "Linf", "eps": "0.1"}}
    job = toy_job("evaluate", {"engine": 2, **what, "n": 2, "seed": 0, "weights": "last"}, (train.key,))
    store.add(job)
    error = JobError(message, message, message)
    store.put(job, Record("error", error=error, provenance=Provenance(device=message)))


@pytest.fixture(scope="module", params=[9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def outputs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outputs:
    """Strings as methods and devices; every second one as an error too, some as all other names."""
    base = tmp_path_factory.mktemp("rendered")
    store = Store(base / "results")
    store.prepare()
    made = Outputs(store, {}, STRINGS[:: request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # thousands of small files; no power fails here
        for number, text in enumerate(made.strings):
            train = trained(store, text, device=text, seconds=float(number + 1))
            evaluated(store, train, "clean", [1, 1])
            if number % 2:
                failed(store, train, text)
            else:
                evaluated(store, train, "steep", [1, 0])
        first = trained(store, "guard")
        for text in made.others:
            evaluated(store, first, text, [1, 0], {"k": text})
            settings = {"defense": {"set": {"k": text}}, "data": {"name": text}, "model": {"name": text}}
            evaluated(store, trained(store, **settings), "steep", [1, 0])  # type: ignore[arg-type]
        written = write_leaderboard(store, base / "leaderboard.md", base / "tables")
        written += write_report(store, base / "report.html")
    made.files.update({path.name: path.read_text(encoding="utf-8") for path in written})
    return made


def test_five_hundred_strings() -> None:
    assert len(set(STRINGS)) == len({mark(text) for text in STRINGS} - {None}) == fuzzed.COUNT == 500


def test_nothing_rendered_steers_a_terminal_or_turns_text(outputs: Outputs) -> None:
    """Line breaks and tabs aside, no file holds a control character, an unpaired surrogate or a change of direction."""
    assert {"leaderboard.md", "leaderboard.csv", "leaderboard.tex", "leaderboard.json", "report.html"} <= set(
        outputs.files
    )
    for name, text in outputs.files.items():
        found = {c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in HIDDEN)}
        assert found == set(), name


HIDDEN = "\u200b\u202a\u202b\u202c\u202d\u202e\u2028\u2029\u2066\u2067\u2068\u2069\ufeff"


def test_markdown_cells_are_text(outputs: Outputs) -> None:
    text = outputs.files["leaderboard.md"]
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert "://" not in re.sub(r"\]\(https://arxiv\.org/abs/\d{4}\.\d{4,5}\)", "", text)
    assert not re.search(r"(?i)\bwww\.", text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").parse(text)
    kinds = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    known = {"heading", "paragraph", "inline", "table", "thead", "tbody", "tr", "th", "td", "bullet_list", "list_item"}
    assert kinds <= known | {"html_block"}
    html = {line for token in tokens if token.type == "html_block" for line in token.content.splitlines()}
    assert html == {BEGIN, END, "<details><summary>All columns</summary>", "</details>"}
    methods, place, widths = [], -1, set()
    shown: dict[str, set[str]] = {"heading": set(), "cell": set(), "item": set()}
    row: list[str] = []
    for before, token in zip([tokens[0], *tokens], tokens, strict=False):
        if token.type == "tr_open":
            row = []
        if token.type == "tr_close":
            widths.add((len(row), place))
        if token.type == "thead_open":
            place += 1
        if token.type != "inline":
            continue
        content = "".join(child.content for child in token.children or [])
        children = token.children or []
        links = [str(child.attrs["href"]) for child in children if child.type == "link_open"]
        assert all(re.fullmatch(r"#\S+|https://arxiv\.org/abs/\d{4}\.\d{4,5}", link) for link in links), links
        ours = (
            {"link_open", "link_close"}
            if links
            else {"strong_open", "strong_close"}
            if mark(content) is None
            else set()
        )
        odd = {child.type for child in children} - {"text", "text_special", "softbreak"} - ours
        assert odd == set() or (odd == {"code_inline"} and mark(content) is None), content
        if before.type in ("td_open", "th_open"):
            row.append(content)
        methods += [content] if before.type == "td_open" and len(row) == 2 else []
        shown["heading" if before.type == "heading_open" else "cell" if before.type[0] == "t" else "item"].add(content)
    assert len(widths) == place + 1  # every line of a table has its number of cells
    labels = {printable(f"guard (k={text})") for text in outputs.others}
    assert {name for name in methods if mark(name)} == {printable(text) for text in outputs.strings} | labels
    for text in outputs.others:
        assert any(part.startswith(printable(text)) for part in shown["heading"]), text
        assert printable(f"{text} (k={text})") in shown["cell"], text
    notes = "\n".join(shown["item"])
    assert all(printable(f"{text}: {text}")[:60] in notes for text in outputs.failed)


def test_csv_cells_are_text_and_no_formulas(outputs: Outputs) -> None:
    tables = {
        name: list(csv.reader(io.StringIO(t, newline=""))) for name, t in outputs.files.items() if name[-4:] == ".csv"
    }
    board = tables["leaderboard.csv"]
    column = board[0].index("method")
    shown = {line[column] for line in board[1:] if mark(line[column])}
    names = {*outputs.strings, *(f"guard (k={text})" for text in outputs.others)}
    assert shown == {escape_csv(text) for text in names}
    for name, lines in tables.items():
        assert len({len(line) for line in lines}) <= 1, name
        for cell in (cell for line in lines for cell in line):
            assert not cell.startswith(tuple("=@＝＋－＠\t\r")), (name, cell)
            assert not cell.startswith(("+", "-")) or re.fullmatch(r"[-+][\d.e+-]+", cell), (name, cell)
    assert {line[0] for line in board[1:]} >= {escape_csv(text) for text in outputs.others}


def escape_csv(text: str) -> str:
    """As the documentation says: blanks, and an apostrophe before what would be a formula."""
    plain = "".join(c if printable(f"x{c}x") == f"x{c}x" else " " for c in text)
    return f"'{plain}" if plain.startswith(tuple("=+-@＝＋－＠")) else plain


MACROS = {
    "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">",
    "textbar": "|", "textasciigrave": "`", "dag": "†", "ddag": "‡",
}  # fmt: skip


def printed(text: str) -> str:
    """What LaTeX prints for a cell. Raises ValueError for anything that is not plain text and the macros above."""
    found, place = "", 0
    while place < len(text):
        macro = re.compile(r"\\([A-Za-z]+)\{\}").match(text, place)
        if macro:
            found += MACROS[macro[1]]
            place = macro.end()
        elif text[place] == "\\" and text[place + 1] in "{}$&#%_":
            found += text[place + 1]
            place += 2
        elif text.startswith("''", place):  # how a straight double quote is set
            found += '"'
            place += 2
        elif text.startswith("-{}", place):
            found += "-"
            place += 3
        elif text.startswith("$\\times$", place) or text.startswith("$\\ast$", place):
            place += text.index("$", place + 1) + 1 - place
        elif text[place] in "\\{}$&#%_~^<>|`\n":
            raise ValueError(f"{text[place:]!r} of {text!r} is syntax")
        else:
            found += text[place]
            place += 1
    return found


@pytest.mark.parametrize("text", STRINGS)
def test_latex_prints_each_string(text: str) -> None:
    expected = "".join(c if printable(f"x{c}x") == f"x{c}x" else " " for c in text).strip()
    quotes = str.maketrans({"'": '"'})  # two apostrophes print as a quote does
    assert joined(printed(latex_text(text)).replace("''", '"').translate(quotes)) == joined(
        expected.replace("''", '"').translate(quotes)
    )


def test_latex_tables_keep_their_shape(outputs: Outputs) -> None:
    lines = [line for line in outputs.files["leaderboard.tex"].split("\n") if line and not line.startswith("%")]
    depth, rows = 0, 0
    for line in lines:
        if line.startswith("\\begin{tabular}"):
            depth += 1
        elif line == "\\end{tabular}":
            depth -= 1
        elif line.startswith("\\caption{"):
            printed(re.sub(r"\\cite\{[a-z0-9,]+\}|\$\\pm\$", "", line.removeprefix("\\caption{").removesuffix("}")))
        elif line.startswith("\\label{"):
            assert re.fullmatch(r"\\label\{tab:[a-z0-9-]+\}", line)
        elif line not in ("\\toprule", "\\midrule", "\\bottomrule", "\\centering", "\\begin{table}", "\\end{table}"):
            body = line.removesuffix(" \\\\")
            assert body != line
            cells = re.split(r"(?<!\\)&", body)
            assert len(cells) == 7, line
            if not body.startswith("Rank"):
                rows += bool(mark(printed(cells[1].strip())))
        assert depth in (0, 1)
    assert depth == 0
    assert rows == len(outputs.strings) + len(outputs.others)


def test_json_holds_each_string_as_it_is(outputs: Outputs) -> None:
    assert outputs.files["leaderboard.json"].isascii()
    entries = json.loads(outputs.files["leaderboard.json"])
    assert {entry["name"] for entry in entries} >= set(outputs.strings)
    assert {entry["dataset"] for entry in entries} >= set(outputs.others)
    assert {entry["link"] for entry in entries} <= {None}


class Page(HTMLParser):
    """Elements, their attributes, and the text of row heads."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.heads: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.head = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open.append(tag)
        if tag == "th":
            self.head = ("scope", "row") in attrs
            self.heads += [""] if self.head else []

    def handle_endtag(self, tag: str) -> None:
        self.head = self.head and tag != "th"
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.text.append(data)
        if self.head:
            self.heads[-1] += data


def test_the_page_shows_each_string_and_runs_nothing(outputs: Outputs) -> None:
    page = Page(outputs.files["report.html"])
    assert (page.tags["script"], page.tags["style"]) == (1, 1)
    assert not {"iframe", "object", "embed", "base", "audio", "video", "foreignobject"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        if name in ("href", "src", "action", "formaction", "xlink:href", "poster", "srcset", "data"):
            assert value.startswith(("#", "data:image/", "data:,")), (tag, name, value)
        if name == "style":
            assert "url(" not in value.replace("url(#", ""), (tag, value)
    assert {joined(head) for head in page.heads if mark(head)} >= {
        joined(printable_html(text)) for text in outputs.strings
    }
    whole = joined("".join(page.text))
    assert all(joined(printable_html(f"{text}: {text}"))[:60] in whole for text in outputs.failed)


def printable_html(text: str) -> str:
    """As `printable`."""
    from bench.terminal import printable

    return printable(text)


def test_figures_are_written_without_a_string_as_markup(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    store.prepare()
    for number, text in enumerate(STRINGS[::70]):
        train = trained(store, text, device=text, seconds=float(number + 1))
        evaluated(store, train, "clean", [1, 1])
        evaluated(store, train, text, [1, 0])
    written = write_report(store, tmp_path / "report.html", tmp_path / "figures")
    drawn = {path.name: path.read_text(encoding="utf-8") for path in written if path.suffix in (".svg", ".csv")}
    assert {name[-4:] for name in drawn} == {".svg", ".csv"}
    assert all(path.resolve().is_relative_to(tmp_path / "figures") for path in written[1:])
    for name, text in drawn.items():
        assert not [c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in HIDDEN)], name
        if name.endswith(".svg"):
            page = Page(text)
            assert not {"script", "a", "image", "foreignobject"} & set(page.tags)
            assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        else:
            cells = [cell for line in csv.reader(io.StringIO(text, newline="")) for cell in line]
            assert not [cell for cell in cells if cell.startswith(tuple("=@＝＋－＠"))]


def safe_stream(text: str) -> None:
    """Nothing but lines of printable characters."""
    assert [c for c in text if c not in "\n\t" and not c.isprintable()] == []


def test_status_names_each_failure_and_steers_nothing(outputs: Outputs, bench: Bench) -> None:
    outcome = bench("status", "--results-dir", outputs.store.root)
    assert outcome.code == 0
    safe_stream(outcome.out)
    whole = joined(outcome.out)
    for text in outputs.failed:
        assert joined(printable(f"{text}: {text}")) in whole, text
    told = json.loads(bench("status", "--json", "--results-dir", outputs.store.root).out)
    assert {one["reason"] for one in told["failed"]} == {f"{text}: {text}" for text in outputs.failed}


def test_timing_and_the_final_table_show_each_string(outputs: Outputs, bench: Bench) -> None:
    outcome = bench("timing", "--results-dir", outputs.store.root)
    assert outcome.code == 0
    safe_stream(outcome.out)
    drawn = Console(file=io.StringIO(), width=4000, emoji=False)
    keys = list(frame(outputs.store)["key"])
    show_table(matrix(outputs.store, keys), drawn)
    assert isinstance(drawn.file, io.StringIO)
    table = drawn.file.getvalue()
    safe_stream(table)
    for text in outputs.strings:
        assert joined(printable(text)) in joined(outcome.out), text
        assert joined(printable(text)) in joined(table), text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A few trainings only, since a comparison reads the whole folder."""
    store = Store(tmp_path_factory.mktemp("pairs") / "results")
    store.prepare()
    for text in STRINGS[:PAIRED]:
        train = trained(store, text, device=text)
        evaluated(store, train, "clean", [1, 1])
        evaluated(store, train, text, [1, 0])
    return store


PAIRED = 24


def test_compare_takes_and_shows_hostile_names(pairs: Store, bench: Bench) -> None:
    for a, b in zip(STRINGS[0:PAIRED:2], STRINGS[1:PAIRED:2], strict=True):
        outcome = bench("compare", "--results-dir", pairs.root, "--", a, b)
        assert outcome.code == 0, outcome.err
        safe_stream(outcome.out)
        assert joined(printable(a)) in joined(outcome.out)
        assert joined(printable(b)) in joined(outcome.out)
        told = json.loads(bench("compare", "--json", "--results-dir", pairs.root, "--", a, b).out)
        assert {(one["a"]["method"], one["b"]["method"]) for one in told} == {(a, b)}


@pytest.mark.parametrize("place", range(0, 500, 10))
def test_messages_about_a_string_are_one_harmless_line(place: int, bench: Bench, pairs: Store) -> None:
    text = STRINGS[place]
    for words in (
        ("plan", f"--defense={text}x"),
        ("plan", f"--dataset={text}"),
        ("compare", f"--results-dir={pairs.root}", "--", f"{text}x", "guard"),
    ):
        outcome = bench(*words)
        assert outcome.code == 2
        safe_stream(outcome.err)
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("error: ")


def test_a_log_cannot_steer_the_terminal(outputs: Outputs, bench: Bench) -> None:
    key = outputs.store.keys()[0]
    (outputs.store.root / key / "log.txt").write_text("".join(outputs.strings), encoding="utf-8", newline="")
    outcome = bench("logs", key, "--results-dir", outputs.store.root)
    assert outcome.code == 0
    safe_stream(outcome.out)
    assert all(marked in outcome.out for marked in map(mark, outputs.strings) if marked)


def test_markdown_escape_of_each_string_is_one_line() -> None:
    for text in STRINGS:
        assert "\n" not in escape(text)
        assert not ODD.search("".join(c for c in escape(text) if ord(c) < 128))
