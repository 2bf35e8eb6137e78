"""The page: everything is a function of the records, so that equal records give equal bytes."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.atomic import write_atomic
from bench.records.store import Store
from bench.report.board import boards
from bench.report.gallery import Group, groups
from bench.report.images import Fetch, nothing
from bench.report.provenance import origins
from bench.report.text import number, plain
from bench.results.evaluations import evaluations
from bench.soundness.catalog import CHECKS
from bench.soundness.verdicts import judged_rows

if TYPE_CHECKING:
    from jinja2 import Environment


def write_report(store: Store, output: Path, figures: Path | None = None, fetch: Fetch = nothing) -> list[Path]:
    """Write the page, and with `figures` each figure as SVG, PNG and CSV there; gives what was written.

    `fetch`: where adversarial images come from (see `bench.commands.pictures`).
    """
    text, sections = _made(store, fetch)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, lambda file: file.write(text.encode()))
    plots = [plot for group in sections for plot in group.plots] if figures is not None else []
    return [output, *(path for plot in plots if figures is not None for path in plot.write(figures))]


def html(store: Store, fetch: Fetch = nothing) -> str:
    """The page's text."""
    return _made(store, fetch)[0]


def _made(store: Store, fetch: Fetch) -> tuple[str, list[Group]]:
    store = store.snapshot()
    known = evaluations(store)
    found = judged_rows(store, known=known)
    placed = boards(found)
    sections = groups(store, placed, found, known.of_split("test"), fetch)
    style, script = (_part(name) for name in ("page.css", "page.js"))
    sources, done = origins(store), sum(e.state == "done" for e in known.readable)
    environment = _environment()
    environment.filters["places"] = sources.places
    text = environment.get_template("page.html.j2").render(
        boards=placed,
        figures=sections,
        checks=CHECKS,
        origins=sources,
        unreadable=known.unreadable,
        counts={"evaluations": len(known.readable) + len(known.unreadable), "done": done, "rows": len(found)},
        style=style,
        script=script,
        policy=_policy(style, script),
    )  # fmt: skip
    return text, sections


def _environment() -> Environment:
    """Templates of this package; every value is escaped, and every name must be known."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else plain(value) if isinstance(value, str) else value

    environment = Environment(
        loader=PackageLoader("bench.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["ours"] = Markup  # for files of this package alone, never for text of a record
    return environment


def _part(name: str) -> str:
    return files("bench.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is fetched, and no script or style runs but the two of this package, told by their hashes."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
