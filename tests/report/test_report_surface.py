"""The figure of the loss around images: its panels, labels and size; and a real measurement in records, shards, tables
and page."""

from __future__ import annotations

import csv
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import evaluated, trained
from harness import Bench, tiny
from matplotlib.patches import Circle, Polygon
from report_page import Page

import bench as notebook
from bench.atomic import file_hash
from bench.jobs.evaluation_job import assemble
from bench.planning.evaluations import shard_of
from bench.planning.job import Job
from bench.records.store import Store
from bench.report.surface import _drawing, _measured, surfaces
from bench.results.evaluations import evaluations
from bench.tables.leaderboard import markdown

AT = np.linspace(-1, 1, 5)
RISING = 1.0 + AT[:, None] + 0 * AT[None, :]  # along a alone


def around(store: Store, train: Job, bends: list[float], *, loss: Any = None, **other: Any) -> str:
    """An evaluation by `surface` of images with these nonlinearities; image k has the loss RISING times k + 1."""
    count = np.arange(len(bends))
    columns: dict[str, Any] = {
        "index": other.pop("first", 0) + count,
        "loss": (RISING * (1 + count[:, None, None]) if loss is None else loss).astype(np.float32),
        "clean_loss": 1.0 + count,
        "nonlinearity": np.array(bends),
        "off_gradient": np.where(count == 0, 0.5, 0.0),
    }
    columns |= other.pop("columns", {})
    attack = other.pop("attack", "surface")
    about = {"columns": columns, "metrics": {"metric": "nonlinearity"}}
    return evaluated(store, train, attack, [1] * len(bends), **about, **other)


def drawn(store: Store, train: Job, key: str) -> tuple[list[str], list[Any]]:
    """Titles and surfaces of the panels of one evaluation."""
    entries = [entry for entry in evaluations(store).readable if entry.key == key]
    found = _measured(store, entries, False)
    assert found is not None
    return [panel.title for panel in found.panels], [panel.loss for panel in found.panels]


def test_numbers_are_over_all_seeds_and_the_least_nonlinear_model_comes_first(store: Store) -> None:
    keys = [around(store, trained(store, seed=seed), bends) for seed, bends in enumerate([[0.5, 1.0, 6.0], [2.0]])]
    other = around(store, trained(store, "other"), [0.25, 0.125])
    around(store, trained(store, "elsewhere", data={"name": "another"}), [0.5], norm="L2", eps="0.5")
    around(store, trained(store, "unseen"), [0.0], split="validation")
    l2, plot = surfaces(store, evaluations(store).readable)
    assert [list(line) for line in plot.lines] == [
        ["other trained at 0.1", "1.5", "0.1875", "0.1875", "0.25", "0.25", "50.0"],
        ["guard trained at 0.1", "1.75", "2.375", "1.5", "6", "0.25", "50.0"],
    ]
    assert plot.header == [
        "defense", "clean loss", "nonlinearity, mean", "nonlinearity, median", "nonlinearity, largest",
        "off gradient, mean", "off gradient above 0 (% of images)",
    ]  # fmt: skip
    assert [behind[0] for behind in plot.behind] == [[other], keys]
    assert (plot.title, plot.threat, plot.dataset) == ("toy, Linf eps = 0.1, surface", "Linf eps = 0.1", "toy")
    assert "n 2, 3, 1; eps Linf 0.1; seeds 0, 1; device CPU x. Panels show seed 0, numbers are over all" in plot.caption
    assert "no proof of robustness" in plot.caption
    assert "lower bound" in plot.caption
    assert "Shown:" not in plot.caption
    assert (l2.dataset, l2.threat) == ("another", "L2 eps = 0.5")
    assert isinstance(l2.drawing.axes[0].patches[-1], Circle)
    assert isinstance(plot.drawing.axes[0].patches[-1], Polygon)
    shown = "\n".join(Page(plot.svg()).text)
    for said in ("other trained at 0.1", "nonlinearity 2.375", "gradient direction (eps)", "direction (eps)"):
        assert said in shown


