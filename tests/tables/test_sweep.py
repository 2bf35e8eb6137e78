"""`bench sweep`: points of one setting, seeds apart, the map between two settings; worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import all_rows, evaluated, trained
from harness import Bench
from scipy.optimize import isotonic_regression

from bench.core.stats import wilson
from bench.records.store import Store
from bench.report.sweeps import map_plot
from bench.soundness.checks import Finding
from bench.tables.equivalence import _resampled, matches, partner, reached, rising
from bench.tables.leaderboard import board
from bench.tables.selection import RowFilter
from bench.tables.sweep import WORST, Series, sweep, with_anchor
from bench.tables.sweep_text import lines, map_lines, map_table, table

N = 200


def right(share: float, shift: int = 0) -> list[int]:
    """Of N images those that stand: the first ones, moved on by `shift`."""
    hits = round(share * N)
    return [int((k - shift) % N < hits) for k in range(N)]


def noise(store: Store, sigma: float, share: float, seed: int = 0, **other: Any) -> None:
    settings = {"sigma": sigma, **other.pop("settings", {})}
    train = trained(store, "guard", seed, eps=None, defense={"set": settings}, **other)
    evaluated(store, train, "clean", right(0.95))
    evaluated(store, train, "steep", right(share))


def against(store: Store, eps: str, share: float, clean: float, seed: int = 0) -> None:
    train = trained(store, "rival", seed, eps=eps)
    evaluated(store, train, "clean", right(clean))
    evaluated(store, train, "steep", right(share))


def swept(store: Store, defense: str = "guard", setting: str = "sigma", least: int = 2) -> list[Series]:
    return sweep(store, all_rows(store), defense, setting, RowFilter(), least)


def test_points_stand_in_the_order_of_the_setting_and_other_settings_make_other_series(store: Store) -> None:
    for sigma, share in ((1.0, 0.6), (0.2, 0.4), (10.0, 0.5)):
        noise(store, sigma, share)
    for sigma in (0.2, 1.0):
        noise(store, sigma, 0.3, settings={"form": "other"})
    noise(store, 3.0, 0.9, train={"lr": 0.7})  # alone with its rate: no series
    found = {series.fixed: series for series in swept(store)}
    assert {fixed: [p.x for p in s.points] for fixed, s in found.items()} == {
        "form=None": [0.2, 1.0, 10.0], "form=other": [0.2, 1.0],
    }  # fmt: skip
    assert [p.cells["steep"].mean for p in found["form=None"].points] == [0.4, 0.6, 0.5]
    assert found["form=None"].columns == ["clean", "steep", WORST]


def test_the_worst_case_is_over_the_attacks_that_every_value_had(store: Store) -> None:
    noise(store, 0.2, 0.4)
    train = trained(store, "guard", eps=None, defense={"set": {"sigma": 1.0}})
    evaluated(store, train, "clean", right(0.95))
    evaluated(store, train, "steep", right(0.6))
    evaluated(store, train, "onestep", right(0.1))  # only here: it would make sigma 1 look worse than 0.2
    (series,) = swept(store)
    assert [p.cells[WORST].mean for p in series.points] == [0.4, 0.6]
    assert series.left_out == ("onestep",)
    assert "onestep" in "\n".join(table(series))


def test_means_are_over_the_seeds_that_every_value_has_and_all_seeds_are_shown(store: Store) -> None:
    noise(store, 0.2, 0.4)
    for seed, share in enumerate((0.6, 0.2, 0.3)):
        noise(store, 1.0, share, seed)
    (series,) = swept(store)
    assert series.seeds == (0,)
    line = next(line for line in lines(series) if line["value"] == 1.0 and line["column"] == "steep")
    assert (line["mean"], line["mean_over"], line["lowest"], line["highest"]) == (0.6, "0", 0.2, 0.6)
    assert line["seed_values"] == "0:0.6 1:0.2 2:0.3"
    assert "60.0/20.0/30.0" in "\n".join(table(series))
    assert "means are over seed 0, which every value has" in "\n".join(table(series))


def test_a_collapsed_seed_is_named_and_a_failed_value_says_so(store: Store) -> None:
    for seed, share in enumerate((0.6, 0.62, 0.0)):
        noise(store, 0.2, share, seed)
        noise(store, 1.0, 0.5, seed)
    failed = trained(store, "guard", eps=None, state="diverged", defense={"set": {"sigma": 9.0}})
    evaluated(store, failed, "clean", state="missing", n=N)
    evaluated(store, failed, "steep", state="missing", n=N)
    (series,) = swept(store)
    assert series.seeds == (0,)  # all that the value which failed was planned for
    text = "\n".join(table(series))
    assert "3, 1 collapsed" in text
    assert "blocked: training diverged" in text
    last = next(line for line in lines(series) if line["value"] == 9.0 and line["column"] == "steep")
    assert (last["state"], math.isnan(float(str(last["mean"])))) == ("blocked", True)


def test_budgets_attacked_and_trained_at_are_settings_too(store: Store) -> None:
    train = trained(store, "guard", eps="0.1")
    for eps, share in (("0.3", 0.1), ("0.1", 0.6), ("8/255", 0.7)):
        evaluated(store, train, "steep", right(share), eps=eps)
    against(store, "0.1", 0.5, 0.9)
    against(store, "0.2", 0.6, 0.8)
    (attacked,) = swept(store, setting="eps")
    assert [(p.x, p.cells["steep"].mean) for p in attacked.points] == [(8 / 255, 0.7), (0.1, 0.6), (0.3, 0.1)]
    (trained_at,) = swept(store, "rival", "train_eps")
    assert [p.x for p in trained_at.points] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("defense", "setting", "said"),
    [
        ("gaurd", "sigma", "no row of defense 'gaurd'.* Did you mean 'guard'"),
        ("guard", "sgima", "guard has no setting 'sgima'"),
        ("guard", "beta", "no two rows that differ in beta alone; its values: 6"),
        ("guard", "form", "form of guard is 'first'; a sweep needs numbers"),
        ("guard", "train_eps", "guard has no setting 'train_eps'"),
    ],
)
def test_what_cannot_be_swept_says_why(store: Store, defense: str, setting: str, said: str) -> None:
    noise(store, 0.2, 0.4, settings={"beta": 6, "form": "first"})
    with pytest.raises((LookupError, ValueError), match=said):
        swept(store, defense, setting)


def test_the_monotone_fit_is_scipys() -> None:
    values = np.random.default_rng(0).normal(size=(50, 7)) + np.arange(7) / 3
    expected = [isotonic_regression(line).x for line in values]
    assert rising(values) == pytest.approx(np.array(expected), abs=1e-12)


def test_a_target_is_met_at_the_least_place_on_straight_lines() -> None:
    fit = np.array([0.2, 0.4, 0.4, 0.8])
    targets = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9])
    found = reached([0.0, 0.1, 0.2, 0.4], np.tile(fit, (7, 1)), targets)
    assert found == pytest.approx(np.array([-math.inf, 0.0, 0.05, 0.1, 0.3, 0.4, math.inf]))


def mapped(store: Store) -> tuple[Series, Series, dict[tuple[str, float], tuple[float, float, float]]]:
    (a,) = swept(store)
    b = partner(store, a, [with_anchor(s) for s in swept(store, "rival", "train_eps", least=1)])
    assert b is not None
    return a, b, {(m.column, m.a): (m.b, m.low, m.high) for m in matches(store, a, b)}


def test_sigma_is_mapped_to_the_budget_of_equal_accuracy_with_standard_at_zero(store: Store) -> None:
    plain = trained(store, "standard", eps=None)
    evaluated(store, plain, "clean", right(0.99))
    evaluated(store, plain, "steep", right(0.1))
    against(store, "0.1", 0.5, 0.97)
    against(store, "0.2", 0.7, 0.93)
    for sigma, share in ((0.2, 0.3), (1.0, 0.6), (2.0, 0.9), (0.1, 0.05)):
        noise(store, sigma, share)
    a, b, found = mapped(store)
    assert [p.x for p in b.points] == [0.0, 0.1, 0.2]
    assert found["steep", 0.2][0] == pytest.approx(0.05)  # half way from 0.1 to 0.5
    assert found["steep", 1.0][0] == pytest.approx(0.15)
    assert (found["steep", 2.0][0], found["steep", 0.1][0]) == (math.inf, -math.inf)
    assert found["clean", 1.0][0] == pytest.approx(0.15)  # clean falls: 0.95 is half way from 0.97 to 0.93
    at, low, high = found["steep", 1.0]
    assert low < at < high
    told = "\n".join(map_table(store, (a, b, matches(store, a, b))))
    assert told.startswith("toy, tiny, Linf eps 0.1: guard sigma and the rival train_eps that is as accurate\n")
    assert "unsound" not in told
    assert "above 0.2" in told
    assert "below 0" in told
    assert "0 (standard), 0.1, 0.2" in told
    assert "no map" not in told
    csv_lines = map_lines((a, b, matches(store, a, b)))
    assert {line["b_value"] for line in csv_lines if line["a_value"] == 2.0 and line["column"] == "steep"} == {"above"}


def test_the_interval_of_a_match_is_paired_over_images(store: Store) -> None:
    """Where A and B's points break on the same images only the slope is uncertain; on others much more is."""
    against(store, "0.1", 0.4, 0.95)
    against(store, "0.2", 0.6, 0.95)
    noise(store, 0.2, 0.5)
    noise(store, 0.3, 0.5)
    _, _, nested = mapped(store)
    train = trained(store, "guard", eps=None, defense={"set": {"sigma": 0.4}})
    evaluated(store, train, "clean", right(0.95))
    evaluated(store, train, "steep", right(0.5, shift=100))
    _, _, found = mapped(store)
    assert found["steep", 0.4][0] == pytest.approx(0.15)
    widths = {sigma: found["steep", sigma][2] - found["steep", sigma][1] for sigma in (0.2, 0.4)}
    assert widths[0.2] < 0.05
    assert widths[0.4] == math.inf
    assert nested["steep", 0.2] == found["steep", 0.2]  # fixed draws: nothing hidden moves it


