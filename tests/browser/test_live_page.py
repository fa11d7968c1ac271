"""examples/live_page.py and its page examples/viewer.html in a real browser."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from playwright.sync_api import Page, expect

from beatless import App, Plan
from beatless.cli.environment import project_module
from beatless.testing import Kit
from beatless.testing.lending import acting_as
from tests.serving import hosting


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-in-tests/")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://not-used-in-tests/")
    return project_module("examples.live_page")


@pytest.fixture
def beatless_plans(example: ModuleType) -> list[Plan]:
    return list(example.app.plans.values())


@pytest.fixture
def url(example: ModuleType, beatless_app: App) -> Iterator[str]:
    with acting_as(example.app, beatless_app), hosting(example.host) as host:
        yield host.url


def test_a_visitor_orders_and_sees_the_letter_grow(
    beatless: Kit, url: str, open_page: Callable[..., Page]
) -> None:
    page = open_page()
    page.goto(url)
    for _ in range(2):  # the second run begins anew
        page.locator("#start").click()
        expect(page.locator("#state")).to_have_text("running")
        expect(page.locator("#events li")).to_have_text(["RunStarted"])
        beatless.work_until_idle()
        expect(page.locator("#state")).to_have_text("completed")
        expect(page.locator("#events li").last).to_have_text("RunFinished")
    expect(page.locator("#text")).to_have_text("Order 2 is packed and on its way. ")
