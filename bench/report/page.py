"""The page is a function of the records: equal records give equal bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from bench.atomic import write_atomic
from bench.records.store import Store
from bench.report.board import boards
from bench.report.canvas import SHADES, Plot
from bench.report.captions import number
from bench.report.gallery import groups, tabs_of
from bench.report.heatmap import WHITE_BELOW
from bench.report.images import Fetch, no_images
from bench.report.provenance import origins
from bench.report.summary import summary
from bench.results.evaluations import evaluations
from bench.results.labels import left_out
from bench.soundness.catalog import CHECKS
from bench.soundness.verdicts import VERDICTS, judged_rows
from bench.terminal import printable

Say = Callable[[str], None]


def write_report(
    store: Store, output: Path, figures: Path | None = None, fetch: Fetch = no_images, say: Say = lambda text: None
) -> list[Path]:
    """Write the page, and each figure as SVG, PNG and CSV into the folder `figures`; returns the files written.

    `fetch`: where adversarial images come from (see `bench.commands.report_images`); `say` is told what is being done.
    """
    text, plots = render(store, fetch, say)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, lambda file: file.write(text.encode()))
    written = [output]
    for k, plot in enumerate(plots, 1):
        if figures is not None:
            say(f"writing files of figure {k} of {len(plots)}")
            written += plot.write(figures)
    return written


def render(store: Store, fetch: Fetch = no_images, say: Say = lambda text: None) -> tuple[str, list[Plot]]:
    """The text of the page, and its figures."""
    say("reading records")
    store = store.snapshot()
    known = evaluations(store)
    rows, known = judged_rows(store, known=known), known.at(store.scope)
    tables, sources = boards(rows), origins(store)
    say("drawing figures")
    found = groups(store, tables, rows, known.of_split("test"), fetch)
    style, script = (files("bench.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    style += "".join(f".h{k}{{{_shade(k / SHADES)}}}\n" for k in range(SHADES + 1))
    plots = [plot for group in found for plot in group.plots]
    drawn = [plot.name for plot in plots if not (plot.shades or plot.strips)]

    def svg(plot: Plot) -> Markup:
        say(f"writing figure {drawn.index(plot.name) + 1} of {len(drawn)}")
        return Markup(plot.svg())

    environment = _environment()
    environment.filters |= {"positions": sources.positions, "svg": svg, "summary": summary}
    text = environment.get_template("page.html.j2").render(
        datasets=tabs_of(tables, found),
        leads=[group.lead for group in found if group.lead],
        checks=CHECKS,
        verdicts=VERDICTS,
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
    return text, plots


def _shade(share: float) -> str:
    """The color of a cell, and black or white, whichever is read better on it."""
    color = colormaps["cividis"](share)
    return f"background:{to_hex(color)};color:{'#fff' if share < WHITE_BELOW else '#000'}"


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