def test_a_match_of_images_that_are_all_alike_has_wilsons_bounds(store: Store) -> None:
    """B rises from 0 to 100 % between 0.1 and 0.3, where 1 % is worth 0.002; A is at 0 % or at 100 %."""
    against(store, "0.1", 0.0, 0.95)
    against(store, "0.2", 0.5, 0.95)
    against(store, "0.3", 1.0, 0.95)
    noise(store, 0.2, 0.0)
    noise(store, 1.0, 1.0)
    _, _, found = mapped(store)
    margin = wilson(0, N)[1]
    at, low, high = found["steep", 0.2]
    assert (at, low) == (0.1, -math.inf)  # B at 0 % may lie above A's
    assert high == pytest.approx(0.1 + 0.2 * margin, abs=5e-4)
    at, low, high = found["steep", 1.0]
    assert (at, high) == (pytest.approx(0.3), math.inf)
    assert low == pytest.approx(0.3 - 0.2 * margin, abs=5e-4)


def test_draws_of_a_point_without_spread_fill_wilsons_interval() -> None:
    n = 100
    right = np.array([[0.0] * n, [1.0] * n, [1.0] * 40 + [0.0] * 60, [1 / 3] * n, [0.0] * n])
    drawn = _resampled(right)
    assert np.array_equal(drawn, _resampled(right))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    for k, hits in ((0, 0), (1, n)):
        assert (low[k], high[k]) == pytest.approx(wilson(hits, n), abs=4e-3)
    assert high[3] - low[3] == pytest.approx(wilson(33, n)[1] - wilson(33, n)[0], abs=0.01)
    assert np.array_equal(drawn[:, 2], _resampled(right[2:3])[:, 0])  # as ever where images differ
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 4])[0, 1]) < 0.1  # each for itself, as Newcombe's


