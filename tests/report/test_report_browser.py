"""The page in a browser: mouse and keyboard, light and dark, desktop and phone; and the rules of axe-core."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ABSENT, PROGRAM, Browser
from factories import evaluated, full, trained
from paths import ROOT
from report_page import HOSTILE, html, log, matrix, picture, with_images

from bench.records.store import Store
from bench.report.canvas import SHADES
from bench.report.images import Fetched, Wanted
from bench.report.page import _shade

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=ABSENT)
AXE = Path(os.environ.get("BENCH_AXE") or ROOT / ".venv" / "axe-core" / "package" / "axe.min.js")
BOARD = "[...document.querySelectorAll('.board')].find(b => b.textContent.includes('guard')).querySelector('table')"
COUNT = "document.getElementById('f-count').textContent"
SHOWN = "[...document.querySelectorAll('.tab')].filter(t => t.checkVisibility()).map(t => t.id)"
FIRST = "toy-linf-eps-0-1"


def fetch(wanted: list[Wanted]) -> Fetched:
    return Fetched(
        {one.entry.key: [picture(8), picture(8, fooled=False)] for one in wanted}, ["Something is not here."]
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section, under names that attempt markup injection."""
    folder = tmp_path_factory.mktemp("page")
    store = Store(folder / "results")
    store.prepare()
    matrix(store)
    train = trained(store, HOSTILE, metrics={"final_terms": {"ce": 1.0}})
    log(store, train, {"ce": 2.0, "validation": 0.5}, {"ce": 1.0, "validation": 0.75}, {"ce": 0.5})
    full(store, trained(store, "third", seconds=3.0), 250)
    labels = {"label": np.array([0, 0, 1, 1])}
    evaluated(store, train, "clean", [1] * 4, columns=labels)
    with_images(store, train, "steep", 2, columns=labels)
    budgets = {"budgets": ["0.05", "0.1"]}
    evaluated(store, train, "curve", [0, 0, 1, 1], budgets, columns=labels | {"broken_at": np.array([0.05, 0.1, 9, 9])})
    losses = {f"{part}_{name}": np.array([1.0, 2.0]) for part in ("clean", "adversarial") for name in ("loss", "rise")}
    losses |= {
        f"{part}_loss_{at}": np.array([[2.0, 3.0]] * 2) for part in ("clean", "adversarial") for at in ("0.5", "1")
    }
    evaluated(store, train, "flatness", [1, 1], columns=losses, metrics={"metric": "adversarial_rise"})
    plane = {"loss": np.arange(18.0).reshape(2, 3, 3), "clean_loss": np.array([4.0, 13.0]), "off_gradient": np.ones(2)}
    plane |= {"nonlinearity": np.array([0.5, 0.25])}
    evaluated(store, train, "surface", [1, 1], columns=plane, metrics={"metric": "nonlinearity"})
    elsewhere = trained(store, "abroad", data={"name": "other"})
    evaluated(store, elsewhere, "clean", [1, 0])
    smoothed = trained(store, "hazy_too", deploys="smoothed")
    evaluated(store, smoothed, "clean", [1, 1, 1, 0])
    evaluated(store, smoothed, "certify", [1, 1, 1, 0], columns={"radius": np.array([0.1, 0.6, 1.2, 5.0])})
    target = folder / "page.html"
    target.write_text(html(store, fetch))
    return target


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def browser(running: Browser, page: Path) -> Iterator[Browser]:
    """The page, newly opened; after each test there must be no error and no request."""
    running.open(page)
    running.js("localStorage.clear()")
    running.open(page)
    yield running
    assert running.log == []
    assert {request for request in running.requests if not request.startswith("data:")} == {page.as_uri()}


def column(browser: Browser, number: int) -> list[str]:
    found: list[str] = browser.js(
        f"[...{BOARD}.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[{number}].textContent.trim())"
    )
    return found


def place(browser: Browser, name: str) -> int:
    found: int = browser.js(f"[...{BOARD}.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === '{name}')")
    return found


def focused(browser: Browser, what: str = "textContent") -> str:
    return str(browser.js(f"document.activeElement.{what}"))


