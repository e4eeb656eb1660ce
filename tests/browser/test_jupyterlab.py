"""In JupyterLab, Run All works in every notebook: on a fresh kernel, once more, and after a restart.

`make browser-test`. The notebooks are copies with the smoke profile's parameters in a folder outside the checkout, so
their kernels start in another working directory than any the workbook knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from lab_server import lab_server
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Browser, Locator, Page, expect

from cs336_systems.repository import repository_root
from cs336_systems.workbook.documents import notebook_page
from cs336_systems.workbook.index import Notebook, load_index
from cs336_systems.workbook.profiles import SMOKE, profile_parameters

NOTEBOOKS = load_index().notebooks_there()
# No bound on speed: a hang is a failure, and this is how long nothing may take.
LIMIT_MS = 120_000

every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of notebooks at smoke size, far from the checkout."""
    folder = tmp_path_factory.mktemp("notebooks")
    for notebook in NOTEBOOKS:
        content = parameterize_notebook(load_notebook_node(str(notebook.path)), profile_parameters(SMOKE, notebook))
        nbformat.write(content, folder / notebook.path.name)
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[str]:
    with lab_server(tmp_path_factory.mktemp("lab"), folder) as address:
        yield address


@pytest.fixture(scope="module")
def pages(browser: Browser, address: str) -> Iterator[dict[str, Page]]:
    """One tab per notebook, opened when it is first asked for, so that a later test finds what an earlier one ran."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(LIMIT_MS)
    expect.set_options(timeout=LIMIT_MS)

    class Opened(dict[str, Page]):
        def __missing__(self, name: str) -> Page:
            page = context.new_page()
            page.goto(address.format(path=f"{name}.ipynb"))
            self[name] = page
            run_all(page)
            return page

    yield Opened()
    context.close()


# What a reader does --------------------------------------------------------------------------------------------


def wait_until_idle(page: Page) -> None:
    """The status bar's word is the kernel's; the notebook's own mark shows idle before there is a kernel."""
    expect(page.locator("#jp-main-statusbar")).to_contain_text(re.compile(r"\| Idle"))


def choose(page: Page, menu: str, item: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def run_all(page: Page) -> None:
    wait_until_idle(page)
    choose(page, "Run", "Run All Cells")
    wait_until_run(page)


def wait_until_run(page: Page) -> None:
    """Until every cell has a number, or one has failed."""
    page.wait_for_function(
        """() => document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') ||
                 [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
                     .every(prompt => /\\d/.test(prompt.textContent))"""
    )
    wait_until_idle(page)


def numbers(page: Page) -> list[int]:
    """The numbers of the code cells, in the order of the notebook."""
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_text_contents()
    return [int(re.sub(r"\D", "", prompt)) for prompt in prompts]


def errors(page: Page) -> Locator:
    return page.locator(
        ".jp-Notebook [data-mime-type='application/vnd.jupyter.error'], "
        ".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']"
    )


def code_cells(notebook: Notebook, folder: Path) -> int:
    content = nbformat.read(folder / notebook.path.name, as_version=4)
    return sum(cell.cell_type == "code" for cell in content.cells)


# What is to be seen --------------------------------------------------------------------------------------------


@every_notebook
def test_run_all_on_a_fresh_kernel_runs_every_cell_without_an_error(
    notebook: Notebook, pages: dict[str, Page], folder: Path
) -> None:
    page = pages[notebook.name]
    assert errors(page).all_text_contents() == []
    assert numbers(page) == list(range(1, code_cells(notebook, folder) + 1))


@every_notebook
def test_at_least_one_figure_is_rendered_and_every_image_is_whole(notebook: Notebook, pages: dict[str, Page]) -> None:
    widths = pages[notebook.name].eval_on_selector_all(
        ".jp-Notebook .jp-OutputArea img", "images => images.map(image => image.naturalWidth)"
    )
    assert widths
    assert all(width > 100 for width in widths)


@every_notebook
def test_measuring_shows_a_progress_widget(notebook: Notebook, pages: dict[str, Page]) -> None:
    if not notebook.experiments:
        pytest.skip("this notebook measures nothing")
    assert pages[notebook.name].locator(".jp-Notebook .jupyter-widgets .widget-label").count() > 0


@every_notebook
def test_the_headings_make_a_table_of_contents(notebook: Notebook, pages: dict[str, Page], folder: Path) -> None:
    page = pages[notebook.name]
    cells = nbformat.read(folder / notebook.path.name, as_version=4).cells
    headings = [
        re.sub(r"^#+ |`", "", line)
        for cell in cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if re.match(r"#+ ", line)
    ]
    page.get_by_role("tab", name=re.compile("Table of Contents")).first.click()
    listed = page.locator(".jp-TableOfContents .jp-tocItem-content")
    expect(listed).to_have_count(len(headings))
    assert [text.strip() for text in listed.all_text_contents()] == headings


@every_notebook
def test_run_all_works_a_second_time_on_the_same_kernel(
    notebook: Notebook, pages: dict[str, Page], folder: Path
) -> None:
    page, count = pages[notebook.name], code_cells(notebook, folder)
    before = numbers(page)
    choose(page, "Run", "Run All Cells")
    page.wait_for_function(
        """last => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
                       .every(prompt => Number(prompt.textContent.replace(/\\D/g, '')) > last) ||
                   document.querySelector('[data-mime-type="application/vnd.jupyter.error"]')""",
        arg=max(before),
    )
    assert errors(page).all_text_contents() == []
    assert numbers(page) == [number + max(before) for number in range(1, count + 1)]


@every_notebook
def test_restarting_the_kernel_and_running_all_numbers_the_cells_from_one_again(
    notebook: Notebook, pages: dict[str, Page], folder: Path
) -> None:
    page = pages[notebook.name]
    choose(page, "Kernel", "Restart Kernel and Run All Cells…")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    page.wait_for_function(
        """count => document.querySelector('[data-mime-type="application/vnd.jupyter.error"]') ||
               [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
                   .map(prompt => Number(prompt.textContent.replace(/\\D/g, '')))
                   .every((number, index) => number === index + 1)""",
        arg=code_cells(notebook, folder),
    )
    assert errors(page).all_text_contents() == []


@every_notebook
def test_a_notebook_saved_in_the_lab_is_a_page_that_asks_the_network_for_nothing(
    notebook: Notebook, pages: dict[str, Page], folder: Path, browser: Browser, tmp_path: Path
) -> None:
    page = pages[notebook.name]
    page.keyboard.press("Control+s")
    expect(page.locator(".jp-mod-dirty")).to_have_count(0)
    saved = tmp_path / "page.html"
    saved.write_bytes(notebook_page(folder / notebook.path.name, notebook.title))
    context = browser.new_context(offline=True)
    shown = context.new_page()
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(saved.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [saved.as_uri()]
    assert shown.locator("table").count() > 0
    context.close()


def test_the_notebooks_are_those_of_the_checkout() -> None:
    assert {notebook.path.parent for notebook in NOTEBOOKS} == {repository_root() / "notebooks"}