def test_only_the_same_footing_is_a_partner(store: Store) -> None:
    noise(store, 0.2, 0.4)
    noise(store, 1.0, 0.5)
    (a,) = swept(store)
    for eps in ("0.1", "0.2"):
        evaluated(store, trained(store, "rival", eps=eps, train={"epochs": 90}), "steep", right(0.5))
    assert partner(store, a, swept(store, "rival", "train_eps")) is None


def test_there_is_no_map_by_an_accuracy_that_moves_the_other_way(store: Store) -> None:
    plain = trained(store, "standard", eps=None)
    evaluated(store, plain, "clean", right(0.91))
    evaluated(store, plain, "steep", right(0.1))
    against(store, "0.1", 0.5, 0.97)  # clean accuracy rises
    for sigma in (0.2, 1.0):
        noise(store, sigma, 0.3)
    a, b, found = mapped(store)
    assert {column for column, _ in found} == {"steep"}
    told = "\n".join(map_table(store, (a, b, matches(store, a, b))))
    assert "no map by clean: clean accuracy does not fall, or robust accuracy not rise with train_eps" in told


def test_an_invalid_row_shows_and_maps_no_number(store: Store) -> None:
    from factories import audited

    noise(store, 0.2, 0.4)
    noise(store, 1.0, 0.6)
    against(store, "0.1", 0.3, 0.95)
    against(store, "0.2", 0.7, 0.95)
    train = trained(store, "guard", eps=None, defense={"set": {"sigma": 1.0}})
    audited(store, train, Finding("C3", "X", 1.0))
    rows = board(store)
    (a,) = sweep(store, rows, "guard", "sigma", RowFilter())
    assert [p.cells["steep"].state() for p in a.points] == ["not run", "invalid"]
    assert [bool(p.cells[WORST].values) for p in a.points] == [True, False]
    (b,) = sweep(store, rows, "rival", "train_eps", RowFilter())
    assert {m.a for m in matches(store, a, b)} == {0.2}


