"""The page: a function of the records, self-contained, with every name escaped."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import STANDARD, STEPS, audited, evaluated, full, train_job, trained
from harness import Bench
from report_page import Page, all_judged, html, log, matrix

from bench.core.stats import wilson
from bench.records.store import Store
from bench.report.board import boards
from bench.report.heatmap import class_maps, heat_maps
from bench.report.lines import certified_curves, eps_curves
from bench.report.page import render, write_report
from bench.report.scatter import clean_against_robust, cost_against_robust
from bench.report.summary import summary
from bench.report.sweeps import map_plot, sweep_plot
from bench.results.seed_values import MEDIAN
from bench.soundness.checks import Finding
from bench.tables.equivalence import matches
from bench.tables.leaderboard import markdown
from bench.tables.pareto import pareto
from bench.tables.selection import RowFilter
from bench.tables.sweep import sweep

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1); //",
    "</style></script><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "$\\frac{1}{0}$ & &lt;b&gt; `x` |",
    "javascript:alert(1)",
)


def test_the_command_writes_one_file(store: Store, tmp_path: Path, bench: Bench) -> None:
    matrix(store)
    target = tmp_path / "new" / "page.html"
    outcome = bench("report", "--results-dir", store.root, "--output", target)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == [str(target)]
    assert list(target.parent.iterdir()) == [target]
    refusal = bench("report", "--results-dir", tmp_path / "nowhere")
    assert (refusal.code, refusal.err.count("\n")) == (2, 1)


def test_equal_records_give_equal_bytes(store: Store) -> None:
    matrix(store)
    assert html(store) == html(Store(store.root))


def test_the_page_of_an_empty_folder_states_it(store: Store) -> None:
    assert "No evaluations yet." in html(store)


def test_the_content_policy_allows_only_the_packages_style_and_script(store: Store) -> None:
    matrix(store)
    text = html(store)
    page = Page(text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (content,) = page.raw[kind]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert parts[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], tag
        for name in ("href", "src", "xlink:href", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import", text)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_literally(store: Store, name: str) -> None:
    matrix(store, name)
    hostile, harmless = Page(html(store)), {tag for tag, _ in Page(html(Store(store.root / "none"))).tags}
    assert name in "".join(hostile.text)
    assert len(hostile.all("script")) == len(hostile.all("style")) == 1
    assert not {"img"} & ({tag for tag, _ in hostile.tags} - harmless)
    assert not [attrs for _, attrs in hostile.tags if {"onerror", "onload"} & set(attrs)]


def test_invisible_and_direction_changing_characters_become_blanks(store: Store) -> None:
    matrix(store, "gu\u202eard\x00\x1b[31m\u2028")
    text = html(store)
    assert not set("\u202e\x00\x1b\u2028") & set(text)
    assert "gu ard" in text


def test_every_evaluation_links_to_its_record(store: Store) -> None:
    matrix(store)
    page = Page(html(store))
    places = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(places) == len(set(places))
    targets = {attrs["href"] for attrs in page.all("a")}
    assert {str(target)[1:] for target in targets} <= set(places)
    keys = {
        f"#k-{key}"
        for row in all_judged(store)
        for by in row.provenance.entries.values()
        for key in [e.key for e in by.values()]
    }
    assert len(keys) > 10
    assert keys <= targets


def test_a_board_equals_the_leaderboard(store: Store) -> None:
    matrix(store)
    first, second, third = boards(all_judged(store))
    assert [(b.threat, b.kind) for b in (first, second, third)] == [
        ("Linf eps = 0.1", "Deterministic"),
        ("Linf eps = 0.1", "Randomized at test time"),
        ("Linf eps = 0.2", "Deterministic"),
    ]
    guard = first.lines[0]
    low, high = wilson(410, 1000)
    assert guard.row.defense == "guard"
    assert (guard.rank, guard.clean.text, guard.robust.text, guard.size) == ("1", "100.0", "41.0", "1000 × 2")
    assert guard.bar == [f"{100 * low:.1f}", "41.0", f"{100 * high:.1f}", "100.0"]
    assert dict(zip(first.header, guard.more, strict=True))["steep (steps=40)"] == "41.10 (std 1.41)"
    assert not {"Method", "Seeds", "n"} & set(first.header)
    suite = next(name for name in guard.row.accuracy.attacks if name.startswith("autoattack"))
    shown = {(e.attack_label, e.seed): (result, e.n, e.eps) for e, result in guard.evidence}
    assert shown[suite, 0] == ("40.00 [37.01, 43.07]", 1000, "0.1")
    assert shown["clean", 1][2] is None
    failed = next(line for line in first.lines if line.row.defense == "standard")
    assert [result for e, result in failed.evidence if e.attack == "onestep"] == ["error"]


def test_an_invalid_row_shows_no_number(store: Store) -> None:
    full(store, trained(store), 437)
    (row,) = all_judged(store)
    object.__setattr__(row, "verdict", "INVALID")
    object.__setattr__(row, "findings", (Finding("C1", "X", note="why"),))
    (board,) = boards([row])
    assert {result for _, result in board.lines[0].evidence} == {"invalid"}
    assert [f.note for f in board.lines[0].findings] == ["why"]


def test_where_the_machine_was_busy_cost_is_work(store: Store) -> None:
    for name, work, model in (("standard", 3.0, "tiny"), ("guard", 9.0, "tiny"), ("late", 6.0, "wide")):
        own = {"seconds": 7.0, "workers": 3, "metrics": {"work_per_image_f": work}, "model": {"name": model}}
        full(store, trained(store, name, **own), 500)
    found = boards(all_judged(store))
    (plot,) = cost_against_robust(found)
    assert plot.header[2] == "Work of the training (F per training image)"
    of_2_epochs = {"standard": 6.0, "guard": 18.0, "late, wide": 12.0}
    assert {line[1]: line[2] for line in plot.lines} == of_2_epochs
    assert "work stands in place of time" in plot.caption
    assert {line.name: line.cost.text for line in found[0].lines} == {
        "standard": "3.0 F", "guard": "9.0 F", "late, wide": "6.0 F",
    }  # fmt: skip


def test_symbols_are_explained_below_the_table_as_in_the_leaderboard(store: Store) -> None:
    full(store, trained(store, "alone"), 500)
    page = " ".join(Page(html(store)).text)
    assert not re.search("‡|leaves less|Median:", page)
    full(store, trained(store, "crowded", workers=3), 400)
    distance = {"distance": np.full(1000, 0.25, np.float32), "clean": np.ones(1000, bool)}
    evaluated(store, trained(store, "alone"), "minnorm", [1, 0] * 500, columns=distance)
    few = trained(store, "few")
    evaluated(store, few, "steep", [1] * 10)
    evaluated(store, few, "onestep", [1] * 10 + [0] * 990)
    page, told = " ".join(Page(html(store)).text), markdown(store)
    assert "10.0 ‡" in page
    shared = "‡ not comparable with other times: the machine did other jobs meanwhile."
    below = "one attack on more images leaves less: few 100.00 on 10, 1.00 by onestep alone on 1000"
    for note in (shared, below, f"M{MEDIAN[1:]}."):
        assert note in page
        assert note in told


def test_a_heat_map_has_every_value_and_every_state(store: Store) -> None:
    matrix(store)
    first, *_ = heat_maps(boards(all_judged(store)))
    columns = [name.partition(" n=")[0] for name in first.header[1:]]
    assert list(first.data[0]) == ["defense", *columns]
    assert "clean n=1000" in first.header
    lines = {str(line[0]): dict(zip(columns, line[1:], strict=True)) for line in first.lines}
    guard, standard = lines["guard"], lines["standard"]
    assert (guard["clean"], guard["worst case"], guard["onestep"]) == ("100.0", "41.0", "–")
    assert (standard["onestep"], standard["worst case"]) == ("error", "incomplete")
    for value in ("41.0", "error", "incomplete"):
        assert f">{value}</text>" in first.svg()
    shades = [[first.shade(k, column) for column in range(len(columns) + 1)] for k in range(len(first.lines))]
    names = [str(line[0]) for line in first.lines]
    at, (drawn,) = names.index("guard"), first.drawing.axes
    heights = [drawn.transData.transform((0, tick))[1] for tick in drawn.get_yticks()]
    assert [label.get_text() for label in drawn.get_yticklabels()] == names  # from top to bottom, as in the table
    assert heights == sorted(heights, reverse=True)
    assert shades[at][:2] == ["", "h20"]
    assert shades[at][-1] == "h8"
    assert 'class="h8"' in html(store)
    assert "n 1000" in first.caption
    assert "seeds 0, 1" in first.caption
    assert "device CPU x" in first.caption


def test_eps_curves_begin_at_clean_and_have_wilson_bands(store: Store) -> None:
    matrix(store)
    (plot,) = eps_curves(all_judged(store))
    guard = [line[1:] for line in plot.lines if line[0] == "guard"]
    low, high = wilson(410, 1000)
    assert guard[0][:2] == [0.0, 1.0]
    assert guard[1] == pytest.approx([0.1, 0.41, low, high], abs=1e-4)
    assert guard[2][:2] == [0.2, 0.1]
    assert {"0.025", "0.125", "0.200"} <= set(Page(plot.svg()).text)


def unfinished(store: Store, name: str = "guard", steep: tuple[int, ...] = (1, 1, 0, 0), **settings: object) -> str:
    """Seed 1 has every attack, over 4 images; seed 0 lacks one and seed 2 was never trained. Key of seed 1's clean."""
    keys = {}
    for seed, clean in ((0, [1, 0] * 5), (1, [1] * 9 + [0])):
        train = trained(store, name, seed, defense={"set": settings})
        keys[seed] = evaluated(store, train, "clean", clean)
        evaluated(store, train, "steep", list(steep))
        evaluated(store, train, "onestep", [1, 1, 1, 0] if seed else None, state="done" if seed else "error", n=4)
    evaluated(store, trained(store, name, 2, state="missing", defense={"set": settings}), "steep", state="missing", n=4)
    return keys[1]


