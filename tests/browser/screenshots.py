"""Makes the pictures of docs/images: the page on a shop's runs, light and dark.

python -m tests.browser.screenshots docs/images
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page

from beatless import App, Run, RunRequest, Schedule, Settings
from beatless.local.stack import Stack
from tests.browser import chromium
from tests.browser.plans import billing, checkout, refund

FLOWER = {"width": 1400, "height": 640}
WIDE = {"width": 1180, "height": 640}
ROOT = str(Path(__file__).parents[2])
PHONE = {"width": 390, "height": 780}
REASON = "the carrier does not know the postal code 1138X"


class Shop:
    """A shop with runs in every state."""

    def __init__(self, app: App, gates: Path) -> None:
        self.client = app.client
        for order in range(1, 15):
            self.ended(order=order, tags={"shop": "ghent" if order % 3 else "bruges"})
        self.client.cancel_run(self.start({"gates": "/nowhere"}, not_before_hours=1).run_id)
        self.start({"order": 15}, not_before_hours=2)
        for number in range(3):
            self.client.wait_for_run(self.client.start_run("refund", {"order": number}).run_id)
        lost = self.ended(order=11, lost=REASON, tags={"shop": "bruges"})
        self.client.wait_for_run(self.client.retry_run(lost.run_id).run_id)
        self.failed = self.ended(order=16, lost=REASON, declined=1, tags={"shop": "ghent"})
        (gates / "charge").touch()
        self.live = self.start(
            {"order": 17, "gates": str(gates), "declined": 1, "progress": 62},
            tags={"shop": "ghent", "customer": "b2b"},
        )
        for event in self.client.stream_run(self.live.run_id):
            if (event.data or {}).get("name") == "progress":
                break
        self.ended(order=18, tags={"shop": "bruges"})

    def start(self, input: object, *, not_before_hours: int = 0, **options: object) -> Run:
        delay = {"delay": 3600.0 * not_before_hours} if not_before_hours else {}
        return self.client.start_run("checkout", input, **delay, **options)

    def ended(self, *, tags: dict[str, str], **input: object) -> Run:
        run = self.start(input, tags=tags)
        return self.client.wait_for_run(run.run_id)


def shoot(browser: Browser, url: str, shop: Shop, directory: Path) -> None:
    """All pictures, in both colour schemes."""
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport=WIDE)
        page = context.new_page()

        def save(name: str, page: Page = page, scheme: str = scheme) -> None:
            page.screenshot(path=directory / f"{name}-{scheme}.png", animations="disabled")

        page.goto(url)
        page.locator("#runs tr").nth(20).wait_for()
        save("runs")
        page.goto(f"{url}/#/run/{shop.live.run_id}")
        page.locator('[data-step=pack][data-kind=now] .took:text("62 %")').wait_for()
        save("run-live")
        page.goto(f"{url}/#/run/{shop.failed.run_id}")
        page.locator("#status.ended").wait_for()
        hide_paths(page)
        save("run-failed")
        page.goto(f"{url}/#/queues")
        page.locator("#queues tr").nth(1).wait_for()
        save("queues")
        page.goto(f"{url}/#/system")
        page.locator("#workers tr").nth(2).wait_for()
        save("system")
        context.close()
    context = browser.new_context(viewport=PHONE, device_scale_factor=1)
    page = context.new_page()
    page.goto(f"{url}/#/run/{shop.failed.run_id}")
    page.locator("#status.ended").wait_for()
    hide_paths(page)
    page.screenshot(path=directory / "run-phone.png", animations="disabled")
    page.goto(f"{url}/#/?state=failed")
    page.locator("#runs tr").nth(2).wait_for()
    page.screenshot(path=directory / "runs-phone.png", animations="disabled")
    context.close()


def shoot_schedules(browser: Browser, url: str, app: App, directory: Path) -> None:
    """Schedules that fire, one that a person has paused, and one that is stopped."""
    brussels = {"tz": "Europe/Brussels", "input": {"order": 1}}
    for schedule in (
        Schedule("restock", "checkout", cron="0 6 * * 1-5", overlap="skip", **brussels),
        Schedule("month-end", "refund", cron="0 2 1 * *", catch_up="all", **brussels),
        Schedule("sync-bruges", "refund", cron="*/15 * * * *", jitter=60),
        Schedule("sync-ghent", "refund", every=10),
    ):
        app.client.create_schedule(schedule)
    app.client.pause_schedule("sync-bruges")
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport=WIDE, locale="en-GB")
        page = context.new_page()
        page.goto(f"{url}/#/schedules")
        page.locator("[data-schedule=sync-ghent] [data-label='last run'] a").wait_for()
        page.get_by_label("The next ticks of restock").click()
        page.screenshot(path=directory / f"schedules-{scheme}.png", animations="disabled")
        context.close()


def shoot_limits(browser: Browser, url: str, app: App, gates: Path, directory: Path) -> None:
    """Limits of which one binds, and groups of which one has more weight; two runs hold slots."""
    app.client.set_limit("statements", rate="500/h", force=True)
    app.client.set_group_weight("ghent", 3)
    runs = [("acct_7", "ghent", 4), ("acct_12", "bruges", 2), ("acct_7", "bruges", 3)]
    for account, group, count in runs:
        input = {"account": account, "gates": str(gates)}
        app.client.start_runs([RunRequest(plan="billing", input=input, group=group)] * count)
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport=WIDE, locale="en-GB")
        page = context.new_page()
        page.goto(f"{url}/#/limits")
        for key in ("acct_7", "acct_12"):
            row = page.locator(f"[data-limit=stripe][data-key={key}]")
            row.locator("[data-label=running]:text-is('1')").wait_for()
        page.screenshot(path=directory / f"limits-{scheme}.png", animations="disabled")
        context.close()


def shoot_flower(browser: Browser, stack: Stack, app: App, directory: Path) -> None:
    """Flower with a fleet of three workers and 300 more runs."""
    # What runs before Flower hears the workers is nobody's: all three must be there first.
    page = browser.new_page(viewport=FLOWER)
    page.goto(f"{stack.flower_url}/workers")
    page.locator("#workers-online:text-is('3')").wait_for()
    requests = [RunRequest(plan="checkout", input=ailing(number)) for number in range(300)]
    for run in app.client.start_runs(requests):
        app.client.wait_for_run(run.run_id)
    page.locator("#workers-succeeded:text-is('280')").wait_for()
    page.locator("#workers-active:text-is('0')").wait_for()
    page.screenshot(path=directory / "flower-workers.png", animations="disabled")
    page.goto(f"{stack.flower_url}/tasks")
    page.locator("#tasks-table tbody tr").nth(9).wait_for()
    page.screenshot(path=directory / "flower-tasks.png", animations="disabled")


def ailing(number: int) -> dict[str, object]:
    """The input of a run; one in fifteen fails."""
    return {"order": number} | ({"lost": REASON} if number % 15 == 7 else {})


def hide_paths(page: Page) -> None:
    """Where this copy of the sources lies is nobody's business."""
    page.locator("pre.traceback").evaluate_all(
        "(found, root) => found.forEach(pre => pre.textContent = pre.textContent"
        ".replaceAll(root, '/srv/shop'))",
        ROOT,
    )


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="beatless-") as temporary:
        stack = Stack(
            Path(temporary) / "stack",
            ephemeral=True,
            app_name="tests.browser.app:app",
            workers=3,
            concurrency=1,
            api_port=0,
            flower_port=0,
            worker_group_runs=1,  # of a run that came along in a group Flower knows no worker
        )
        with stack, chromium.launched() as browser:
            stack.start()
            app = App(Settings.from_env(stack.environ()), [billing, checkout, refund])
            gates = Path(temporary) / "gates"
            gates.mkdir()
            try:
                shoot_flower(browser, stack, app, directory)
                shoot(browser, stack.api_url, Shop(app, gates), directory)
                shoot_schedules(browser, stack.api_url, app, directory)
                shoot_limits(browser, stack.api_url, app, Path(temporary) / "closed", directory)
            finally:
                app.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