def unsound(store: Store, name: str, eps: str | None, **settings: Any) -> None:
    from factories import audited

    audited(store, trained(store, name, eps=eps, defense={"set": settings}), Finding("C9", "U", 0.4, 0.1))


def test_a_map_shows_the_verdict_of_each_value_and_names_unsound_values_of_the_other_side(store: Store) -> None:
    for eps, share, clean in (("0.1", 0.3, 0.96), ("0.2", 0.7, 0.94)):
        against(store, eps, share, clean)
    for sigma in (0.2, 1.0):
        noise(store, sigma, 0.5)
    unsound(store, "guard", None, sigma=1.0)
    unsound(store, "rival", "0.2")
    rows = board(store)
    (a,), (b,) = (sweep(store, rows, *of, RowFilter()) for of in (("guard", "sigma"), ("rival", "train_eps")))
    found = a, b, matches(store, a, b)
    told = map_table(store, found)
    assert [re.split("  +", line)[-1] for line in told[2:7]] == [
        "verdict", "NOT CHECKED", "NOT CHECKED", "UNSOUND", "UNSOUND",
    ]  # fmt: skip
    assert "rival is unsound at train_eps 0.2: the fit may be too high there" in told
    by = {(line["a_value"], line["verdict"], line["b_unsound"]) for line in map_lines(found)}
    assert by == {(0.2, "NOT CHECKED", "0.2"), (1.0, "UNSOUND", "0.2")}
    plot = map_plot(found)
    assert plot is not None
    verdict = plot.header.index("verdict")
    assert {(line[plot.header.index("a_value")], line[verdict]) for line in plot.lines} == {
        (0.2, "NOT CHECKED"), (1.0, "UNSOUND"),
    }  # fmt: skip
    hollow = [line for line in plot.drawing.axes[0].lines if str(line.get_markerfacecolor()) == "white"]
    assert {tuple(line.get_xdata()) for line in hollow} == {(1.0,)}