def test_captions_have_the_seeds_and_sizes_of_the_numbers(store: Store) -> None:
    key = unfinished(store)
    unfinished(store, "other")
    unfinished(store, "third")
    evaluated(store, trained(store, "guard", 1), "steep", [1, 1, 0, 0], eps="0.2")
    rows = all_judged(store)
    assert {row.seeds for row in rows if row.eps == "0.1"} == {(0, 1)}
    (curve,), found = eps_curves(rows), boards(rows)
    (clean,), (cost,), (heat, _) = clean_against_robust(found), cost_against_robust(found), heat_maps(found)
    assert "n 4; eps on the axis; seeds 1; device CPU x. At eps 0: n 10, the seeds of" in curve.caption
    assert "n 4; eps Linf 0.1; seeds 1; device CPU x. Clean accuracy: n 10, mean over seeds 0, 1." in clean.caption
    assert "n 4; eps Linf 0.1; seeds 1; device CPU x. Times are means over seeds 0, 1." in cost.caption
    assert "n 10, 4; eps Linf 0.1; seeds 0, 1; device CPU x" in heat.caption
    assert [line[1:3] for line in curve.lines[:2]] == [[0.0, 0.9], [0.1, 0.5]]  # over both seeds clean is 0.7
    assert curve.lines[0][3:] == pytest.approx(wilson(9, 10), abs=1e-4)
    assert curve.behind[0] == {2: [key]}