def test_panels_are_the_mean_the_median_and_the_largest(store: Store) -> None:
    train = trained(store)
    key = around(store, train, [3.0, 9.0, 1.0, 2.0], first=40)
    titles, losses = drawn(store, train, key)
    assert titles == ["mean of 4 images", "median: image 43", "largest: image 41"]
    for loss, factor in zip(losses, (2.5, 4.0, 2.0), strict=True):
        np.testing.assert_allclose(loss, factor * RISING)
    odd = around(store, trained(store, "odd"), [3.0, 9.0, 1.0])
    assert drawn(store, train, odd)[0][1:] == ["median: image 0", "largest: image 1"]


def test_panels_show_the_first_seed_and_its_evaluation_of_most_images(store: Store) -> None:
    for seed in (2, 10, 1):
        around(store, trained(store, seed=seed), [float(seed)] * 2, first=100 * seed)
    around(store, trained(store, seed=1), [1.0] * 3, first=500)
    (plot,) = surfaces(store, evaluations(store).readable)
    shown = "\n".join(Page(plot.svg()).text)
    assert "mean of 3 images" in shown
    assert "median: image 501" in shown
    assert "Panels show seed 1," in plot.caption
    assert plot.lines[0][1] == f"{(1 + 2 + 3 + 1 + 2 + 1 + 2) / 7:.4g}"


def test_values_that_are_not_finite_are_labeled_left_out_of_panels_and_last(store: Store) -> None:
    bad = np.stack([RISING, RISING, 2 * RISING, 3 * RISING])
    bad[0, 2, 2] = math.inf
    train = trained(store)
    key = around(store, train, [0.0, math.nan, 1.0, 2.0], loss=bad)
    titles, losses = drawn(store, train, key)
    assert titles == ["mean of 2 of 4 images", "median: image 2", "largest: image 3"]
    np.testing.assert_allclose(losses[0], 2.5 * RISING)
    none = around(store, trained(store, "none"), [1.0], loss=np.full((1, 5, 5), math.nan))
    assert drawn(store, train, none)[1] == [None, None, None]
    around(store, trained(store, "zz"), [50.0])
    (plot,) = surfaces(store, evaluations(store).readable)
    assert [line[0] for line in plot.lines] == ["none trained at 0.1", "zz trained at 0.1", "guard trained at 0.1"]
    assert plot.lines[2][1:] == ["2.5", "not finite", "not finite", "not finite", "0.125", "25.0"]
    assert "\n".join(Page(plot.svg()).text).count("not finite") == 3 + 1


def test_an_evaluation_named_surface_without_surfaces_is_ignored(store: Store) -> None:
    evaluated(store, trained(store), "surface", [1, 1], columns={"nonlinearity": np.ones(2)})
    around(store, trained(store, "flat"), [1.0] * 2, columns={"loss": np.ones(2)})
    assert surfaces(store, evaluations(store).readable) == []


def test_labels_name_the_architecture_where_several_are_shown(store: Store) -> None:
    for k, net in enumerate(("tiny", "broad")):
        around(store, trained(store, model={"name": net, "set": {}, "revision": 1}), [float(k)])
    (plot,) = surfaces(store, evaluations(store).readable)
    assert [line[0] for line in plot.lines] == ["guard, tiny trained at 0.1", "guard, broad trained at 0.1"]


def panels(store: Store, linf: bool = True, reach: float = 1.0) -> list[Any]:
    """The axes of one model."""
    train = trained(store)
    key = around(store, train, [3.0, 9.0, 1.0])
    entries = [entry for entry in evaluations(store).readable if entry.key == key]
    found = _measured(store, entries, False)
    assert found is not None
    return _drawing([found], reach, linf).axes


