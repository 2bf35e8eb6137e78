"""Rows -> Markdown and CSV. Text is generated only: equal records give equal bytes, and no time stamps get in."""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench import catalog, export, measures, timing
from bench.frame import frame
from bench.marks import checks_lines, flags, hide_invalid, legend, ranked, reasons, unreliable
from bench.rows import RADII, Row, failures
from bench.rows import rows as rows_of
from bench.store import Store, write_atomic
from bench.verdicts import judged
from bench.worst import MEDIAN, Cell

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEAD = "# Leaderboard\n\nWritten by `bench leaderboard`: text between the markers is replaced, the rest is kept.\n\n"
INTRO = (
    "Accuracies in percent. Best known robust accuracy is the worst case per image over clean and every attack run at "
    "this eps, on the first n test images that all of them share; its interval is the 95 % Wilson interval at that n. "
    "Rows share a rank unless the best row of that rank is significantly better on the same images (exact McNemar test "
    "at 5 %; with several seeds, a bootstrap over images). "
    "A cell without a number says why; such a cell never counts as robust. Verdict: OK is no known symptom of false "
    "robustness, never a proof; FLAG is ranked with ⚑; UNSOUND stands last without a rank; INVALID holds no number; "
    "NOT CHECKED lacks an audit of the model or of the stored images. checks.csv holds every finding of every row."
)
SECTIONS = {"deterministic": "Deterministic", "randomised": "Randomised at test time", "smoothed": "Certified"}
LONGEST_VENUE = 120
_FORMULA = tuple("=+-@＝＋－＠")  # what a spreadsheet may take for a formula at the start of a cell


def escape(text: str) -> str:
    """Text as one Markdown table cell: nothing in it is syntax, HTML or a line break."""
    marked = re.sub(r"([\\`*_~\[\]|$#])", r"\\\1", _visible(text).replace("&", "&amp;"))
    marked = marked.replace("://", "&#58;//")  # GitHub would make a link of it
    marked = re.sub(r"(?i)\b(www)\.", r"\1&#46;", marked)
    return marked.replace("<", "&lt;").replace(">", "&gt;").strip()


