"""The writeup's HTML is one file that works offline, wide and narrow, with nothing cut off and no link astray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from cs336_systems.bench.records import Store
from cs336_systems.workbook.editions import build
from cs336_systems.workbook.evidence import Archive
from cs336_systems.workbook.index import load_index


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The writeup from published records."""
    folder = tmp_path_factory.mktemp("writeup")
    archive = Archive(Store.default(), load_index(), own=False)
    (path,) = build(archive, folder=folder, formats=["html"])
    return path


@pytest.fixture(params=[1280, 390], ids=["on a desk", "on a telephone"])
def page(browser: Browser, document: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    context = browser.new_context(offline=True, viewport={"width": request.param, "height": 900})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda made: asked.append(made.url))
    page.goto(document.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [document.as_uri()]
    yield page
    context.close()


def test_nothing_but_what_scrolls_by_itself_is_wider_than_the_window(page: Page) -> None:
    wide = page.evaluate(
        """() => [...document.querySelectorAll('main *')]
            .filter(each => each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .filter(each => !each.closest('table') || each.closest('.caption'))
            .filter(each => !each.closest('pre') && !each.querySelector('table') && each.tagName != 'TABLE')
            .filter(each => !each.closest('math[display=block]'))
            .map(each => each.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_formula_that_is_wider_than_the_window_can_be_scrolled_to_its_end(page: Page) -> None:
    out_of_reach = page.evaluate(
        """() => [...document.querySelectorAll('math[display=block]')].filter(formula => {
            const row = formula.parentElement;
            row.scrollLeft = row.scrollWidth;
            return formula.lastElementChild.getBoundingClientRect().right > row.getBoundingClientRect().right + 1;
        }).map(formula => formula.textContent)"""
    )
    assert out_of_reach == []


def test_every_figure_is_there_and_fits_its_column(page: Page) -> None:
    sizes = page.eval_on_selector_all(
        "main img", "all => all.map(each => [each.naturalWidth, each.width, each.parentElement.clientWidth])"
    )
    assert sizes
    assert all(natural > 0 and 0 < shown <= column for natural, shown, column in sizes)


def test_every_link_within_the_page_has_its_place(page: Page) -> None:
    astray = page.eval_on_selector_all(
        "a[href^='#']", "all => all.map(each => each.hash.slice(1)).filter(id => !document.getElementById(id))"
    )
    assert astray == []
    assert page.locator("main a[href^='#tbl-']").count() > 0


def test_mathematics_is_set_and_not_shown_as_its_source(page: Page) -> None:
    heights = page.eval_on_selector_all("math", "all => all.map(each => each.getBoundingClientRect().height)")
    assert len(heights) > 3
    assert all(height > 5 for height in heights)
    assert "\\frac" not in page.locator("main").inner_text()
