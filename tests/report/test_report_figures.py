"""Figures that need more than the tables: training logs, security curves, the loss around the weights, images; and the
provenance of every number."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import evaluated, full, train_job, trained
from harness import Bench, tiny, write_plugins
from report_page import HOSTILE, Page, all_judged, html, log, matrix, picture, with_images

from bench.commands.report_images import Strips
from bench.core.stats import wilson
from bench.planning.job import Job
from bench.planning.job_fields import PluginChoice
from bench.records.store import Store
from bench.report.board import boards
from bench.report.distances import distance_curves
from bench.report.heatmap import heat_maps
from bench.report.images import MAX_IMAGES, MAX_PIXELS, Fetched, Picture, Wanted, image_grids
from bench.report.lines import security_curves
from bench.report.provenance import origins
from bench.report.svg import inline
from bench.report.training import training_curves
from bench.report.weights import flatness_curves
from bench.results.evaluations import evaluations


def texts(svg: str) -> str:
    return "\n".join(Page(svg).text)


def test_training_curves_are_the_sum_of_the_terms_for_every_state(store: Store) -> None:
    metrics = {"final_terms": {"ce": 0.5, "kl": 0.25}}
    first, second = (trained(store, "guard", seed, metrics=metrics) for seed in (0, 1))
    between = {"ce": 1.0, "kl": 0.5, "sigma": 9.0}
    final = {"ce": 0.5, "kl": 0.25, "sigma": 9.0, "validation": 0.875}
    log(store, first, {"ce": 2.0, "kl": 1.0, "sigma": 9.0}, between, final)
    log(store, second, {"ce": 4.0, "kl": 0.5, "total": 4.5})
    diverged = trained(store, "guard", 2, state="diverged")
    log(store, diverged, {"ce": 5.0, "kl": 1.0})
    running = train_job("guard", 3)
    store.add(running)
    log(store, running, {"ce": 6.0, "kl": 1.0})
    trained(store, "silent")  # no log
    (plot,) = training_curves(store, [])
    about = {line[1]: line[2:] for line in plot.lines}
    assert about[0] == ["done", 3, "3", "0.75", "ce 0.5 + kl 0.25", "87.50"]
    assert about[1] == ["done", 1, "4.5", "4.5", "ce 4 + kl 0.5", "–"]
    assert about[2][:3] == ["diverged", 1, "6"]
    assert about[3][:3] == ["running or killed", 1, "7"]
    assert {line[0] for line in plot.lines} == {"guard (train_eps=0.1)"}
    assert [(d["seed"], d["epoch"], d["loss"], d.get("sigma")) for d in plot.data][:2] == [
        (0, 1, 3.0, 9),
        (0, 2, 1.5, 9),
    ]
    assert plot.data[0]["key"] == first.key
    assert [line[0] for line in plot.behind] == [[job.key] for job in (first, second, diverged, running)]
    for said in ("n 100 training images", "eps Linf 0.1", "seeds 0, 1, 2, 3", "device CPU x", "validation accuracy"):
        assert said in plot.caption
    assert "guard (train_eps=0.1)" in texts(plot.svg())


def test_panels_show_the_best_rows_and_standard(store: Store) -> None:
    for k in range(24):
        job = trained(store, f"m{k:02d}", metrics={"final_terms": {"ce": 1.0}})
        log(store, job, *[{"ce": 1.0}] * 3)
        full(store, job, 100 + 10 * k)
    baseline = trained(store, "standard", metrics={"final_terms": {"ce": 1.0}})
    log(store, baseline, *[{"ce": 1.0}] * 3)
    full(store, baseline, 1)
    (plot,) = training_curves(store, all_judged(store))
    shown = texts(plot.svg())
    assert [name for name in ("standard", "m23", "m05", "m04", "m00") if name in shown] == ["standard", "m23", "m05"]
    assert len(plot.lines) == 25
    assert "Shown: the best 20 of 25" in plot.caption


def test_security_curves_use_only_the_attack_curve(store: Store) -> None:
    train = trained(store)
    clean = evaluated(store, train, "clean", [1, 1, 1, 1])
    broken = np.array([0.05, 0.1, math.inf, math.inf])
    settings = {"budgets": ["0.05", "0.1"]}
    key = evaluated(store, train, "curve", [0, 0, 1, 1], settings, columns={"broken_at": broken})
    evaluated(store, train, "steep", [0, 0, 0, 0], {"steps": 40})
    (plot,) = security_curves(all_judged(store))
    assert [line[1:3] for line in plot.lines] == [[0.0, 1.0], [0.05, 0.75], [0.1, 0.5]]
    low, high = wilson(2, 4)
    assert plot.lines[2][3:] == pytest.approx([low, high], abs=1e-4)
    assert [behind[2] for behind in plot.behind] == [[clean], [key], [key]]
    assert "n 4;" in plot.caption


def flat(store: Store, train: Job, rise: float, spread: tuple[float, float]) -> str:
    columns: dict[str, Any] = {
        "clean_loss": np.array([1.0, 3.0]),
        "adversarial_loss": np.array([2.0, 4.0]),
        "clean_loss_0.5": np.array([[2.0, 4.0], [2.0, 4.0]]),
        "adversarial_loss_0.5": np.array([spread, spread]),
        "clean_loss_1": np.array([[2.0, 4.0], [2.0, 4.0]]),
        "adversarial_loss_1": np.array([spread, spread]),
        "clean_rise": np.array([0.25, 0.75]),
        "adversarial_rise": np.array([rise, rise]),
    }
    return evaluated(store, train, "flatness", [1, 1], columns=columns, metrics={"metric": "adversarial_rise"})


def test_the_loss_around_the_weights_is_the_mean_over_images_and_directions(store: Store) -> None:
    guard, other = trained(store), trained(store, "other")
    key = flat(store, guard, 0.5, (6.0, 10.0))
    flat(store, other, 0.125, (5.0, 5.0))
    (plot,) = flatness_curves(store, evaluations(store).readable)
    assert [list(line) for line in plot.lines] == [  # the flattest first
        ["other trained at 0.1", "0", "2", "3", "0.5", "0.125"],
        *(["other trained at 0.1", at, "3", "5", "0.5", "0.125"] for at in ("0.5", "1")),
        ["guard trained at 0.1", "0", "2", "3", "0.5", "0.5"],
        *(["guard trained at 0.1", at, "3", "8", "0.5", "0.5"] for at in ("0.5", "1")),
    ]
    assert plot.behind[3][0] == [key]
    assert "n 2; eps Linf 0.1; seeds 0; device CPU x" in plot.caption
    assert plot.threat == "Linf eps = 0.1"  # as the tables call it: the filter compares them


def minimal(store: Store, train: Job, distance: list[float], clean: list[int], **pixels: Any) -> str:
    found = np.array(distance)
    right = np.array(clean, dtype=bool)
    columns = {"distance": np.where(right, found, math.nan), "clean": right, **pixels}
    return evaluated(store, train, "least", list(right & (found > 0.1)), columns=columns)


def test_the_share_of_robust_images_by_the_distance_that_an_attack_found(store: Store) -> None:
    keys = [
        minimal(store, trained(store, seed=0), [0.05, 0.15, 0.2, math.inf], [1, 1, 1, 1]),
        minimal(store, trained(store, seed=1), [0.05, 0.3, 0.4, 9.0], [1, 1, 1, 0]),
    ]
    counted = {"pixels": np.array([1.0, 2.0, 3.0, math.inf])}
    minimal(store, trained(store, "other"), [0.01, 0.02, 0.03, math.inf], [1, 1, 1, 1], **counted)
    evaluated(store, trained(store, "bounded"), "steep", [1, 1, 0, 0])
    plot, by_pixels = distance_curves(store, evaluations(store).readable)
    assert [list(line) for line in plot.lines] == [
        ["guard trained at 0.1", "87.5", "0.05", "0.15", "0.3", "12.5"],
        ["other trained at 0.1", "100.0", "0.01", "0.02", "0.03", "25.0"],
    ]
    assert plot.behind[0][0] == keys
    assert (plot.dataset, plot.threat) == ("toy", "Linf eps = 0.1")
    assert "n 4; eps Linf 0.1; seeds 0, 1; device CPU x" in plot.caption
    guard, _, eps = plot.drawing.axes[0].lines
    x, y = (np.asarray(values, dtype=float) for values in guard.get_data())
    for at, share in ((0.0, 87.5), (0.1, 62.5), (0.16, 50.0), (0.4, 12.5)):  # of seven right, two at 0.05, one at 0.15
        assert y[np.searchsorted(x, at + 1e-9, side="right") - 1] == pytest.approx(share)
    assert list(eps.get_xdata()) == [0.1, 0.1]
    assert [list(line) for line in by_pixels.lines] == [["other trained at 0.1", "100.0", "1", "2", "3", "25.0"]]
    assert "changed pixels" in texts(by_pixels.svg())
    assert "dotted line" not in by_pixels.caption


def test_models_with_a_loss_that_is_not_finite_come_last_and_are_labeled(store: Store) -> None:
    flat(store, trained(store), math.nan, (math.inf, 1.0))
    flat(store, trained(store, "other"), 9.0, (5.0, 5.0))
    (plot,) = flatness_curves(store, evaluations(store).readable)
    assert [line[0] for line in plot.lines][::3] == ["other trained at 0.1", "guard trained at 0.1"]
    assert plot.lines[4][3:] == ["not finite", "0.5", "not finite"]
    assert plot.svg().startswith("<svg")


def test_every_cell_has_the_keys_of_its_records(store: Store) -> None:
    matrix(store)
    known = origins(store)
    board = boards(all_judged(store))[0]
    line = next(line for line in board.lines if line.row.defense == "guard")
    (heat, *_), jobs = heat_maps([board]), store.jobs()
    at = next(k for k, cells in enumerate(heat.lines) if cells[0] == "guard")
    behind = {name.partition(" n=")[0]: heat.behind[at].get(k, []) for k, name in enumerate(heat.header)}
    assert behind["clean"] == list(line.clean.keys)
    assert sorted(behind["worst case"]) == sorted(line.robust.keys)

    def asked(keys: Sequence[str]) -> list[tuple[str, int]]:
        return [(getattr(jobs[key], "attack", PluginChoice("train", {})).name, jobs[key].seed) for key in keys]

    assert asked(line.clean.keys) == [("clean", 0), ("clean", 1)]
    assert asked(line.cost.keys) == [("train", 0), ("train", 1)]
    assert asked(behind["steep (steps=40)"]) == [("steep", 0), ("steep", 1)]
    assert sorted(asked(line.robust.keys)) == sorted(
        (name, seed) for name in ("autoattack", "clean", "steep") for seed in (0, 1)
    )
    assert {jobs[key].threat.eps for key in behind["steep (steps=40)"]} == {"0.1"}
    text = html(store)
    order = re.findall(r'<tr id="k-(\w+)"', text)
    assert order == [one.job.key for one in known.lines] == store.keys()
    places = known.positions(behind["clean"])
    assert [order[int(place)] for place in places.split()] == behind["clean"]
    assert f'data-k="{places}">100.0<' in text
    assert not [k for found in re.findall(r'data-k="([^"]*)"', text) for k in found.split() if int(k) >= len(order)]


def test_equal_versions_are_listed_once(store: Store) -> None:
    for seed in (0, 1, 2):
        job = trained(store, seed=seed)
        record = store.record(job.key)
        assert record is not None
        versions = {"python": "3.11", "torch": "2.13" if seed < 2 else "9.9"}
        store.put(job, replace(record, provenance=replace(record.provenance, versions=versions)))
    known = origins(store)
    assert sorted(known.versions) == ["python 3.11, torch 2.13", "python 3.11, torch 9.9"]
    assert sorted(known.versions[one.versions] for one in known.lines if one.versions is not None) == [
        "python 3.11, torch 2.13", "python 3.11, torch 2.13", "python 3.11, torch 9.9",
    ]  # fmt: skip


def test_inlined_svg_loses_only_what_has_no_effect() -> None:
    source = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 72 72">'
        '<metadata>m</metadata><defs><style>*{}</style></defs>\n <g id="a"><g>\n<path d="M 1.25 2.04  L 30.0 4 " '
        'style="fill: #1b1f24; stroke: none"/></g></g><g clip-path="url(#c)"><use xlink:href="#m"/></g>'
        '<clipPath id="c"/><path id="m"/><image transform="matrix(0.123456 0 0 0.123456 0 0)" '
        'xlink:href="data:image/png;base64,AAAA"/><text transform="rotate(-0 1 2)"> a <tspan>b</tspan> c </text></svg>'
    )
    svg = inline(source.encode(), "one", "what it shows")
    assert '<path d="M1.2 2L30 4" fill="currentColor" stroke="none" />' in svg
    assert "matrix(0.123456 0 0 0.123456 0 0)" in svg
    assert 'href="data:image/png;base64,AAAA"' in svg
    assert "> a <tspan>b</tspan> c </text>" in svg
    assert svg.count("<g") == 1
    assert not re.search(r"rotate|style|metadata", svg)
    (clip,) = re.findall(r'clip-path="url\(#([\w-]+)\)"', svg)
    assert f'id="{clip}"' in svg
    assert set(re.findall(r'href="#([\w-]+)"', svg)) <= set(re.findall(r' id="([\w-]+)"', svg))
    assert not set(re.findall(r'id="([\w-]+)"', svg)) & set(
        re.findall(r'id="([\w-]+)"', inline(source.encode(), "two", ""))
    )


def test_all_models_show_the_same_images_under_all_attacks(store: Store) -> None:
    train, other = trained(store, HOSTILE), trained(store, "standard")
    clean = {"clean": np.array([1, 1, 1, 0])}
    evaluated(store, train, "clean", [1, 1, 1, 0])
    weak = with_images(store, train, "onestep", 3, columns=clean)
    strong = with_images(store, train, "steep", 1, columns=clean)
    theirs = with_images(store, other, "steep", 2)
    evaluated(store, train, "square", [0] * 4)  # stronger still, but its images were not kept
    with_images(store, train, "curve", 0, settings={"budgets": ["0.1"]}, columns={"broken_at": np.full(4, 0.1)})
    asked: list[Wanted] = []

    def fetch(wanted: list[Wanted]) -> Fetched:
        asked.extend(wanted)
        pictures = {one.entry.key: [picture(28, one.entry.key != weak) for _ in one.indices] for one in wanted}
        return Fetched(pictures, ["Something is missing."])

    (plot,), note = image_grids(store, boards(all_judged(store)), fetch)
    assert {one.entry.key for one in asked} == {weak, strong, theirs}
    # image 3 is misclassified without an attack; most models are fooled on 2, fewest on 0
    assert {one.indices for one in asked} == {(2, 1, 0)}
    assert note == "Something is missing."
    ours = next(strip for strip in plot.strips if strip.name.startswith(HOSTILE))
    assert [[entry.key for entry, _ in image] for image in ours.images] == [[strong, weak]] * 3
    assert [entry.key for entry, _ in ours.shown] == [strong] * 3
    assert [ours.name, "steep", 7, HOSTILE, "3", "0.88", "abstains", "–", "yes"] in [list(line) for line in plot.lines]
    assert [ours.name, "onestep", 7, HOSTILE, "3", "0.88", "abstains", "–", "no"] in [list(line) for line in plot.lines]
    assert plot.svg().count("<image") == 6
    assert "n 4; eps Linf 0.1; seeds 0; device CPU x" in plot.caption
    page = Page(html(store, fetch))
    shown = [b for b in page.all("button") if b.get("popovertarget")]
    assert [b["class"] for b in shown] == ["fooled"] * 6
    assert {b["popovertarget"] for b in shown} == {d["id"] for d in page.all("div") if "popover" in d}
    assert len(page.all("img")) == 3 + 6 + 3 * (2 + 1)  # clean, shown, and in each popover every attack
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))


def test_images_are_left_out_where_the_page_would_be_too_large(store: Store) -> None:
    for name in ("a", "b"):
        train = trained(store, name)
        evaluated(store, train, "clean", [1] * 4)
        with_images(store, train, "steep", 1)
    found = boards(all_judged(store))

    def count(side: int) -> tuple[list[int], str]:
        def fetch(wanted: list[Wanted]) -> Fetched:
            return Fetched({w.entry.key: [picture(side, channels=3) for _ in w.indices] for w in wanted})

        plots, note = image_grids(store, found, fetch)
        return [len(strip.images) for plot in plots for strip in plot.strips], note

    side = math.isqrt(MAX_PIXELS // (2 * 2 * 3))  # two models, an attack each, shown at first and in its list
    assert count(side) == ([1, 1], "")
    assert count(side // 2) == ([4, 4], "")
    assert count(side + 1) == ([], "Some images are left out, to keep the page small.")


def test_a_page_without_stored_images_gives_the_reason(store: Store) -> None:
    matrix(store)
    assert "No images are shown: no evaluation has" in html(store)


@pytest.fixture
def attacked(bench: Bench, tmp_path: Path) -> Store:
    """A plain net on digits under noise and under FGSM."""
    outcome = bench(*tiny(*write_plugins(tmp_path), attack="clean,fgsm"), "--eps", "0.3")
    assert outcome.code == 0, outcome.err
    return Store(Path("results"))


def strips(store: Store, root: Path) -> Fetched:
    found: list[Fetched] = []

    def fetch(wanted: list[Wanted]) -> Fetched:
        found.append(Strips(store, root).fetch(wanted))
        return found[0]

    image_grids(store, boards(all_judged(store)), fetch)
    return found[0]


def test_pictures_are_the_evaluated_images_with_the_models_predictions(attacked: Store, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    fetched = strips(attacked, tmp_path)
    assert fetched.notes == []
    ((key, pictures),) = fetched.strips.items()
    samples = attacked.samples(key)
    assert attacked.job(key).attack.name == "fgsm"
    assert 1 <= len(pictures) <= MAX_IMAGES
    images = load_digits().images / 16
    assert all(np.abs(images - shown.clean).max((1, 2)).min() < 0.01 for shown in pictures)
    for shown in pictures:
        at = int(np.flatnonzero(samples["index"] == shown.index)[0])
        assert shown.label == str(samples["label"][at])
        assert shown.fooled == (not samples["correct"][at])
        assert np.abs(shown.attacked - shown.clean).max() == pytest.approx(samples["size"][at], abs=1e-6)
        assert shown.predictions is not None
        (clean, sure), (attacked_as, _) = shown.predictions
        assert (clean == shown.label) == bool(samples["clean"][at])
        assert (attacked_as == shown.label) == (not shown.fooled)
        assert 0.1 < sure <= 1
    fooled = [p.fooled for p in pictures]
    assert fooled == sorted(fooled, reverse=True)


def test_missing_or_damaged_files_are_reported(attacked: Store, tmp_path: Path) -> None:
    for weights in attacked.root.glob("*/weights-last.safetensors"):
        weights.unlink()
    ((key, pictures),) = strips(attacked, tmp_path).strips.items()
    assert [p.predictions for p in pictures] == [None] * len(pictures)
    images = attacked.folder(key) / "adversarial.safetensors"
    images.write_bytes(images.read_bytes()[:-1] + b"\1")
    damaged = strips(attacked, tmp_path)
    assert damaged.strips == {}
    assert damaged.notes == [
        f"Without images: adversarial.safetensors of {key} is absent or damaged; `bench run` makes it again if a job "
        "needs it."
    ]
    store = Store(tmp_path / "other")
    store.prepare()
    train = trained(store, data={"name": "mnist", "size": 28})
    evaluated(store, train, "clean", [1] * 4)
    with_images(store, train, "steep", 1)
    (note,) = strips(store, tmp_path).notes
    assert "no clean images of mnist here" in note
    assert str(tmp_path) not in note


def test_images_of_another_test_set_are_not_shown(attacked: Store, tmp_path: Path) -> None:
    for job, record in list(attacked.records()):
        if job.kind == "evaluate":
            attacked.put(job, replace(record, metrics=replace(record.metrics, test_hash="0" * 16)))
    fetched = strips(attacked, tmp_path)
    assert fetched.strips == {}
    assert "other test images" in fetched.notes[0]


def test_the_command_shows_images_unless_asked_not_to(bench: Bench, attacked: Store, tmp_path: Path) -> None:
    words = ("report", "--results-dir", attacked.root, "--output", "page.html")
    assert bench(*words, "--figures", "figures").code == 0
    assert Path("page.html").read_text().count("data:image/png") >= 3
    (drawn,) = Path("figures").glob("images-*.svg")
    assert (drawn.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    assert drawn.with_suffix(".csv").read_text().startswith("defense,attack,test image,true class")
    assert not list(Path("figures").glob("training-*"))  # two epochs
    assert bench(*words, "--no-images").code == 0
    page = Path("page.html").read_text()
    assert "data:image/png" not in page
    assert "Images were not requested." in page
    shutil.rmtree(attacked.root)


def noisy_picture(generator: np.random.Generator) -> Picture:
    clean, change = (generator.random((32, 32, 3)).astype(np.float32) for _ in range(2))  # worst for a PNG
    return Picture(7, "ship", clean, (clean + change * 8 / 255).clip(0, 1), True, (("ship", 0.9), ("frog", 0.8)))


@pytest.mark.slow
def test_twenty_defenses_fit_into_two_megabytes(store: Store) -> None:
    generator, labels = np.random.default_rng(0), np.arange(200) % 10
    for k in range(20):
        for seed in (0, 1, 2):
            job = trained(store, f"defense_{k}", seed, metrics={"final_terms": {"ce": 0.1, "kl": 0.1}})
            log(store, job, *({"ce": 1 / e, "kl": 0.5 / e, "validation": 1 - 0.5 / e} for e in range(1, 101)))
            evaluated(store, job, "clean", list(generator.random(200) < 0.9), columns={"label": labels})
            for eps in ("2/255", "4/255", "8/255"):
                for attack in ("fgsm", "pgd", "square", "autoattack", "eot", "transfer"):
                    right = list(generator.random(200) < 0.5)
                    evaluated(store, job, attack, right, columns={"label": labels}, eps=eps)
                with_images(store, job, "steep", 2, eps=eps, columns={"label": labels[:4]})

    def fetch(wanted: list[Wanted]) -> Fetched:
        return Fetched({one.entry.key: [noisy_picture(generator) for _ in range(3)] for one in wanted})

    page = html(store, fetch)
    assert page.count("<img") >= 54
    assert len(page.encode()) < 2_000_000