def test_captions_of_sweeps_and_maps_have_their_seeds(store: Store) -> None:
    for sigma, steep in ((1.0, (1, 1, 0, 0)), (2.0, (1, 1, 1, 0))):
        unfinished(store, sigma=sigma)
        unfinished(store, "rival", steep, level=sigma)
    (a,), (b,) = (sweep(store, all_judged(store), *of, RowFilter()) for of in (("guard", "sigma"), ("rival", "level")))
    assert "n 10, 4; eps Linf 0.1; seeds 0, 1; device" in sweep_plot(a).caption
    found = [match for match in matches(store, a, b) if match.column == "worst case"]
    plot = map_plot((a, b, found))
    assert plot is not None
    assert "n 4; eps Linf 0.1; seeds 1; device" in plot.caption


def test_the_pareto_front_holds_the_points_that_no_other_dominates() -> None:
    assert pareto([(1, 5), (2, 4), (2, 3), (0, 5), (3, 1), (3, 1)]) == [0, 1, 4, 5]
    assert pareto([]) == []


def test_scatters_mark_the_front_and_separate_devices(store: Store) -> None:
    models = (("a", 500, 9.0, "x"), ("b", 400, 3.0, "x"), ("c", 300, 5.0, "x"), ("d", 100, 99.0, "y"))
    for name, hits, seconds, device in models:
        full(store, trained(store, name, seconds=seconds, device=device), hits)
    found = boards(all_judged(store))
    (cost,), (clean,) = cost_against_robust(found), clean_against_robust(found)
    assert {line[1]: line[4] for line in cost.lines} == {"a": "yes", "b": "yes", "c": "no", "d": "–"}
    assert {line[1]: line[5] for line in cost.lines} == {"a": "x", "b": "x", "c": "x", "d": "y"}
    assert {line[5] for line in clean.lines} == {"all"}
    assert {line[1]: line[4] for line in clean.lines} == {"a": "yes", "b": "no", "c": "no", "d": "no"}
    assert {line[1]: line[2] for line in cost.lines} == {"a": 9.0, "b": 3.0, "c": 5.0, "d": 99.0}