def test_the_gradient_runs_to_the_right_and_the_ball_is_that_of_the_norm(store: Store) -> None:
    mean, *_ = panels(store)
    assert mean.figure.get_suptitle().startswith("guard trained at 0.1\nmean clean loss ")
    shown = mean.images[0]
    np.testing.assert_allclose(shown.get_array(), 2 * RISING.T)  # upwards the random direction, from its lowest
    assert (shown.origin, shown.get_extent()) == ("lower", [-1.25, 1.25, -1.25, 1.25])
    diamond = mean.patches[-1]
    assert isinstance(diamond, Polygon)
    assert {tuple(corner) for corner in diamond.get_xy()} == {(1, 0), (0, 1), (-1, 0), (0, -1)}
    circle = panels(store, linf=False)[0].patches[-1]
    assert isinstance(circle, Circle)
    assert (circle.center, circle.radius) == ((0, 0), 1)
    assert [line.get_xydata().tolist() for line in mean.lines] == [[[0, 0]], [[1, 0]]]
    near = panels(store, reach=0.5)[0]
    assert near.get_xlim() == (-0.5, 0.5)
    assert len(near.lines) == 1  # the whole gradient step lies outside


def test_reach_is_that_of_the_job(store: Store) -> None:
    around(store, trained(store), [1.0], settings={"reach": 2.0, "points": 5})
    (plot,) = surfaces(store, evaluations(store).readable)
    assert plot.drawing.axes[0].get_xlim() == (-2, 2)
    assert (plot.drawing.axes[0].get_xlabel(), plot.drawing.axes[0].get_ylabel()) == (
        "gradient direction (eps)",
        "random\ndirection (eps)",
    )


@pytest.mark.parametrize("rough", [False, True])
def test_a_figure_of_eight_models_is_small_and_states_how_many_it_shows(store: Store, rough: bool) -> None:
    generator, at = np.random.default_rng(0), np.linspace(-1, 1, 15)
    for k in range(9):
        shape = np.exp(2 * at)[:, None] * (1 + k / 9) + np.sin(3 * at)[None, :] + at[:, None] * at[None, :]
        loss = generator.random((3, 15, 15)) if rough else np.stack([shape, 2 * shape, shape**2])
        around(store, trained(store, f"defense_{k}"), [9.0 - k] * 3, loss=loss)
    (plot,) = surfaces(store, evaluations(store).readable)
    svg = plot.svg()
    assert len(svg.encode()) < 120_000
    assert "Shown: the 8 of 9 models with the least nonlinearity" in plot.caption
    assert [line[0][:9] for line in plot.lines] == ["defense_8", *(f"defense_{k}" for k in range(7, -1, -1))]
    shown = "\n".join(Page(svg).text)
    assert "defense_1 " in shown
    assert "defense_0 " not in shown
    assert svg.count("<image") == 3 * 8
    assert not re.search(r"style=|<style", svg)  # what the page's content policy forbids
    assert 'fill="currentColor"' in svg  # text follows the theme
    assert svg.count("<svg") == svg.count(f'aria-label="{plot.alt} Panel ') == 8


def test_names_of_records_are_escaped(store: Store) -> None:
    around(store, trained(store, '<script>alert(1)</script> & "$x_1$"'), [1.0])
    (plot,) = surfaces(store, evaluations(store).readable)
    assert "<script" not in plot.svg()
    assert "<script>" in "".join(Page(plot.svg()).text).replace("\n", "")