def test_it_holds_every_section(browser: Browser) -> None:
    names = browser.js("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert names == ["other-data", "toy-data", "how", "checks", "origins"]
    groups = set(browser.js("[...document.querySelectorAll('.group')].map(s => s.id)"))
    kinds = {"heat", "trade", "cost", "flatness", "surface", "classes", "images"}
    assert {f"{FIRST}-{kind}" for kind in kinds} <= groups
    assert {f"toy-data-{kind}" for kind in ("eps", "curve", "training", "certified")} <= groups
    assert browser.js(f"document.querySelectorAll('#{FIRST}-images img').length") >= 6
    assert "Something is not here." in browser.js("document.querySelector('main').textContent")
    assert browser.js("[...document.querySelectorAll('img')].every(i => i.src.startsWith('data:') && i.naturalWidth)")


def chosen(browser: Browser) -> list[str]:
    """The selected tabs and what Tab reaches among them."""
    found: list[str] = browser.js(
        "[...document.querySelectorAll('#tabs [aria-selected=true]')].filter(a => a.checkVisibility())"
        ".map(a => a.textContent)"
    )
    return found


def test_one_data_set_and_threat_is_shown_at_a_time(browser: Browser, page: Path) -> None:
    assert (browser.js(SHOWN), chosen(browser)) == ([FIRST], ["toy", "Linf eps = 0.1"])  # the one with most rows
    browser.click("document.querySelector('#tabs a[href=\"#toy-linf-eps-0-2\"]')")
    assert (browser.js(SHOWN), chosen(browser)) == (["toy-linf-eps-0-2"], ["toy", "Linf eps = 0.2"])
    assert browser.js("location.hash") == "#toy-linf-eps-0-2"
    browser.press("ArrowLeft")
    assert browser.js(SHOWN) == [FIRST]
    assert focused(browser) == "Linf eps = 0.1"
    browser.press("Tab", shift=True)
    assert focused(browser) == "toy"  # Tab stops once in a list
    browser.press("ArrowRight")
    assert (browser.js(SHOWN), chosen(browser)) == (["other-no-attack"], ["other", "no attack"])
    browser.js(f"location.hash = '{FIRST}-surface'")
    browser.until(f"document.querySelector('#{FIRST}-surface').getBoundingClientRect().top < 200")
    assert (browser.js(SHOWN), chosen(browser)) == ([FIRST], ["toy", "Linf eps = 0.1"])
    roles = (
        "[...document.querySelectorAll('[role=tab]')].every(a => document.querySelector(a.hash).role === 'tabpanel')"
    )
    assert browser.js(roles)
    assert browser.js("document.getElementById('tabs').getBoundingClientRect().top") == 0  # it stays in view
    links = browser.js("[...document.querySelectorAll('#jump a')].map(a => a.hash.slice(1))")
    assert links[0] == f"{FIRST}-heat"
    assert links[-1].startswith("toy-data-")


def test_a_method_is_highlighted_in_all_figures_until_it_is_released(browser: Browser) -> None:
    mark = browser.js(f"[...{BOARD}.tBodies[0].rows].find(r => r.cells[1].textContent === 'guard').dataset.m")
    on = "[...new Set([...document.querySelectorAll('.on')].map(e => e.dataset.m))]"
    pale = "document.querySelectorAll('.plot svg [data-m]:not(.on)').length"
    figures = "[...new Set([...document.querySelectorAll('.plot .on')].map(e => e.closest('.group').id))]"
    press = f"document.querySelector('#toy-data-eps li[data-m=\"{mark}\"] button')"
    browser.hover(press)
    assert browser.js(on) == [mark]
    assert {f"{FIRST}-trade", f"{FIRST}-cost", "toy-data-eps"} <= set(browser.js(figures))
    opacity = "getComputedStyle(document.querySelector('#toy-data-eps svg [data-m]:not(.on)')).opacity"
    assert float(browser.js(opacity)) < 0.2
    assert browser.js(pale) > 3
    browser.hover("document.querySelector('h1')")
    assert browser.js(on) == []
    browser.click(press)
    browser.hover("document.querySelector('h1')")
    assert (browser.js(on), browser.js(f"{press}.ariaPressed")) == ([mark], "true")
    assert browser.js("document.getElementById('lit').textContent") == "✕ guard"
    browser.click("document.getElementById('lit')")
    assert (browser.js(on), browser.js(f"{press}.ariaPressed")) == ([], "false")
    browser.js(f"[...{BOARD}.querySelectorAll('button.pin')].find(b => b.textContent === 'guard').focus()")
    browser.press("Enter")
    assert browser.js(on) == [mark]
    browser.press("Enter")
    third = browser.js(f"[...{BOARD}.tBodies[0].rows].find(r => r.cells[1].textContent === 'third').dataset.m")
    browser.hover(f"document.querySelector('#{FIRST}-cost svg [data-m=\"{third}\"] use')")
    assert browser.js("document.getElementById('tip').textContent") == "third"


def test_a_click_on_an_image_shows_all_attacks_on_it(browser: Browser) -> None:
    press = f"document.querySelector('#{FIRST}-images tbody button')"
    popover = f"document.getElementById({press}.getAttribute('popovertarget'))"
    assert browser.js(f"{press}.className") == "fooled"
    browser.click(press)
    assert browser.js(f"{popover}.matches(':popover-open')")
    assert "steep" in browser.js(f"{popover}.textContent")
    assert browser.js(f"{popover}.querySelectorAll('.diff img').length") == 2  # the clean one over the attacked one
    browser.press("Escape")
    assert not browser.js(f"{popover}.matches(':popover-open')")
    browser.press("Enter")
    assert browser.js(f"{popover}.matches(':popover-open')")
    assert browser.js(f"{popover}.querySelectorAll('.diff').length") == 1


def test_more_columns_are_shown_on_demand(browser: Browser) -> None:
    cells = f"[...{BOARD}.tHead.rows[0].cells].filter(c => c.checkVisibility()).map(c => c.textContent.trim())"
    short = ["Rank", "Method", "Clean", "Robust", "95 % interval", "n × seeds", "Verdict", "Training"]
    assert browser.js(cells) == short
    browser.js(f"{BOARD}.closest('.board').querySelector('.toggle input').focus()")
    browser.press(" ")
    assert len(browser.js(cells)) > 15
    assert browser.js(cells)[-1] == "Evidence"
    browser.press(" ")
    assert browser.js(cells) == short


def test_sorting_by_click_and_by_keyboard(browser: Browser) -> None:
    number = place(browser, "Clean")
    head = f"{BOARD}.tHead.rows[0].cells[{number}]"
    before = column(browser, 1)
    assert len(before) >= 3
    method = f"{BOARD}.tHead.rows[0].cells[1]"
    browser.click(f"{method}.querySelector('button')")
    assert browser.js(f"{method}.getAttribute('aria-sort')") == "ascending"
    ascending = column(browser, 1)
    browser.press("Enter")  # the button that was clicked has the focus
    assert browser.js(f"{method}.getAttribute('aria-sort')") == "descending"
    assert column(browser, 1) == ascending[::-1]
    assert sorted(before) == sorted(ascending)
    browser.js(f"{head}.querySelector('button').focus()")
    browser.press(" ")
    values = [float(re.match(r"[\d.]+", text).group()) for text in column(browser, number)]  # type: ignore[union-attr]
    assert values == sorted(values, reverse=browser.js(f"{head}.getAttribute('aria-sort')") == "descending")
    assert browser.js(f"{method}.getAttribute('aria-sort')") in (None, "none")


def test_filtering_by_click_and_by_keyboard(browser: Browser) -> None:
    every = browser.js(COUNT)
    shown, total = map(int, re.findall(r"\d+", every))
    assert shown == total > 3
    browser.click("document.getElementById('f-text')")
    browser.press("guard")
    assert browser.js(COUNT) == f"1 of {total} rows"
    browser.press("Tab", "Tab")  # verdict, then the button
    assert focused(browser) == "Clear"
    browser.press("Enter")
    browser.until(f"{COUNT} === '{every}'")
    browser.js("document.getElementById('f-verdict').focus()")
    browser.press("ArrowDown")
    assert browser.js("document.getElementById('f-verdict').value") == "OK"
    assert browser.js(COUNT) == f"0 of {total} rows"
    browser.click("document.querySelector('#filters button')")
    browser.until(f"{COUNT} === '{every}'")
    browser.click("document.querySelector('#tabs a[href=\"#toy-linf-eps-0-2\"]')")
    assert browser.js(COUNT) == "1 of 1 rows"  # those of the tab


def test_the_theme_follows_the_system_until_one_is_chosen_and_stored(browser: Browser, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.js(ground) == "rgb(255, 255, 255)"
    browser.open(page, dark=True)
    dark = browser.js(ground)
    assert dark != "rgb(255, 255, 255)"
    ink = "getComputedStyle(document.querySelector('#toy-data-eps svg text[fill=currentColor]')).fill"
    assert browser.js(ink) == browser.js("getComputedStyle(document.body).color")  # figures follow
    browser.click("document.getElementById('theme')")
    assert (focused(browser), browser.js(ground)) == ("Theme: light", "rgb(255, 255, 255)")
    browser.press("Enter")
    assert (focused(browser), browser.js(ground)) == ("Theme: dark", dark)
    browser.open(page)
    assert browser.js(ground) == dark
    browser.js("document.getElementById('theme').focus()")
    browser.press(" ")
    assert (focused(browser), browser.js(ground)) == ("Theme: system", "rgb(255, 255, 255)")


def dialog(browser: Browser) -> list[list[str]] | None:
    found: list[list[str]] | None = browser.js(
        "(() => { const d = document.getElementById('where'); return d.open ? [...d.querySelectorAll('tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent)) : null; })()"
    )
    return found


def test_a_click_on_a_number_shows_its_records(browser: Browser) -> None:
    number = place(browser, "Clean")
    browser.click(f"{BOARD}.tBodies[0].rows[0].cells[{number}].querySelector('button')")
    told = dialog(browser)
    assert told is not None
    assert [line[1:4] for line in told] == [["evaluate", "clean, n 1000", "0"], ["evaluate", "clean, n 1000", "1"]]
    assert [line[6:8] for line in told] == [["CPU x", "abc"]] * 2
    assert browser.js("document.getElementById('where-h').textContent") == "guard, Clean: 100.0"
    browser.click("document.querySelector('#where a')")
    assert dialog(browser) is None
    browser.until(f"document.activeElement.id === 'k-{told[0][0]}'")


def test_the_keyboard_shows_the_records_of_a_number(browser: Browser) -> None:
    first = place(browser, "Clean")
    rows = f"{BOARD}.tBodies[0].rows"
    assert browser.js(f"{rows}[0].querySelectorAll('button.n[tabindex=\"0\"]').length") == 1  # Tab stops once a row
    browser.js(f"{rows}[0].querySelector('button.n').focus()")
    browser.press("ArrowRight")
    assert browser.js("document.activeElement.closest('td').cellIndex") == first + 1
    browser.press("ArrowDown")
    assert browser.js("document.activeElement.closest('tr').rowIndex") == 2
    browser.press("Home", "ArrowLeft", "ArrowUp", "ArrowUp")  # neither goes beyond the table
    assert browser.js(f"document.activeElement === {rows}[0].cells[{first}].firstChild")
    browser.press("End", "Home", "Enter")
    assert len(dialog(browser) or []) == 2
    browser.press("Escape")
    assert dialog(browser) is None
    assert browser.js(f"document.activeElement === {rows}[0].cells[{first}].firstChild")  # back where it was
    stops = f"[...{rows}].map(r => [...r.querySelectorAll('button.n')].filter(b => b.tabIndex === 0).length)"
    assert set(browser.js(stops)) == {1}  # and there Tab comes back to
    assert browser.js("document.activeElement.tabIndex") == 0
    browser.press(" ")
    assert dialog(browser) is not None
    browser.click("document.getElementById('where-close')")
    assert dialog(browser) is None


def test_numbers_of_figures_show_their_records_too(browser: Browser) -> None:
    line = f"[...document.querySelectorAll('#{FIRST}-heat tbody tr')].find(r => r.cells[0].textContent === 'guard')"
    browser.click(f"{line}.querySelector('td[data-k] button')")
    assert [line[2] for line in dialog(browser) or []] == ["clean, n 1000"] * 2
    browser.press("Escape")
    browser.click("document.querySelector('#toy-data-training figure summary')")
    browser.click("document.querySelector('#toy-data-training tbody td button')")
    assert [line[1] for line in dialog(browser) or []] == ["train"]
    browser.press("Escape")


def test_tab_reaches_everything_in_the_order_of_the_page(browser: Browser) -> None:
    browser.js("document.body.focus()")
    seen: list[str] = []
    for _ in range(14):
        browser.press("Tab")
        seen.append(str(browser.js("document.activeElement.id || document.activeElement.textContent.trim()")))
    assert seen[0] == "Skip to the tables"
    assert seen[1:7] == ["Checks", "Provenance", "How to read this page", "theme", "toy", "Linf eps = 0.1"]
    order = browser.js(
        "[...document.querySelectorAll('a[href],button,input,select,summary,[tabindex]')].every(e => e.tabIndex <= 0)"
    )
    assert order  # nothing jumps the queue
    outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # and the focus is seen


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_horizontal_scrolling(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, width=360, height=740, dark=dark, phone=True)
    assert browser.js("document.documentElement.scrollWidth") <= 360
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 361 && "
    wide += "!e.closest('.scroll, #tabs, dialog')).map(e => e.tagName + e.id)"
    assert browser.js(wide) == ["A"] or browser.js(wide) == []  # the hidden skip link aside
    browser.click("document.getElementById('theme')")
    browser.click(f"{BOARD}.querySelector('td button.n')")
    box = browser.js(
        "(() => { const r = document.getElementById('where').getBoundingClientRect(); return [r.left, r.right]; })()"
    )
    assert 0 <= box[0] < box[1] <= 360
    browser.press("Escape")


def test_the_page_is_complete_without_script(running: Browser, page: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    text = page.read_text()
    bare.write_text(re.sub(r"script-src &#39;[^&]+", "script-src &#39;none", text))  # the browser refuses it
    running.open(bare)
    assert running.js("document.getElementById('filters').hidden && document.getElementById('theme').hidden")
    assert running.js("document.getElementById('keys').hidden")
    assert not running.js("document.querySelectorAll('td button:not([popovertarget])').length")
    assert len(running.js(SHOWN)) == running.js("document.querySelectorAll('.tab').length") > 2
    assert running.js("[...document.querySelectorAll('#tabs ul:not(#jump) a')].every(a => a.checkVisibility())")
    links = running.js("[...document.querySelectorAll('.board details a')].map(a => a.getAttribute('href').slice(1))")
    assert links
    assert running.js(f"{json.dumps(links)}.every(id => document.getElementById(id))")


RULES = (
    "axe.run(document, {resultTypes: ['violations']})"
    ".then(found => found.violations.map(v => [v.id, v.impact, v.nodes[0].html]))"
)


@pytest.mark.slow
@pytest.mark.parametrize("window", [{}, {"dark": True}, {"width": 390, "height": 844, "phone": True}])
def test_axe_core_finds_no_violation(browser: Browser, page: Path, window: dict[str, Any]) -> None:
    if not AXE.is_file():
        pytest.skip("no axe-core here: `make axe`, or name axe.min.js in BENCH_AXE")
    browser.open(page, **window)
    browser.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.js(AXE.read_text(encoding="utf-8") + "; 0")
    assert browser.js(RULES) == []
    browser.click("document.querySelector('td button.n')")
    assert browser.js(RULES) == []
    browser.press("Escape")
    # the rules are awake: a nameless button and pale text are found
    browser.js(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<button></button><p id=\"pale\">pale</p>'); "
        "document.getElementById('pale').style.color = '#8888'"
    )
    assert {"button-name", "color-contrast"} <= {rule for rule, *_ in browser.js(RULES)}


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_every_text_color_has_enough_contrast_on_every_background(theme: int) -> None:
    text = (ROOT / "bench" / "report" / "page.css").read_text()
    colours = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", text)}
    assert {"ink", "soft", "link", "ok", "flag", "bad", "page", "panel"} <= set(colours)
    for name in ("ink", "soft", "link", "ok", "flag", "bad"):
        for ground in ("page", "panel"):
            low, high = sorted(luminance(colours[which][theme]) for which in (name, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_the_text_of_every_colored_cell_has_enough_contrast() -> None:
    for k in range(SHADES + 1):
        ground, ink = re.fullmatch(r"background:(#\w{6});color:#(\w{3})", _shade(k / SHADES)).groups()  # type: ignore[union-attr]
        low, high = sorted(map(luminance, (ground, {"fff": "#ffffff", "000": "#000000"}[ink])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (k, ground, ink)


def test_a_print_has_every_column_and_every_note(running: Browser, page: Path) -> None:
    running.open(page, width=740)  # a sheet of US letter between margins of 1 cm; A4 is as wide
    running.print_media()
    cut = running.js(
        "[...document.querySelectorAll('.scroll')].filter(s => s.checkVisibility())"
        ".map(s => [s.getAttribute('aria-label'), s.firstElementChild.getBoundingClientRect().right - innerWidth])"
    )
    assert len(cut) >= 5
    assert [name for name, beyond in cut if beyond > 0] == []
    shown = "(e => e && e.checkVisibility({contentVisibilityAuto: true}) && e.getBoundingClientRect().height > 0)"
    assert running.js(f"{shown}(document.querySelector('details.note li'))")
    assert not running.js(f"{shown}(document.querySelector('figure details'))")
    assert running.js(f"[...document.querySelectorAll('.shaded td')].some{shown}")