def scored(store: Store, name: str, clean: float, robust: float, n: int = 1000, **other: Any) -> None:
    """A model that is ranked where n is 1000."""
    train = trained(store, name, **other)
    for attack, share, settings in (("clean", clean, {}), ("autoattack", robust, STANDARD)):
        hits = round(share * n)
        evaluated(store, train, attack, [1] * hits + [0] * (n - hits), settings)


def test_fronts_of_scatters_are_those_of_the_table(store: Store) -> None:
    """Three classes, each better than the one before, and an unsound row better than all."""
    scored(store, "a", 0.9, 0.3)
    scored(store, "b", 0.6, 0.5)
    scored(store, "c", 0.6, 0.4)
    scored(store, "few", 0.94, 0.62, n=100)
    scored(store, "fewer", 0.92, 0.6, n=100)
    scored(store, "huge", 0.96, 0.7, model={"name": "huge"}, seconds=5.0)
    scored(store, "masked", 0.99, 0.99)
    audited(store, train_job("masked", 0), Finding("C9", "U", 0.4, 0.1))
    found = boards(all_judged(store))
    (board,), (clean,), (cost,) = found, clean_against_robust(found), cost_against_robust(found)
    on = {line[1]: line[4] for line in clean.lines}
    assert on == {
        "a": "yes", "b": "yes", "c": "no", "few": "yes", "fewer": "no", "huge, huge": "–", "masked (unsound)": "–",
    }  # fmt: skip
    front = board.header.index("Pareto front")
    told = {line.row.name: line.more[front] for line in board.lines}
    for plot, kind in ((clean, "clean"), (cost, "seconds")):
        for line in plot.lines:
            cell = told[str(line[1]).removesuffix(" (unsound)")]
            assert {"yes": kind in cell, "no": cell != "–" and kind not in cell, "–": cell == "–"}[str(line[4])]
    lines = [line for line in clean.drawing.axes[0].lines if line.get_linestyle() == "-"]
    assert sorted(list(zip(*line.get_data(), strict=True)) for line in lines) == [[(60, 50), (90, 30)], [(94, 62)]]
    among = {line[1]: line[5] for line in clean.lines}
    assert (among["few"], among["huge, huge"]) == ("tiny, n 100, provisional", "huge, n 1000, ranked")
    assert len(set(among.values())) == 3


