"""A Chromium for all tests of a process, and a page that refuses to be silent about its errors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from beatless import App, Plan
from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.testing import Kit
from tests.browser import chromium
from tests.browser.plans import checkout, payment, refund
from tests.serving import serving

expect.set_options(timeout=60_000)

PLANS = "tests.browser.app:app"


@pytest.fixture(scope="session")
def chrome() -> Iterator[Browser]:
    with chromium.launched() as browser:
        yield browser


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [checkout, payment, refund]


@pytest.fixture
def open_page(chrome: Browser) -> Iterator[Callable[..., Page]]:
    """A new page of its own context. At the end nothing may have been said on any console.

    `expected` is a part of what the browser itself says when a server is gone.
    """
    complaints: list[str] = []
    with ExitStack() as stack:

        def make(expected: str = "nothing is expected", **options: object) -> Page:
            context = stack.enter_context(chrome.new_context(**options))
            context.set_default_timeout(60_000)
            page = context.new_page()

            def hear(message: ConsoleMessage) -> None:
                if message.type in ("error", "warning") and expected not in message.text:
                    complaints.append(message.text)

            page.on("console", hear)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.add_init_script(
                "document.addEventListener('securitypolicyviolation', "
                "event => console.error(`CSP: ${event.violatedDirective} ${event.blockedURI}`))"
            )
            return page

        yield make
    assert complaints == []


class Server:
    """`beatless serve` as a process, which can be killed and started again on its port."""

    def __init__(self, app: App, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._child = Child(
            "api",
            ["serve", "--port", str(self.port)],
            environ=dict(app.settings.to_env()) | {"BEATLESS_APP": PLANS, "PATH": "/usr/bin"},
            log=directory / "api.log",
        )

    def start(self) -> None:
        self._child.start()
        self._child.wait_ready()

    def kill(self) -> None:
        self._child.kill()
        self._child.reap(0)


@pytest.fixture
def server(beatless_app: App, tmp_path: Path) -> Iterator[Server]:
    found = Server(beatless_app, tmp_path)
    found.start()
    yield found
    found.kill()


@pytest.fixture
def url(beatless_app: App) -> Iterator[str]:
    """The API in a thread of this process."""
    with serving(beatless_app) as api:
        yield f"http://127.0.0.1:{api.port}"


@pytest.fixture
def fleet(beatless: Kit) -> Kit:
    """A relay and a worker."""
    beatless.relay_process(PLANS)
    beatless.worker_process(PLANS, concurrency=2)
    return beatless
