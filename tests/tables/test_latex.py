"""The tables of a paper: no name is syntax, each method has its papers, and the best number is bold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from factories import STANDARD, all_rows, evaluated, full, trained
from harness import Bench

from bench.records.store import Store
from bench.tables import citations
from bench.tables.latex import latex, latex_text
from bench.tables.sections import sections

HOSTILE = [
    "\\input{/etc/passwd}", "\\write18{rm}", "50% off", "a & b \\\\ c", "$x$", "#1", "a_b^c~d", "{", "}", "a\nb",
    "[1ex]",
    '"quoted"', "<script>alert(1)</script>", "=1+1", "\u202egnihsif", "\u2028line", "\x1b[2J", "`tick`", "|x|",
]  # fmt: skip


def cells(text: str) -> list[list[str]]:
    return [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]


def test_a_table_has_display_names_papers_bold_numbers_caption_and_label(store: Store) -> None:
    full(store, trained(store, "trades", defense={"set": {"beta": 3.0}}), 400)
    full(store, trained(store, "noisy_vote"), 300)
    text = latex(sections(all_rows(store)))
    assert cells(text) == [
        ["Rank", "Method", "Clean", "AutoAttack", "Robust", "$n$", "Verdict"],
        ["1", r"TRADES (beta=3)~\cite{zhang2019theoretically}", r"\textbf{100.0}", r"\textbf{40.0}",
         r"\textbf{40.0} $\pm$ 3.0", "1000", "NOT CHECKED"],
        ["2", r"Noise injection~\cite{arous2023may,cohen2019certified}", r"\textbf{100.0}", "30.0",
         r"30.0 $\pm$ 2.8", "1000", "NOT CHECKED"],
    ]  # fmt: skip
    assert [text.count(part) for part in (r"\begin{table}", r"\end{table}", r"\toprule", r"\midrule")] == [1] * 4
    assert r"\label{tab:toy-linf-eps-0-1-deterministic}" in text
    (caption,) = re.findall(r"^\\caption\{(.*)\}$", text, flags=re.MULTILINE)
    assert caption.startswith("toy, Linf eps = 0.1, deterministic: accuracy in percent.")
    assert r"$\pm$ half the 95 \% Wilson interval" in caption
    assert r"AutoAttack: \cite{croce2020reliable}." in caption


def test_columns_are_chosen_by_name_also_attacks(store: Store, bench: Bench) -> None:
    train = trained(store, workers=2)
    evaluated(store, train, "clean", [1] * 8 + [0] * 2)
    evaluated(store, train, "steep", [1] * 5 + [0] * 5, {"a": 1, "b": 2})
    evaluated(store, train, "autoattack", [1] * 4 + [0] * 6, STANDARD)
    words = ("leaderboard", "--latex", "--results-dir", store.root, "--bib", "papers.bib", "--columns")
    found = bench(*words, "method, steep (a=1, b=2),seconds,seeds")
    assert (found.code, cells(found.out)) == (0, [
        ["Method", "steep (a=1, b=2)", "Training s", "Seeds"], ["guard", r"\textbf{50.0}", r"10.0 \ddag{}", "1/1"],
    ])  # fmt: skip
    assert r"\ddag{} trained while the machine did other jobs" in found.out
    assert Path("papers.bib").read_text(encoding="utf-8") == citations.bibtex()
    assert not Path("leaderboard.md").exists()
    refused = bench(*words, "method,cleam")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "no column 'cleam'. Did you mean 'clean'? Known: rank, method" in refused.err


def test_what_is_no_number_is_never_bold_and_an_unsound_row_neither(store: Store) -> None:
    evaluated(store, trained(store), "steep", state="error", n=10)
    text = latex(sections(all_rows(store)))
    assert cells(text)[1][2:6] == ["not run", "not run", "incomplete", "--"]
    assert r"\textbf" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_syntax(store: Store, name: str) -> None:
    evaluated(store, trained(store, name, model={"name": name}, data={"name": name}), "steep", [1, 0])
    text = latex(sections(all_rows(store)))
    body = [line for line in text.splitlines() if line and not line.startswith("%")]
    assert len(body) == 12  # no line break gets in, and none is hidden in a comment
    row = body[8]
    assert row.count(" & ") == 6
    assert row.endswith(r" NOT CHECKED \\")
    assert not row.startswith("[")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a_b 5%", r"a\_b 5\%"),
        ("\\x{y}", r"\textbackslash{}x\{y\}"),
        ("#1 & $2^~", r"\#1 \& \$2\textasciicircum{}\textasciitilde{}"),
        ("1† ⚑", r"1\dag{} $\ast$"),
        ("a\nb\x00c\u202ed", "a b c d"),
    ],
)
def test_latex_prints_text_as_it_is(text: str, printed: str) -> None:
    assert latex_text(text) == printed


DOCUMENT = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage{booktabs}
\begin{document}
\input{table}
\nocite{*}
\bibliographystyle{plain}
\bibliography{papers}
\end{document}
"""


@pytest.mark.skipif(not (shutil.which("pdflatex") and shutil.which("bibtex")), reason="no LaTeX on this machine")
def test_tables_and_papers_compile(store: Store, tmp_path: Path) -> None:
    full(store, trained(store, "trades", defense={"set": {"beta": 3.0}}), 400)
    full(store, trained(store, "mart"), 300)
    for name in HOSTILE:
        evaluated(store, trained(store, name, model={"name": name}, data={"name": name}), "steep", [1, 0])
    (tmp_path / "table.tex").write_text(latex(sections(all_rows(store))), encoding="utf-8")
    (tmp_path / "papers.bib").write_text(citations.bibtex(), encoding="utf-8")
    (tmp_path / "document.tex").write_text(DOCUMENT, encoding="utf-8")
    for words in (["pdflatex"], ["bibtex"], ["pdflatex"], ["pdflatex"]):
        options = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"] * (words[0] == "pdflatex")
        done = subprocess.run([*words, *options, "document"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "Warning--" not in done.stdout  # of BibTeX: a field or an entry is missing
    log = (tmp_path / "document.log").read_text(encoding="latin-1")
    assert "undefined" not in log  # citations
    assert "Missing character" not in log