def test_certified_curves_decrease_and_misclassified_images_are_not_certified(store: Store) -> None:
    train = trained(store, deploys="smoothed")
    evaluated(store, train, "clean", [1, 1, 1, 0])
    radius = np.array([0.1, 0.6, 1.2, 5.0], dtype=np.float64)
    evaluated(store, train, "certify", [1, 1, 1, 0], columns={"radius": radius})
    (plot,) = certified_curves(store, all_judged(store))
    shares = {line[1]: line[2] for line in plot.lines}
    wanted = {0.0: 0.75, 0.1: 0.75, 0.12: 0.5, 0.6: 0.5, 0.62: 0.25, 1.2: 0.25}
    assert {radius: shares[radius] for radius in wanted} == wanted
    assert max(shares) == 1.2


def test_a_certified_curve_of_an_unsound_row_is_labeled(store: Store) -> None:
    train = trained(store, eps="1", deploys="smoothed")
    evaluated(store, train, "certify", [1, 1], columns={"radius": np.array([0.1, 0.6])})
    audited(store, train, Finding("C9", "U", 0.4, 0.1))
    (plot,) = certified_curves(store, all_judged(store))
    assert {line[0] for line in plot.lines} == {"guard trained at 1 (unsound)"}
    assert [entry.label for entry in plot.key] == ["guard trained at 1 (unsound)"]


def test_figures_follow_the_theme_and_the_content_policy(store: Store) -> None:
    name = '$x_1$ <b>& href="#a" 0.12345'
    matrix(store, name)
    for plot in (heat_maps(boards(all_judged(store)))[0], *eps_curves(all_judged(store))):
        svg = plot.svg()
        assert ' style="' not in svg
        assert "<style" not in svg
        assert "currentColor" in svg
        assert name in "".join([*Page(svg).text, *(entry.label for entry in plot.key)])
        assert svg.startswith("<svg")
        assert 'role="img" aria-label="' in svg


def test_figures_are_written_as_svg_png_and_csv(store: Store, tmp_path: Path, bench: Bench) -> None:
    matrix(store, "=guard/../x")
    target = tmp_path / "figures"
    outcome = bench("report", "--results-dir", store.root, "--output", tmp_path / "r.html", "--figures", target)
    assert outcome.code == 0, outcome.err
    names = sorted(path.name for path in target.iterdir())
    assert [str(target / name) for name in names] == sorted(outcome.out.split()[1:])
    stems = {name.rsplit(".", 1)[0] for name in names}
    assert len(names) == 3 * len(stems)
    assert "eps-toy-linf" in stems
    assert (target / "eps-toy-linf.png").read_bytes().startswith(b"\x89PNG")
    assert (target / "eps-toy-linf.csv").read_text().startswith("defense,eps,accuracy,low,high\n'=guard")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    bench("report", "--results-dir", store.root, "--output", tmp_path / "r.html", "--figures", target)
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}


def test_accuracy_by_class_is_the_worst_case_matched_by_image_index(store: Store) -> None:
    train = trained(store)
    backwards = {"index": np.array([3, 2, 1, 0]), "label": np.array([7, 7, 0, 0])}
    forwards = {"index": np.arange(4), "label": np.array([0, 0, 7, 7])}
    evaluated(store, train, "clean", [0, 1, 1, 1], columns=backwards)  # image 3 is wrong
    evaluated(store, train, "steep", [1, 1, 0, 1], columns=forwards)  # image 2 is fooled
    evaluated(store, train, "onestep", [0, 1, 1, 1], columns=forwards)  # image 0 is fooled
    (plot,) = class_maps(store, boards(all_judged(store)))
    assert list(plot.header) == ["defense", "class 0 (n)", "class 7 (n)"]
    assert [list(line) for line in plot.lines] == [["guard", "50 (2)", "0 (2)"]]