def test_maps_of_several_series_are_told_apart_by_what_is_fixed(store: Store, bench: Bench) -> None:
    against(store, "0.1", 0.3, 0.95)
    against(store, "0.2", 0.7, 0.95)
    for sigma in (0.2, 1.0):
        noise(store, sigma, 0.5)
        noise(store, sigma, 0.4, settings={"form": "other"})
    swept_ = sweep(store, all_rows(store), "guard", "sigma", RowFilter())
    (b,) = sweep(store, all_rows(store), "rival", "train_eps", RowFilter())
    maps = [(a, b, matches(store, a, b)) for a in swept_]
    titles = [map_table(store, found)[0] for found in maps]
    place = "toy, tiny, Linf eps 0.1: guard"
    other = "rival train_eps"
    forms = ("None", "other")
    assert sorted(titles) == [f"{place} (form={form}) sigma and the {other} that is as accurate" for form in forms]
    plots = [plot for found in maps if (plot := map_plot(found)) is not None]
    assert sorted(plot.title for plot in plots) == [f"{place} (form={form}) sigma and {other}" for form in forms]
    told = bench("sweep", "guard", "sigma", "--against", "rival", "--results-dir", store.root).out
    assert all(title in told.splitlines() for title in titles)


def test_the_command_writes_tables_and_figures(store: Store, bench: Bench, tmp_path: Path) -> None:
    plain = trained(store, "standard", eps=None)
    evaluated(store, plain, "clean", right(0.99))
    evaluated(store, plain, "steep", right(0.1))
    against(store, "0.1", 0.5, 0.97)
    for seed in range(2):
        noise(store, 0.2, 0.3, seed)
        noise(store, 1.0, 0.45, seed)
    words = ["sweep", "guard", "sigma", "--against", "rival", "--results-dir", store.root]
    done = bench(*words, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "toy, tiny, Linf eps 0.1: guard against sigma" in done.out
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    stems = ["map-guard-sigma-rival-train-eps-toy-linf-0-1", "sweep-guard-sigma-toy-tiny-linf-0-1"]
    assert written == [f"{stem}.{kind}" for stem in stems for kind in ("csv", "png", "svg")]
    with (tmp_path / "out" / f"{stems[0]}.csv").open(newline="") as file:
        by = {(line["column"], line["a_value"]): line for line in csv.DictReader(file)}
    assert float(by["steep", "0.2"]["b_value"]) == pytest.approx(0.05)
    before = [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]
    bench(*words, "--output", tmp_path / "out")
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == before
    told = json.loads(bench(*words, "--json").out)
    assert {line["column"] for line in told["sweep"]} == {"clean", "steep", WORST}
    assert len(told["map"]) == len(by)


def test_the_command_refuses_in_one_line(store: Store, bench: Bench) -> None:
    noise(store, 0.2, 0.3)
    noise(store, 1.0, 0.4)
    for words in (["guard", "sgima"], ["guard", "sigma", "--against", "nobody"], ["guard", "sigma", "--eps", "0.9"]):
        done = bench("sweep", *words, "--results-dir", store.root)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err


def test_certified_accuracy_is_swept_where_there_is_no_budget(store: Store) -> None:
    for sigma, reach in ((0.25, 0.4), (0.5, 0.9)):
        train = trained(store, "guard", eps=None, deploys="smoothed", defense={"set": {"sigma": sigma}})
        evaluated(store, train, "certify", [1, 1, 0, 1], columns={"radius": np.array([reach, 0.1, 1.0, reach])})
    (series,) = swept(store)
    assert [p.cells["certified at L2 0.5"].mean for p in series.points] == [0.0, 0.5]
    assert series.place == "toy, tiny, no attack"


def test_hostile_names_are_text_in_every_output(store: Store, bench: Bench, tmp_path: Path) -> None:
    name, attack = "=a|$\\frac$<script>\x1b[2J", "</svg><script>alert(1)</script>$x$"
    for sigma in (0.2, 1.0):
        train = trained(store, name, eps=None, data={"name": "../=<b>"}, defense={"set": {"sigma": sigma}})
        evaluated(store, train, "clean", right(0.9))
        evaluated(store, train, attack, right(0.5))
    done = bench("sweep", name, "sigma", "--results-dir", store.root, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    written = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert {path.parent for path in written.values()} == {tmp_path / "out"}
    assert "<script>" not in written[".svg"].read_text()
    with written[".csv"].open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith("=")]
