"""Flower in a real Chromium, on a fleet of real workers."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.outbox.sockets import readable
from beatless.testing import Kit
from tests.browser.conftest import PLANS
from tests.serving import serving

REASON = "the carrier is on strike"


def test_a_fleet_is_seen_and_a_worker_is_shut_down_without_a_loss(
    beatless: Kit, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    port = free_port()
    with serving(beatless.app, flower_url=f"http://127.0.0.1:{port}") as api:
        watch_a_fleet(beatless, open_page, tmp_path, port, f"http://127.0.0.1:{api.port}")


def watch_a_fleet(
    beatless: Kit, open_page: Callable[..., Page], tmp_path: Path, port: int, url: str
) -> None:
    flower = Child(
        "flower",
        ["flower", "--port", str(port), "--basic-auth", "operator:secret", "--page-url", url],
        environ=beatless.app.settings.to_env() | {"BEATLESS_APP": PLANS, "PATH": "/usr/bin"},
        log=tmp_path / "flower.log",
    )
    flower.start()
    flower.wait_ready()
    try:
        page = open_page(
            http_credentials={"username": "operator", "password": "secret"},
            viewport={"width": 1280, "height": 900},
        )
        see_and_shut_down(beatless, page, f"http://127.0.0.1:{port}")
    finally:
        flower.kill()
        flower.reap(0)


def see_and_shut_down(beatless: Kit, page: Page, flower: str) -> None:
    beatless.relay_process(PLANS)
    # Alone: of a run that came along in a group, Flower does not know the worker.
    workers = [beatless.worker_process(PLANS, worker_group_runs=1) for _ in range(3)]
    page.goto(f"{flower}/workers")
    expect(page.locator("#workers-online")).to_have_text("3")

    inputs = [{"lost": REASON} if number % 30 == 7 else {} for number in range(300)]
    runs = [beatless.start_run("checkout", input).run_id for input in inputs]
    for run_id in runs:
        beatless.wait_for_run_completion(run_id, timeout=60)
    expect(page.locator("#workers-succeeded")).to_have_text("290")
    expect(page.locator("#workers-failed")).to_have_text("10")

    failed = runs[7]
    page.goto(f"{flower}/tasks")
    page.get_by_role("button", name="Failed").click()
    expect(page.locator("#tasks-table_info")).to_contain_text("of 20 ")  # runs and their steps
    page.goto(f"{flower}/task/{failed}")
    details = page.locator("#task-page")
    expect(details).to_contain_text("FAILURE")
    expect(details).to_contain_text(f"Fatal: {REASON}")
    details.get_by_role("link", name=f"{failed}:ship").click()
    expect(details).to_contain_text("checkout/ship")
    details.locator("a[href*='/#/run/']").click()
    expect(page.locator("#outcome")).to_contain_text(REASON)
    page.get_by_role("link", name="Flower").click()
    expect(details).to_contain_text(failed)

    beatless.client.pause_queue("default")
    more = [beatless.start_run("checkout").run_id for _ in range(40)]
    page.goto(f"{flower}/workers")
    page.get_by_role("link", name=re.compile(f"beatless-{workers[0].pid}@")).click()
    page.locator("[data-bs-toggle=dropdown]", has_text="Actions").click()
    beatless.client.resume_queue("default")
    page.locator("#worker-shutdown").click()
    ended = os.pidfd_open(workers[0].pid)
    try:
        assert readable([ended], 60), "the worker goes on"
    finally:
        os.close(ended)
    for run_id in more:
        assert beatless.wait_for_run_completion(run_id, timeout=60).state == "completed"
    beatless.verify()
