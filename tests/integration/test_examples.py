"""The examples do what their heads say, in the kit; the pages of some in tests/browser."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.testclient import TestClient

from beatless import App, Plan
from beatless.cli.environment import project_module
from beatless.testing import Kit
from beatless.testing.lending import acting_as

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LONGER = {"agent_loop.py"}
"""It walks through all that a list with routes can do."""


def of(name: str) -> pytest.MarkDecorator:
    """The test is of this example."""
    return pytest.mark.parametrize("example", [name], indirect=True)


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-in-tests/")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://not-used-in-tests/")
    return project_module(f"examples.{request.param}")


@pytest.fixture
def beatless_plans(example: ModuleType) -> list[Plan]:
    return list(example.app.plans.values())


@pytest.fixture(autouse=True)
def lent(request: pytest.FixtureRequest) -> Iterator[None]:
    """The App of the example is that of the test, as with `beatless_app` in a project."""
    if "example" not in request.fixturenames:
        yield
        return
    app: App = request.getfixturevalue("beatless_app")
    with acting_as(request.getfixturevalue("example").app, app):
        yield


def test_each_example_is_short_has_a_head_and_is_listed() -> None:
    index = (EXAMPLES / "README.md").read_text()
    found = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".html", ".js")]
    assert found
    for path in found:
        text = path.read_text()
        assert f"]({path.name})" in index, path.name
        assert len(text.splitlines()) <= 60 or path.name in LONGER, path.name
        if path.suffix == ".py":
            head = text.partition('"""')[2].partition('"""')[0]
            assert re.search(rf"^ *beatless --app {path.stem}:app ", head, re.MULTILINE)


@of("checkout")
def test_a_large_order_is_shipped_after_its_payment_and_a_decision(
    example: ModuleType, beatless: Kit
) -> None:
    run = beatless.start_run("checkout", {"number": 7, "amount": 900})
    beatless.work_until_idle()
    for _ in range(2):  # a payment service calls until it has its answer
        example.webhook(run.run_id, "p-1", paid=True)
    with beatless.crash(at="claim.committed"):  # which has taken in the signal
        beatless.work_until_idle()
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert [each.occurrence for each in beatless.waits(run.run_id)] == ["Ship"]
    beatless.approve(run.run_id, "Ship")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == {"shipped": "order 7 is on its way"}
    assert beatless.event_types(run.run_id).count("SignalReceived") == 2
    beatless.verify()


@of("checkout")
def test_what_is_refused_or_not_decided_is_not_shipped(example: ModuleType, beatless: Kit) -> None:
    small, large = (
        beatless.start_run("checkout", {"number": number, "amount": amount}).run_id
        for number, amount in ((1, 20), (2, 900))
    )
    example.webhook(small, "p-1", paid=False)
    example.webhook(large, "p-2", paid=True)
    beatless.work_until_idle()
    beatless.advance(86401)
    beatless.work_until_idle()
    results = [beatless.client.get_run(run_id).result for run_id in (small, large)]
    assert results == [
        {"shipped": None, "why": "it was not paid"},
        {"shipped": None, "paid_back": 900},
    ]


@of("live_page")
def test_a_visitor_of_the_page_orders_and_follows_the_run(
    example: ModuleType, beatless: Kit
) -> None:
    with TestClient(example.host) as stranger, TestClient(example.host) as visitor:
        assert "EventSource" in visitor.get("/").text
        assert "function follow(" in stranger.get("/follow.js").text
        run_id = visitor.post("/orders").json()["run_id"]
        beatless.work_until_idle()
        stream = visitor.get(f"/jobs/v1/runs/{run_id}/stream").text
        assert stranger.get(f"/jobs/v1/runs/{run_id}").status_code == 401
    assert '"pieces":["Order ",' in stream.replace(": [", ":[")
    assert stream.count("event: RunFinished") == 1


@of("fan_out")
@pytest.mark.parametrize("files", [12, pytest.param(999, marks=pytest.mark.long(minutes=1))])
def test_the_words_of_all_files_are_counted(beatless: Kit, tmp_path: Path, files: int) -> None:
    for number in range(files):
        (tmp_path / f"{number}.txt").write_text(f"the words of {number}")
    (tmp_path / "broken.txt").write_bytes(b"\xff")
    run = beatless.start_run("count_words", {"folder": str(tmp_path)})
    beatless.work_until_idle()
    for _ in range(2):  # the retries of the broken one
        beatless.advance(60)
        beatless.work_until_idle()
    result = beatless.client.get_run(run.run_id).result
    (unread,) = result.pop("unread")
    assert result == {"files": files + 1, "words": 4 * files}
    assert Path(unread["file"]).name == "broken.txt"
    assert len(beatless.children(run.run_id)) == files + 1
    beatless.verify()


@of("nightly")
def test_a_night_has_a_report_of_each_customer(example: ModuleType, beatless: Kit) -> None:
    beatless.client.apply_schedules([example.nightly])
    beatless.advance(25 * 3600)  # of a second tick there is no run, as the first has not ended
    beatless.work_until_idle()
    (run,) = beatless.client.list_runs(plan="reports")
    assert run.result == {"reports": 3, "failed": []}
    reports = [each.result for each in beatless.children(run.run_id)]
    assert reports == [f"{name} on {run.tick:%Y-%m-%d}" for name in example.CUSTOMERS]


@pytest.mark.slow
@of("tenants")
def test_tenants_see_their_own_runs_and_wait_for_their_own(
    example: ModuleType, beatless: Kit
) -> None:
    acme, zoo = {"X-Api-Key": "k-acme"}, {"X-Api-Key": "k-zoo"}
    with TestClient(example.host) as api:
        assert api.post("/reports/1").status_code == 401
        assert api.post("/reports/1", headers={"X-Api-Key": "k-none"}).status_code == 401
        assert api.get("/jobs/v1/runs").status_code == 401
        busy = [api.post(f"/reports/{n}", headers=acme).json()["run_id"] for n in range(1, 6)]
        run_id = api.post("/reports/12", headers=zoo).json()["run_id"]
        for _ in range(2):
            beatless.work_once()
        # Its turn came after one of the five that were before it.
        assert api.get(f"/reports/{run_id}", headers=zoo).json() == {
            "state": "completed",
            "report": "the report of month 12",
        }
        assert api.get(f"/reports/{run_id}", headers=acme).status_code == 404
        assert api.get(f"/jobs/v1/runs/{run_id}", headers=acme).status_code == 404
        beatless.work_until_idle()
        states = [api.get(f"/reports/{each}", headers=acme).json()["state"] for each in busy]
        seen = api.get("/jobs/v1/runs", headers=acme).json()["runs"]
    assert states == ["completed"] * 5
    assert {each["run_id"] for each in seen} == set(busy)


@of("celery_tasks")
def test_a_task_is_a_step_and_another_is_called_by_delay(
    example: ModuleType, beatless: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    run = beatless.start_run("order", {"number": 7})
    caplog.set_level("INFO", logger="examples.celery_tasks")
    example.count_visit.delay("home")
    assert beatless.work_until_idle() == 2
    result = beatless.client.get_run(run.run_id).result
    assert result == f"receipt {run.run_id}:send_receipt for order 7"
    assert "a visit of home" in caplog.text


@of("flask_shop")
def test_an_order_of_flask_and_its_run_are_both_stored_or_neither(
    example: ModuleType, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    db, host = example.db, example.host
    with host.app_context():
        monkeypatch.setitem(db.engines, None, beatless.app.engine)
        db.create_all()
    answer = host.test_client().post("/orders/book").json
    beatless.work_until_idle()
    assert beatless.client.get_run(answer["run"]).result == "book is shipped"
    with host.app_context():
        assert db.session.get(example.Order, answer["order"]).state == "shipped"
        db.session.commit()
        run = example.app.client.start_run("fulfil", {"order": 2}, connection=db.session)
        db.session.rollback()
    assert run.run_id != answer["run"]
    assert [each.run_id for each in beatless.client.list_runs()] == [answer["run"]]