def tabs(page: Page) -> dict[str, list[str]]:
    """Ids of the tabs of each data set."""
    found: dict[str, list[str]] = {}
    for section in page.all("section"):
        if section.get("class") == "data":
            found[str(section["id"])] = []
        elif section.get("class") == "tab":
            found[next(reversed(found))].append(str(section["id"]))
    return found


def test_each_data_set_and_threat_is_a_section_that_a_link_of_the_navigation_names(store: Store) -> None:
    matrix(store)
    evaluated(store, trained(store, data={"name": "toy/"}), "steep", [1, 0], STEPS)
    flat = {f"{part}_{name}": np.ones(2) for part in ("clean", "adversarial") for name in ("loss", "rise")}
    flat |= {f"{part}_loss_{at}": np.ones((2, 1)) for part in ("clean", "adversarial") for at in ("0.5", "1")}
    of = trained(store, "rigid", data={"name": "untested"})
    evaluated(store, of, "flatness", [1, 1], columns=flat, metrics={"metric": "adversarial_rise"}, eps="0.3")
    page = Page(html(store))
    assert tabs(page) == {
        "toy-data": ["toy-linf-eps-0-1", "toy-linf-eps-0-2"],
        "toy-data-again2": ["toy-linf-eps-0-1-again2"],  # names that differ in a sign alone
        "untested-data": ["untested-linf-eps-0-3"],  # no row of a table, but a figure
    }
    inside = [attrs["href"] for attrs in page.all("a")]
    assert [
        f"#{name}" for data, names in tabs(page).items() for name in (data, *names) if f"#{name}" not in inside
    ] == []
    places = [str(section.get("id")) for section in page.all("section")]
    assert places.index("toy-linf-eps-0-1-heat") < places.index("toy-linf-eps-0-2") < places.index("toy-data-eps")
    assert "untested-linf-eps-0-3-flatness" in places


def test_what_was_only_planned_is_a_note_and_in_no_table_or_figure(store: Store) -> None:
    matrix(store)
    planned = trained(store, "ghost", state="missing")
    for attack in ("clean", "steep", "dream"):
        evaluated(store, planned, attack, state="missing", n=1000)
    evaluated(store, trained(store), "dream", state="missing", n=1000)
    text, plots = render(store)
    assert "4 evaluations planned but not run" in "".join(Page(text).text)
    named = [str(line[0]) for plot in plots for line in plot.lines]
    assert "guard" in named
    assert not [name for name in named if "ghost" in name]
    assert not [name for plot in plots for name in plot.header if "dream" in name]
    assert ">ghost<" not in text


def test_figures_of_fewer_than_three_points_are_not_drawn(store: Store) -> None:
    for name, hits in (("a", 500), ("b", 400)):
        job = trained(store, name, seconds=float(hits), metrics={"final_terms": {"ce": 1.0}})
        log(store, job, {"ce": 2.0}, {"ce": 1.0})
        full(store, job, hits)
    _, plots = render(store)
    assert {plot.name.partition("-")[0] for plot in plots} == {"heat"}
    third = trained(store, "c", seconds=9.0, metrics={"final_terms": {"ce": 1.0}})
    log(store, third, {"ce": 2.0}, {"ce": 1.0}, {"ce": 0.5})
    full(store, third, 300)
    evaluated(store, third, "steep", [1] * 100 + [0] * 900, STEPS, eps="0.2")
    _, plots = render(store)
    drawn = {plot.name.partition("-")[0]: plot for plot in plots}
    assert set(drawn) == {"heat", "clean", "cost", "eps", "training"}
    assert [line[0] for line in drawn["training"].lines] == ["c (train_eps=0.1)"]


def test_one_model_has_one_mark_in_all_tables_and_figures(store: Store) -> None:
    for name, hits in (("a", 500), ("b", 400), ("c", 300)):
        job = trained(store, name, seconds=float(hits), metrics={"final_terms": {"ce": 1.0}})
        log(store, job, *[{"ce": 1.0}] * 3)
        full(store, job, hits)
        evaluated(store, job, "steep", [1] * 100 + [0] * 900, STEPS, eps="0.2")
    _, plots = render(store)
    marks = {line.row.method: line.mark for board in boards(all_judged(store)) for line in board.lines}
    assert len(set(marks.values())) == 3
    for plot in plots:
        assert {mark for mark in plot.marks if mark} == set(marks.values()), plot.name
        if not plot.shades:
            assert set(re.findall(r'data-m="(\w+)"', plot.svg())) == set(marks.values()), plot.name
        assert {entry.mark for entry in plot.key if entry.mark} in (set(), set(marks.values()))