@pytest.fixture(scope="module")
def cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def ran(bench: Bench, cache: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One defense evaluated by `clean` and `surface` at two seeds; a copy."""
    if "results" not in cache:
        folder = tmp_path_factory.mktemp("measured") / "results"
        words = tiny("--eps", "0.1", "--seeds", "0,1", defense="standard", attack="clean,surface")
        outcome = bench(*words, "--set", "surface.points=5", "--results-dir", folder, "--executor", "debug")
        assert outcome.code == 0, outcome.err
        assert "standard: surface (points=5) at Linf 0.1: mean nonlinearity" in outcome.out
        cache["results"] = folder
    shutil.copytree(cache["results"], "results")
    return Store(Path("results"))


def keys(store: Store) -> list[str]:
    found = {k: j for k, j in store.jobs().items() if j.kind == "evaluate" and j.attack.name == "surface"}
    return sorted(found, key=lambda key: found[key].seed)


def test_surfaces_are_stored_exported_and_readable_in_notebooks(bench: Bench, ran: Store) -> None:
    first, _ = keys(ran)
    samples = ran.samples(first)
    assert (samples["loss"].shape, samples["loss"].dtype) == ((16, 5, 5), np.dtype("float32"))
    assert samples["forwards"].tolist() == [27.0] * 16
    images = notebook.samples(first)
    assert images["loss"][3].shape == (5, 5)
    np.testing.assert_array_equal(images["loss"][3], samples["loss"][3])
    np.testing.assert_allclose([x[2, 2] for x in images["loss"]], images["clean_loss"], rtol=1e-6)
    assert bench("leaderboard", "--results-dir", "results", "--output", "board.md").code == 0
    (table,) = Path().rglob("surface.csv")
    lines = list(csv.DictReader(table.open()))
    assert [line["seed"] for line in lines] == ["0", "1"]
    for name in ("loss", "nonlinearity", "off_gradient", "clean_loss"):
        assert float(lines[0][name]) == pytest.approx(samples[name].mean())
    assert bench("verify", "--results-dir", "results").code == 0
    board = markdown(ran)
    for key in keys(ran):
        shutil.rmtree(ran.folder(key))
    assert markdown(Store(Path("results"))) == board  # it judges no robustness


def test_equal_surfaces_merge_and_different_ones_conflict(bench: Bench, ran: Store) -> None:
    key = keys(ran)[0]
    shutil.copytree("results", "other")
    assert bench("merge", "other", "--results-dir", "fresh").code == 0
    np.testing.assert_array_equal(Store(Path("fresh")).samples(key)["loss"], ran.samples(key)["loss"])
    assert bench("merge", "other", "--results-dir", "results").code == 0
    other, samples = Store(Path("other")), ran.samples(key)
    samples["loss"][3, 1, 1] += 1
    path = other.folder(key) / "samples.npz"
    np.savez(path, **samples)
    record = other.record(key)
    assert record is not None
    other.put(other.job(key), replace(record, files={"samples.npz": file_hash(path)}))
    outcome = bench("merge", "other", "--results-dir", "results")
    assert outcome.code == 1
    assert f"{key} in results and other: other samples.npz" in outcome.out


def test_surfaces_of_shards_are_assembled(ran: Store) -> None:
    key = keys(ran)[0]
    whole, samples, record = ran.job(key), ran.samples(key), ran.record(key)
    assert record is not None
    shards = []
    for first, last in ((0, 10), (10, 16)):
        shard = shard_of(whole, first, last)
        ran.add(shard)
        path = ran.folder(shard.key) / "samples.npz"
        np.savez(path, **{name: values[first:last] for name, values in samples.items()})
        ran.put(shard, replace(record, files={"samples.npz": file_hash(path)}))
        shards.append(shard.key)
    columns, _, metrics = assemble(ran, replace(whole, parts=tuple(shards)))
    assert metrics.metric == "nonlinearity"
    assert all(np.array_equal(columns[name], values) for name, values in samples.items())


def test_the_command_draws_them(bench: Bench, ran: Store) -> None:
    words = ("report", "--results-dir", "results", "--output", "page.html", "--figures", "figures", "--no-images")
    assert bench(*words).code == 0
    page = Path("page.html").read_text()
    assert len(re.findall(r'<section class="group" id="[\w-]+-surface"', page)) == 1
    assert "Loss around the images" in page
    (picture,) = Path("figures").glob("surface-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    clips = re.findall(r'<clipPath id="(\w+)"', picture.with_suffix(".svg").read_text())
    assert clips == [f"clip{k}" for k in range(3)]  # a box for each panel, named alike in every run
    (line,) = csv.DictReader(picture.with_suffix(".csv").open())
    bends = np.concatenate([ran.samples(key)["nonlinearity"] for key in keys(ran)])
    assert float(line["nonlinearity, mean"]) == pytest.approx(bends.mean(), rel=1e-3)
    assert line["defense"] == "standard"