def _visible(text: str) -> str:
    """Blanks for control characters, unpaired surrogates, and what turns the direction of the text behind it."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def _item(text: str) -> str:
    """Text as one item of a list: it begins no list, number or rule of its own."""
    return "- " + re.sub(r"^(\d*)([-+.)])", r"\1\\\2", escape(text))


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with every cell escaped."""
    rule = ["---"] * len(header)
    cells = [[escape(cell) for cell in header], rule, *([escape(cell) for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key by which `cifar10` stands before `cifar100`, and 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p.lower()) for p in parts]


def sections(rows: list[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Rows by (dataset, threat), in natural order, and by kind of predictor."""

    def order(row: Row) -> tuple[list[tuple[int, int, str]], str, float]:
        return natural(row.dataset), row.norm or "", row.eps_value if row.norm else 0.0

    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=order):
        threat = f"{row.norm} eps = {row.eps}" if row.norm else "no attack"
        kinds = found.setdefault((row.dataset, threat), {kind: [] for kind in SECTIONS})
        kinds[row.deploys if row.deploys in kinds else "deterministic"].append(row)
    return found


def markdown(store: Store) -> str:
    """The generated part of leaderboard.md, without the markers: a function of the records alone."""
    table = tested(frame(store))
    return _block(judged(store, rows_of(store, table)), list(table[table["config"].isna()]["key"]))


def board(store: Store) -> list[Row]:
    """The rows of leaderboard.md, judged."""
    return judged(store, rows_of(store, tested(frame(store))))


def tested(table: pd.DataFrame) -> pd.DataFrame:
    """Without what was judged on validation images: settings were chosen by these, so no rank can rest on them."""
    return table[table["split"].fillna("test") == "test"]


def write_leaderboard(
    store: Store, path: Path, csv_dir: Path | None = None, radii: Iterable[float] = RADII
) -> list[Path]:
    """Rewrite the marked part of `path`, evaluations.csv, leaderboard.csv and a table of each evaluation that measures
    something else than robustness, what things cost, and leaderboard.tex and .json; gives what was written.

    `radii`: L2 radii of the columns of certified accuracy.
    Raises ValueError where the file's markers are not one pair.
    """
    if csv_dir is not None and csv_dir.is_symlink():
        raise ValueError(f"{csv_dir} is a link; results hold real files only. Remove it")
    table = frame(store)
    judged_on_test = tested(table)
    found = judged(store, rows_of(store, judged_on_test, radii))
    block = _block(found, list(judged_on_test[judged_on_test["config"].isna()]["key"]))
    written = [_write(path, replace_block(path, block))]
    if csv_dir is not None:
        filled = table.astype(object).where(table.notna(), None)
        evaluations = [{str(k): v for k, v in e.items()} for e in filled.to_dict("records")]
        hide_invalid(evaluations, found)
        placed = [(d, kind, row) for (d, _), kinds in sections(found).items() for kind in kinds for row in kinds[kind]]
        tables = {"evaluations": evaluations, "leaderboard": flat(found), "checks": checks_lines(placed)}
        tables |= {
            "timing": timing.lines(timing.trainings(found)),
            "timing_attacks": timing.lines(timing.attacks(found)),
        }
        tables |= measures.by_attack(store, table)
        written += [_write(csv_dir / f"{name}.csv", csv_text(content)) for name, content in tables.items()]
        placed_rows = sections(found)
        written.append(_write(csv_dir / "leaderboard.tex", export.latex(placed_rows)))
        written.append(_write(csv_dir / "leaderboard.json", export.robustbench(placed_rows)))
    return written


def _block(rows: list[Row], unreadable: list[str]) -> str:
    parts = [INTRO, ""]
    if not rows:
        parts += ["No evaluations yet.", ""]
    for (dataset, threat), kinds in sections(rows).items():
        parts += [f"## {escape(dataset)}, {escape(threat)}", ""]
        for kind, members in kinds.items():
            if members:
                parts += [f"### {SECTIONS[kind]}", "", *_subsection(members)]
    if unreadable:
        parts += [f"Job folders that cannot be read and are in no table: {', '.join(unreadable)}.", ""]
    return "\n".join(parts)


def _subsection(rows: list[Row]) -> list[str]:
    letters = provisional_letters(rows)
    shown = columns(rows, letters)
    lines = [[rank, *(show(row) for show in shown.values())] for rank, row in ranked(rows)]
    parts = [table(["Rank", *shown], lines)]
    if letters:
        parts += ["† order provisional: " + "; ".join(f"{v} = {escape(k)}" for k, v in letters.items()) + ".", ""]
    if any(row.shared for row in rows):
        parts += ["‡ trained while the machine did other jobs: not comparable with other times.", ""]
    if any(cell.distance for row in rows for cell in row.attacks.values()):
        parts += [f"{MEDIAN[0].upper()}{MEDIAN[1:]}.", ""]
    asked = [_item(line) for line in legend(rows)]
    parts += ["Flagged checks and what they ask for (`bench explain CODE` says more):", "", *asked, ""] if asked else []
    notes = [*reasons(rows), *failures(rows)]
    return [*parts, *(_item(line) for line in notes), ""] if notes else parts


def provisional_letters(rows: list[Row]) -> dict[str, str]:
    """A letter for each reason why a row of this table has no rank."""
    letters: dict[str, str] = {}
    for row in rows:
        for reason in row.provisional:
            letters.setdefault(reason, chr(ord("a") + len(letters)) if len(letters) < 26 else f"r{len(letters)}")
    return letters


def columns(rows: list[Row], letters: dict[str, str]) -> dict[str, Callable[[Row], str]]:
    """RobustBench's columns in its order, then ours."""
    shown: dict[str, Callable[[Row], str]] = {
        "Method": lambda row: row.method,
        "Standard accuracy": lambda row: cell_text(row, row.clean),
        "AutoAttack robust accuracy": lambda row: cell_text(row, row.autoattack),
        "Best known robust accuracy": lambda row: cell_text(row, row.worst),
        **({"Single draw": lambda row: cell_text(row, row.single)} if any(r.single.values for r in rows) else {}),
        "AA eval. potentially unreliable": unreliable,
        "Extra data": lambda row: "✗",
        "Architecture": lambda row: row.model,
        "Venue": lambda row: venue(row.defense),
        "Verdict": lambda row: row.verdict,
        "Flags": flags,
        "95 % interval": _interval_text,
    }
    # the AutoAttack column has shown its cells already
    own = {name for row in rows for name, cell in row.attacks.items() if cell is not row.autoattack}
    for name in sorted(own, key=natural):
        shown[name] = lambda row, name=name: cell_text(row, row.attacks.get(name))  # type: ignore[misc]
    for radius in sorted({radius for row in rows for radius in row.certified}):
        shown[f"certified at L2 {radius:g}"] = lambda row, r=radius: cell_text(row, row.certified.get(r))  # type: ignore[misc]
    if any(row.certified for row in rows):
        shown["average certified L2 radius"] = lambda row: cell_text(row, row.acr, "{:.3f}".format)
    return shown | {
        "n": lambda row: str(row.worst.n) if row.worst.values else "–",
        "Seeds": _seeds_text,
        "Train eps": lambda row: row.train_eps,
        "Training s (× standard)": _time_text,
        "Recipe": _recipe,
        "Device": lambda row: row.device,
        "Commit": lambda row: row.commit,
        "Provisional": lambda row: ", ".join(letters[reason] for reason in row.provisional) or "no",
    }


def _recipe(row: Row) -> str:
    return row.recipe if row.recipe == "imported" else f"{row.recipe}, {row.epochs} epochs"


def venue(defense: str) -> str:
    """The paper a defense comes from: what its file says before the first colon."""
    try:
        return catalog.get("defenses", defense).source.partition(":")[0][:LONGEST_VENUE] or "–"
    except (LookupError, ValueError):  # records outlive plug-ins
        return "unknown"


def percent(share: float) -> str:
    """0.4512 -> '45.12'."""
    return f"{100 * share:.2f}"


def cell_text(row: Row, cell: Cell | None, show: Callable[[float], str] = percent) -> str:
    """The number with all that qualifies it, or why there is none."""
    if cell is None or not cell.values:
        return cell.state() if cell else "not run"
    # against noise AutoAttack runs its suite `rand`, whatever was asked for
    notes = ["rand"] if cell is row.autoattack and row.deploys != "deterministic" else []
    notes += [cell.median()] if cell.distance else []
    notes += [f"std {show(cell.std)}"] if len(cell.values) > 1 else []
    if cell.n != row.worst.n or not row.worst.values:
        notes.append(f"n={cell.n}")
    if cell is not row.worst and len(cell.values) < len(row.seeds):
        notes.append(f"{len(cell.values)}/{len(row.seeds)} seeds")
        notes += [cell.state()] if cell.absent else []
    return show(cell.mean) + (f" ({', '.join(notes)})" if notes else "")


def _interval_text(row: Row) -> str:
    low, high = row.worst.interval()
    return f"{percent(low)} to {percent(high)}" if row.worst.values else "–"


def _seeds_text(row: Row) -> str:
    """done/planned, the worst case of each seed where there are several, and which seeds collapsed."""
    if row.verdict == "INVALID":
        return "–"
    text = f"{len(row.worst.values)}/{len(row.seeds)}"
    if len(row.worst.values) > 1:
        text += " (" + ", ".join(f"{seed}: {percent(value)}" for seed, value in sorted(row.worst.values.items())) + ")"
    collapsed = ", ".join(map(str, row.collapsed))
    return text + (f", {len(row.collapsed)} collapsed (seed {collapsed})" if collapsed else "")


def _time_text(row: Row) -> str:
    if math.isnan(row.train_seconds):
        return "–"
    ratio = "" if math.isnan(row.ratio) else f" ({row.ratio:.2f}×)"
    return f"{row.train_seconds:.1f}{ratio}{' ‡' if row.shared else ''}"


def flat(rows: list[Row]) -> list[dict[str, object]]:
    """Rows for leaderboard.csv: shares in [0,1], or the state as text; `seed_values` are worst cases by seed."""
    lines: list[dict[str, object]] = []
    for (dataset, _), kinds in sections(rows).items():
        for kind, members in kinds.items():
            for rank, row in ranked(members):
                low, high = row.worst.interval()
                seeds = " ".join(f"{seed}:{value}" for seed, value in sorted(row.worst.values.items()))
                line = {
                    "dataset": dataset, "norm": row.norm, "eps": row.eps, "section": kind, "rank": rank,
                    "method": row.method, "model": row.model, "clean": _value(row.clean),
                    "autoattack": _value(row.autoattack), "worst_case": _value(row.worst),
                    "single_draw": row.single.mean, "low": low, "high": high,
                    "std": row.worst.std, "n": row.worst.n, "seeds_done": len(row.worst.values),
                    "seeds_planned": len(row.seeds), "seed_values": seeds, "collapsed": len(row.collapsed),
                    "verdict": row.verdict, "flags": flags(row), "aa_unreliable": unreliable(row),
                    "train_eps": row.train_eps, "train_seconds": row.train_seconds, "ratio_to_standard": row.ratio,
                    "machine_shared": row.shared, "recipe": row.recipe, "epochs": row.epochs, "device": row.device,
                    "commit": row.commit, "provisional": "; ".join(row.provisional),
                }  # fmt: skip
                attacks = {f"attack {name}": _value(cell) for name, cell in row.attacks.items()}
                radii = {f"certified L2 {radius:g}": _value(cell) for radius, cell in row.certified.items()}
                acr = {"average certified L2 radius": _value(row.acr)} if row.certified else {}
                lines.append({**line, **attacks, **radii, **acr})
    return lines


def _value(cell: Cell) -> float | str:
    return cell.mean if cell.values else cell.state()


def csv_text(lines: list[dict[str, object]]) -> str:
    """CSV with the union of the columns in order of appearance; no cell starts a spreadsheet formula."""
    header = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_harmless(name) for name in header])
    writer.writerows([[_harmless(line.get(name)) for name in header] for line in lines])
    return file.getvalue()


def _harmless(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    text = _visible(str(value))
    return f"'{text}" if text[:1] in _FORMULA and not isinstance(value, (int, float)) else text


def replace_block(path: Path, block: str) -> str:
    """The file's text with `block` between the markers. Raises ValueError where the markers are not one pair."""
    text = path.read_bytes().decode("utf-8") if path.exists() else HEAD
    begin, end = text.count(BEGIN), text.count(END)
    if (begin, end) == (0, 0):
        text = f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{BEGIN}{END}\n"
    elif (begin, end) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold one '{BEGIN}' and then one '{END}'; found {begin} and {end}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}{END}{rest.partition(END)[2]}"


def _write(path: Path, text: str) -> Path:
    """Write atomically, making the folder; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.encode()))
    return path
