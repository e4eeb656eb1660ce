"""The browser that the tests of this folder share."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class ByTab(LoadScopeScheduling):  # type: ignore[misc]
    """What is done with one notebook is done in one tab, in order, and so by one worker; else by file."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        notebook = re.search(r"\[(\d\d_\w+)\]$", test)
        return notebook[1] if notebook else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByTab:
    return ByTab(config, log)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium; without one this is a failure, since these tests are only run when asked for."""
    told = os.environ.get("CS336_CHROMIUM")
    path = told or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no Chromium found: `apt install chromium`, or name one by CS336_CHROMIUM"
    # Chromium refuses its sandbox to root, which containers often are.
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=[*sandbox, "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()
