"""What tests of pages share: a browser."""

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    """Chromium; skipped where there is none, but for CI."""
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("needs a browser: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no browser: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()