def test_the_first_screen_answers_what_won_by_how_much_what_is_flagged_and_what_is_missing(store: Store) -> None:
    for name, share in (("best", 0.6), ("equal", 0.597), ("worse", 0.5), ("standard", 0.1)):
        scored(store, name, 0.9, share)
    scored(store, "masked", 0.99, 0.99)
    audited(store, train_job("masked", 0), Finding("C9", "U", 0.4, 0.1))
    evaluated(store, trained(store, "broken"), "steep", state="error", n=1000)
    (board,) = boards(all_judged(store))
    won, margin, flagged, missing = summary(board)
    assert (won.short, won.more[1]) == ("best", "Not significantly better than equal.")
    assert won.more[0] == "60.0 % robust (95 % interval 56.9 to 63.0) on 1000 images."
    assert margin.short == "10.0 points"
    assert re.fullmatch(
        r"10\.0 points \(95 % interval [\d.]+ to [\d.]+\) over worse, the best that is significantly worse\.",
        margin.more[0],
    )
    assert margin.more[1].startswith("50.0 points (95 % interval ")
    assert margin.more[1].endswith(" over standard.")
    assert flagged.short == "5 NOT CHECKED, 1 UNSOUND"
    assert flagged.more == ["UNSOUND: masked (C9)."]
    assert missing.short == "checks in 5 of 6 rows"
    assert "Without a worst case: broken." in missing.more
    shown = " ".join("".join(Page(html(store)).text).split())
    for answer in (won, margin, flagged, missing):
        assert " ".join([answer.question + answer.short, *answer.more]) in shown
    (nothing,) = boards([row for row in all_judged(store) if row.method == "broken"])
    assert [answer.short for answer in summary(nothing)][:2] == ["nothing is ranked yet", "nothing to compare with"]
    (alone,) = boards([row for row in all_judged(store) if row.method in ("best", "equal")])
    assert summary(alone)[1].short == "nothing is significantly worse"


def test_columns_beyond_the_short_table_are_there_on_demand(store: Store) -> None:
    matrix(store)
    page = Page(html(store))
    columns = [attrs.get("class") for attrs in page.all("th") if attrs.get("scope") == "col"][:30]
    assert columns[:8] == [None] * 8
    assert columns[8] == "more"
    assert page.all("input")[1] == {"type": "checkbox"}
    css = "".join(page.raw["style"])
    assert ".more { display: none;" in css
    assert ".board:has(.toggle :checked) .more { display: table-cell; }" in css  # works without script


def test_progress_is_told_while_the_page_is_written(store: Store, tmp_path: Path, bench: Bench) -> None:
    matrix(store)
    said: list[str] = []
    write_report(store, tmp_path / "page.html", tmp_path / "figures", say=said.append)
    assert said[:3] == ["reading records", "drawing figures", "writing figure 1 of 1"]
    assert said[-1] == "writing files of figure 4 of 4"
    assert bench("report", "--results-dir", store.root, "--output", tmp_path / "page.html").err == ""  # no terminal


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_runs_the_pages_script_and_nothing_else(store: Store, tmp_path: Path) -> None:
    matrix(store, HOSTILE[1])
    page = tmp_path / "page.html"
    page.write_text(html(store))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(["chromium", *words], capture_output=True, text=True, timeout=120)
    dom = Page(done.stdout)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "3 of 3 rows" in "".join(dom.text)  # counted by the script: the content policy let it run
    assert [attrs for attrs in dom.all("form") if "hidden" not in attrs]
    assert not dom.all("img")
