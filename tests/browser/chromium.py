"""The Chromium of this machine. Nothing is downloaded: playwright only drives it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless Chromium. Raises FileNotFoundError if there is none."""
    path = find()
    if path is None:
        raise FileNotFoundError(f"there is no {', '.join(NAMES)} on the PATH")
    with sync_playwright() as playwright:
        # Without its sandbox, because root has none and all that it opens is our own page.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()
