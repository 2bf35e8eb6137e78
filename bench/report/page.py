"""The page is a function of the records: equal records give equal bytes."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bench.atomic import write_atomic
from bench.records.store import Store
from bench.report.board import boards
from bench.report.canvas import Plot
from bench.report.captions import number
from bench.report.gallery import groups
from bench.report.images import Fetch, no_images
from bench.report.provenance import origins
from bench.results.evaluations import evaluations
from bench.results.labels import left_out
from bench.soundness.catalog import CHECKS
from bench.soundness.verdicts import judged_rows
from bench.terminal import printable


def write_report(store: Store, output: Path, figures: Path | None = None, fetch: Fetch = no_images) -> list[Path]:
    """Write the page, and each figure as SVG, PNG and CSV into the folder `figures`; returns the files written.

    `fetch`: where adversarial images come from (see `bench.commands.report_images`).
    """
    text, plots = render(store, fetch)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, lambda file: file.write(text.encode()))
    return [output, *(path for plot in plots if figures is not None for path in plot.write(figures))]


def render(store: Store, fetch: Fetch = no_images) -> tuple[str, list[Plot]]:
    """The text of the page, and its figures."""
    store = store.snapshot()
    known = evaluations(store)
    rows, known = judged_rows(store, known=known), known.at(store.scope)
    tables, sources = boards(rows), origins(store)
    sections = groups(store, tables, rows, known.of_split("test"), fetch)
    style, script = (files("bench.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    environment = _environment()
    environment.filters["positions"] = sources.positions
    text = environment.get_template("page.html.j2").render(
        boards=tables,
        groups=sections,
        checks=CHECKS,
        origins=sources,
        unreadable=known.unreadable,
        notes=left_out(store, known.readable, rows),
        counts={
            "evaluations": sum(e.state != "missing" for e in known.readable) + len(known.unreadable),
            "done": sum(e.state == "done" for e in known.readable),
            "rows": len(rows),
        },
        style=style,
        script=script,
        policy=_policy(style, script),
    )
    return text, [plot for section in sections for plot in section.plots]


def _environment() -> Environment:
    """Templates of this package; every value is escaped, and an unknown name is an error."""

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("bench.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["trusted"] = Markup  # for files of this package alone, never for text of a record
    return environment


def _policy(style: str, script: str) -> str:
    """Content policy: nothing is fetched, and only the style and the script of this package, by their hashes, apply."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
