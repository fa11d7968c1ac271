"""Runs that wait for a person: decided once, checked by the form, and by whom is in the journal."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
import sqlalchemy
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from beatless import (
    AlreadyDecided,
    Approval,
    ApprovalNotOpen,
    BadPayload,
    BadRequest,
    Finish,
    Goto,
    Plan,
    RunContext,
    RunEnded,
    RunNotFound,
    RunState,
    SignalConflict,
    StepContext,
    Verdict,
    approve,
    days,
    http,
    map_,
    plan,
    step,
)
from beatless.api import responses
from beatless.auth import Scope, Tokens
from beatless.orchestrator.records import SentDecision
from beatless.outbox.backoff import Backoff
from beatless.outbox.faults import CrashPoints
from beatless.testing import Kit
from tests.integration.test_races import until as until_blocked
from tests.proxy import proxy
from tests.serving import Api, serving

ANN, BOB = "ann@example.com", "bob@example.com"
THREE_DAYS_S = 3 * 86_400.0
BODIES: list[str] = []


@dataclass
class Refund:
    amount: int
    reason: str = ""


class Grade(TypedDict):
    grade: int


class Shipment(BaseModel):
    """One of pydantic's, with a rule that no JSON Schema has."""

    parcels: int

    @field_validator("parcels")
    @classmethod
    def even(cls, given: int) -> int:
        if given % 2:
            raise ValueError("parcels come in pairs")
        return given


@step(name="note")
def pay(ctx: StepContext) -> Finish:
    BODIES.append(ctx.key)
    found = ctx.results["refund"]
    assert isinstance(found, Approval)
    assert isinstance(found.data, Refund)
    return Finish([found.name, found.data.amount, found.by, found.seq])


@step
def close(ctx: StepContext) -> str:
    assert ctx.results["refund"] is None
    return "closed"


@step
def note(ctx: StepContext, text: str) -> str:
    BODIES.append(ctx.key)
    return text


@plan("asks")
def asks(run: RunContext[Any]) -> Any:
    found = run.approve("refund?", form=Refund, timeout=days(3))
    if found is None:
        return "closed"
    assert isinstance(found.data, Refund)
    assert found.at.tzinfo is UTC
    run.step(note, found.by)
    return ["refund", found.data.amount, found.by, found.seq]


@plan("asks_async")
async def asks_async(run: RunContext[Any]) -> Any:
    first = await run.approve("Ship it?")
    second = await run.approve("Ship it?")
    return [first.data.approved, second.data.approved, second.data.comment, second.name]


@plan("ships")
def ships(run: RunContext[Any]) -> Any:
    return run.approve("ship?", form=Shipment).data.parcels


@plan("graded")
def graded(run: RunContext[Any]) -> Any:
    return run.approve("grade?", form=Grade, id="final").data


REFUNDED = Plan(
    "refunded",
    [approve("refund?", form=Refund, timeout=days(3), on_timeout=Goto("close")), pay, close],
)


PARCEL = Plan("parcel", [step(name="pack")(lambda ctx: ctx.input)])
PARCELS = Plan(
    "parcels",
    [
        approve("ship?", form=Shipment),
        map_("packed", PARCEL, inputs=lambda ctx: list(range(ctx.results["ship"].data.parcels))),
        step(name="end")(lambda ctx: [ctx.results["ship"].by, *ctx.results["packed"]]),
    ],
)


ESSAY = "why? " * 2000
"""More than all that a run of `essays` is."""


class Essay(BaseModel):
    text: str = Field(description=ESSAY)


@plan("essays")
async def essays(run: RunContext[Any]) -> Any:
    await asyncio.gather(*(run.approve(title, form=Essay) for title in ("one?", "two?")))


@plan("sends")
def sends(run: RunContext[Any]) -> Any:
    found = [run.approve("Send it?", name="send", timeout=days(3)) for _turn in range(3)]
    return [each and each.data.comment for each in found]


@plan("reasks")
def reasks(run: RunContext[Any]) -> Any:
    first = run.approve("How much?", name="ask", form=Refund)
    return [first.data.amount, run.approve("Sure?", name="ask").data.approved]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    BODIES.clear()
    plans = [asks, asks_async, essays, ships, graded, sends, reasks]
    return [*plans, REFUNDED, PARCEL, PARCELS]


EACH = pytest.mark.parametrize("name", ["asks", "refunded"])
"""A function and a list."""


def waiting(kit: Kit, name: str) -> str:
    run = kit.start_run(name).run_id
    kit.work_until_idle()
    assert kit.client.get_run(run).state == "waiting"
    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class BetweenTries(Backoff):
    """Does something before each further try of a call, and waits for no time."""

    act: Callable[[], object]

    def delay(self, failures: int) -> float:
        with ThreadPoolExecutor(1) as pool:  # the caller may be in an event loop
            pool.submit(self.act).result(60)
        return 0.0


class Acts(CrashPoints):
    """Does something once, at a point of the executor."""

    def __init__(self, point: str, act: Any) -> None:
        super().__init__()
        self._point, self._act = point, act

    def reach(self, point: str) -> None:
        if point == self._point and self._act is not None:
            act, self._act = self._act, None
            act()


def outcomes(kit: Kit, run_id: str) -> list[str]:
    events = kit.client.events(run_id)
    return [(e.data or {})["outcome"] for e in events if e.type == "WaitFinished"]


@EACH
def test_a_decision_ends_the_wait_with_its_data_and_the_person_who_made_it(
    beatless: Kit, name: str
) -> None:
    run = waiting(beatless, name)
    (opened,) = beatless.waits(run)
    assert (opened.kind, opened.title, opened.occurrence) == ("approval", "refund?", "refund")
    assert opened.schema is not None
    assert opened.schema["properties"]["amount"] == {"title": "Amount", "type": "integer"}

    sent = beatless.approve(run, "refund", {"amount": 12}, by=ANN)
    assert (sent.occurrence, sent.by, sent.new) == ("refund", ANN, True)
    assert abs((sent.at - datetime.now(UTC)).total_seconds()) < 600
    beatless.work_until_idle()

    received = next(e for e in beatless.client.events(run) if e.type == "SignalReceived")
    assert received.data is not None
    assert received.data["decision"]["by"] == ANN
    assert received.data["data"] == {"amount": 12}
    found = beatless.client.get_run(run)
    assert (found.state, found.result) == ("completed", ["refund", 12, ANN, received.seq])
    assert [f"{run}:note"] == BODIES
    beatless.verify()


REFUSED = [
    ({"amount": "much"}, "the decision.amount"),
    ({"amount": 1, "reason": 7}, "the decision.reason"),
    ({"amount": 1, "reasons": "x"}, "the decision.reasons"),
    ({}, "the decision.amount"),
    (None, "the decision"),
    ([1], "the decision"),
]


@EACH
def test_a_decision_that_its_form_refuses_is_refused_as_it_is_sent(
    beatless: Kit, name: str
) -> None:
    run = waiting(beatless, name)
    for data, where in REFUSED:
        with pytest.raises(BadPayload) as refused:
            beatless.client.approve_run(run, "refund", data, by=ANN)
        assert refused.value.where == where
        assert beatless.client.get_run(run).state == "waiting"
    beatless.client.approve_run(run, "refund", Refund(amount=3), by=ANN)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).state == "completed"
    beatless.verify()


def test_a_rule_that_no_schema_has_is_checked_too(beatless: Kit) -> None:
    run = waiting(beatless, "ships")
    with pytest.raises(BadPayload, match="come in pairs"):
        beatless.approve(run, "ship", {"parcels": 3})
    beatless.approve(run, "ship", {"parcels": 4})
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == 4


def test_without_a_form_the_decision_is_a_verdict_and_each_call_has_its_own(beatless: Kit) -> None:
    run = waiting(beatless, "asks_async")
    for bad in ({"approved": "yes"}, {"approved": True, "comment": 1}, {"comment": ""}, True):
        with pytest.raises(BadPayload, match="the decision"):
            beatless.approve(run, "Ship_it", bad)
    beatless.approve(run, "Ship_it")
    beatless.work_until_idle()
    beatless.approve(run, "Ship_it", Verdict(approved=False, comment="sold out"), by=BOB)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == [True, False, "sold out", "Ship_it#2"]
    beatless.verify()


def test_an_approval_with_an_id_is_decided_by_its_occurrence(beatless: Kit) -> None:
    run = waiting(beatless, "graded")
    beatless.approve(run, "grade#final", {"grade": 7})
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == {"grade": 7}


def test_children_of_a_list_are_made_of_the_decision(beatless: Kit) -> None:
    run = waiting(beatless, "parcels")
    beatless.approve(run, "ship", {"parcels": 2}, by=ANN)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == [ANN, 0, 1]
    beatless.verify()


def test_another_namespace_neither_decides_nor_makes_or_revokes_a_link(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    other = beatless.app.client_for("acme")
    for call in (
        lambda: other.approve_run(run, "refund", {"amount": 1}, by=BOB),
        lambda: other.approval_link(run, "refund", by=BOB),
        lambda: other.waits(run),
    ):
        with pytest.raises(RunNotFound):
            call()
    with pytest.raises(BadRequest, match="does not exist"):
        other.revoke_approval_link(link.id)
    theirs = other.start_run("asks").run_id
    beatless.work_until_idle()
    assert other.approve_run(theirs, "refund", {"amount": 2}, by=BOB).run_id == theirs
    beatless.work_until_idle()
    assert other.get_run(theirs).result[1:3] == [2, BOB]


@EACH
def test_of_two_decisions_one_counts_and_the_other_is_told(beatless: Kit, name: str) -> None:
    run = waiting(beatless, name)
    first = beatless.client.approve_run(run, "refund", {"amount": 1}, by=ANN)
    with pytest.raises(AlreadyDecided) as told:
        beatless.client.approve_run(run, "refund", {"amount": 2}, by=BOB)
    assert (told.value.by, told.value.at) == (ANN, first.at.isoformat())
    again = beatless.client.approve_run(run, "refund", {"amount": 1}, by=ANN)
    assert (again.new, again.at) == (False, first.at)
    beatless.work_until_idle()
    with pytest.raises(AlreadyDecided):
        beatless.client.approve_run(run, "refund", {"amount": 2}, by=BOB)
    assert not beatless.client.approve_run(run, "refund", {"amount": 1}, by=ANN).new
    result = beatless.client.get_run(run).result
    assert result[1:3] == [1, ANN]
    beatless.verify()


def test_a_decision_beside_an_open_transaction_waits_for_it_and_is_told(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = waiting(beatless, "asks")
    told: list[Exception] = []

    def second() -> None:
        try:
            beatless.client.approve_run(run, "refund", {"amount": 2}, by=BOB)
        except AlreadyDecided as error:
            told.append(error)

    deciding = threading.Thread(target=second)
    with sqlalchemy.Connection(beatless.app.engine) as connection, connection.begin():
        beatless.approve(run, "refund", {"amount": 1}, by=ANN, connection=connection)
        holder = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        deciding.start()
        until_blocked(postgres, blocked_by=holder)
        beatless.work_until_idle()  # the run's row is held by nobody
        assert beatless.client.get_run(run).state == "waiting"
    deciding.join(timeout=60)
    assert [str(ANN in str(error)) for error in told] == ["True"]
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result[1:3] == [1, ANN]
    beatless.verify()


def test_a_decision_that_is_rolled_back_never_was(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    with sqlalchemy.Connection(beatless.app.engine) as connection, connection.begin() as begun:
        beatless.approve(run, "refund", {"amount": 1}, by=ANN, connection=connection)
        begun.rollback()
    assert beatless.client.approve_run(run, "refund", {"amount": 2}, by=BOB).new
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result[1:3] == [2, BOB]


@EACH
def test_a_decision_that_comes_as_its_wait_is_timed_out_wins(beatless: Kit, name: str) -> None:
    run = waiting(beatless, name)
    beatless.advance(THREE_DAYS_S + 1)
    decide = lambda: beatless.approve(run, "refund", {"amount": 1}, by=ANN)  # noqa: E731
    beatless.executor().faults = Acts("wait.before", decide)
    beatless.work_until_idle()
    assert outcomes(beatless, run) == ["received"]
    assert beatless.client.get_run(run).result[1:3] == [1, ANN]
    beatless.verify()


@EACH
def test_after_a_time_out_there_is_nothing_to_decide(beatless: Kit, name: str) -> None:
    run = waiting(beatless, name)
    beatless.advance(THREE_DAYS_S + 1)
    beatless.work_until_idle()
    assert outcomes(beatless, run) == ["timed_out"]
    assert beatless.client.get_run(run).result == "closed"
    with pytest.raises(RunEnded):
        beatless.approve(run, "refund", {"amount": 1})
    beatless.verify()


def test_a_decision_that_was_committed_after_the_time_out_is_not_that_of_the_next_wait(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = waiting(beatless, "asks_async")
    with sqlalchemy.Connection(beatless.app.engine) as late, late.begin():
        beatless.approve(run, "Ship_it", {"approved": False}, by=BOB, connection=late)
        # The first wait ends otherwise, before that transaction does.
        with postgres.transaction():
            postgres.execute(
                "INSERT INTO signals (run_id, name, key, data, decision) VALUES (%s, 'x', 'k',"
                ' \'{"approved": true}\', \'{"wait": "Ship_it", "by": "x", "at": 1}\')',
                (run,),
            )
            postgres.execute(
                "INSERT INTO wakes (shard, run_id) SELECT shard, run_id FROM dispatches"
                " WHERE run_id = %s",
                (run,),
            )
        beatless.work_until_idle()
        assert [each.occurrence for each in beatless.waits(run)] == ["Ship_it#2"]
    beatless.work_until_idle()
    assert [each.occurrence for each in beatless.waits(run)] == ["Ship_it#2"]
    beatless.approve(run, "Ship_it#2", {"approved": True, "comment": "second"})
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == [True, True, "second", "Ship_it#2"]


def test_a_signal_of_the_same_name_decides_nothing(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    sent = beatless.signal(run, "refund", {"amount": 1})
    assert sent.waits_for == []
    beatless.work_until_idle()
    assert beatless.client.get_run(run).state == "waiting"
    beatless.approve(run, "refund", {"amount": 2}, by=ANN)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result[1:3] == [2, ANN]
    beatless.verify()


def test_what_cannot_be_decided_says_so(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    with pytest.raises(ApprovalNotOpen, match="'other': open are refund"):
        beatless.approve(run, "other", {})
    with pytest.raises(RunNotFound):
        beatless.approve("nowhere", "refund", {})
    for name, by in (("", ANN), ("a b", ANN), ("refund", ""), ("refund", "x" * 201), ("\0", ANN)):
        with pytest.raises(BadRequest):
            beatless.approve(run, name, {"amount": 1}, by=by)
    beatless.client.cancel_run(run)
    with pytest.raises(RunEnded):
        beatless.approve(run, "refund", {"amount": 1})


@EACH
def test_a_retry_takes_a_decision_over_with_the_type_of_its_form(beatless: Kit, name: str) -> None:
    run = waiting(beatless, name)
    beatless.approve(run, "refund", {"amount": 5}, by=ANN)
    beatless.work_until_idle()
    again = beatless.client.retry_run(run, from_step="note").run_id
    beatless.work_until_idle()
    assert outcomes(beatless, again) == []
    assert beatless.client.get_run(again).result == beatless.client.get_run(run).result
    beatless.verify()


@EACH
def test_a_decision_that_a_changed_form_refuses_leaves_the_run_to_a_version_that_takes_it(
    beatless: Kit, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = waiting(beatless, name)
    beatless.approve(run, "refund", {"amount": 5}, by=ANN)

    def refuse(_self: object, value: Any) -> Any:
        raise BadPayload("the decision.why", "is refused: Field required")

    form = REFUNDED.get("refund").form.type  # that of both: a form is made once for each type
    with monkeypatch.context() as patch:
        patch.setattr(type(form), "load", refuse)
        with pytest.raises(AssertionError, match=r"it is called again .* \(changed_call\)"):
            beatless.work_once()  # the kit knows the plan, and of no other version
        found = beatless.client.get_run(run)
        assert (found.state, outcomes(beatless, run)) == ("queued", [])
    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).state == "completed"
    beatless.verify()


def test_the_timeline_tells_who_has_decided_what(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    texts = [moment.text for moment in beatless.client.explain(run)]
    assert any('waits for the approval "refund?"' in text for text in texts)
    beatless.approve(run, "refund", {"amount": 5}, by=ANN)
    beatless.work_until_idle()
    texts = [moment.text for moment in beatless.client.explain(run)]
    assert f"approval refund was decided by {ANN}" in texts
    assert f'waited for the approval "refund?", and received it from {ANN}' in texts


def test_a_kind_of_wait_of_a_newer_version_leaves_its_run_alone(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = waiting(beatless, "refunded")
    postgres.execute(
        """UPDATE run_events SET step = 'vote', data = data || '{"kind": "ballot"}'
            WHERE run_id = %s AND type = 'WaitStarted'""",
        (run,),
    )
    beatless.signal(run, "noise")
    beatless.work_once()
    found = beatless.client.get_run(run)
    assert (found.state, found.error) == ("queued", None)
    assert [wait.kind for wait in beatless.waits(run)] == ["ballot"]


# In a loop: which of the questions of one name is decided


@pytest.fixture
def api(beatless: Kit) -> Iterator[Api]:
    with serving(beatless.app) as found:
        yield found


ONE = {"approved": True, "comment": "one"}
TWO = {"approved": True, "comment": "two"}


def asked(kit: Kit, run_id: str) -> list[str]:
    """The approvals that are open, and not decided."""
    kit.work_until_idle()
    return [each.exact for each in kit.waits(run_id)]


def decided(kit: Kit, run_id: str) -> list[str]:
    events = kit.client.events(run_id)
    return [(e.data or {})["decision"]["wait"] for e in events if e.type == "SignalReceived"]


@pytest.mark.parametrize("kind", [http.Client, http.AsyncClient])
def test_a_decision_whose_answer_was_lost_does_not_decide_the_next_question(
    beatless: Kit, api: Api, kind: type[http.Client | http.AsyncClient]
) -> None:
    run = waiting(beatless, "sends")
    tries = BetweenTries(act=beatless.work_until_idle)
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, token = tokens.create([Scope.RUNS_WRITE])

    async def decide(url: str) -> SentDecision:
        async with http.AsyncClient(url, token=token, backoff=tries) as client:
            return await client.approve_run(run, "send", ONE, by=ANN)

    with proxy(api.port) as path:
        path.lose_answer_to(b"/approvals/")
        url = f"http://127.0.0.1:{path.port}"
        if kind is http.Client:
            with http.Client(url, token=token, backoff=tries) as client:
                sent = client.approve_run(run, "send", ONE, by=ANN)
        else:
            sent = asyncio.run(decide(url))
        assert path.lost.is_set()
    assert (sent.occurrence, sent.new) == ("send", False)
    assert (asked(beatless, run), decided(beatless, run)) == (["send#2"], ["send"])


def test_a_decision_with_the_key_of_another_one_is_that_one_or_refused(
    beatless: Kit, api: Api
) -> None:
    run, client = waiting(beatless, "sends"), beatless.client
    first = client.approve_run(run, "send", ONE, by=ANN, key="click")
    assert (first.occurrence, first.new) == ("send", True)
    path, body = f"/v1/runs/{run}/approvals/send", {"data": ONE, "by": ANN, "key": "click"}
    for _ in range(2):  # in the inbox, and in the journal
        again = client.approve_run(run, "send", ONE, by=ANN, key="click")
        assert (again.occurrence, again.new, again.at) == ("send", False, first.at)
        told = api("POST", path, body)
        assert (told.status, told.json["occurrence"]) == (200, "send")
        assert asked(beatless, run) == ["send#2"]
    with http.Client(api.url) as remote:
        assert not remote.approve_run(run, "send#1", ONE, by=ANN, key="click").new
    later = client.aapprove_run(run, "send", ONE, by=ANN, key="click")
    assert asyncio.run(later).at == first.at

    beatless.signal(run, "noise", key="noise")
    for name, data, by, key in (
        ("send", TWO, ANN, "click"),
        ("send", ONE, BOB, "click"),
        ("send#2", ONE, ANN, "click"),
        ("send", ONE, ANN, "noise"),
    ):
        with pytest.raises(SignalConflict):
            client.approve_run(run, name, data, by=by, key=key)
    other = api("POST", path, body | {"data": TWO})
    assert (other.status, other.json["error"]) == (409, "SignalConflict")
    assert api("POST", path, body | {"key": "x" * 257}).status == 422
    with pytest.raises(BadRequest, match="key"):
        client.approve_run(run, "send", ONE, by=ANN, key="")
    assert asked(beatless, run) == ["send#2"]
    beatless.verify()


def test_a_decision_that_comes_again_is_checked_by_the_form_of_its_own_question(
    beatless: Kit,
) -> None:
    run, client = waiting(beatless, "reasks"), beatless.client
    assert client.approve_run(run, "ask", Refund(amount=7), by=ANN, key="click").new
    assert asked(beatless, run) == ["ask#2"]
    again = client.approve_run(run, "ask", Refund(amount=7), by=ANN, key="click")
    assert (again.occurrence, again.new) == ("ask", False)
    client.approve_run(run, "ask", {"approved": True}, by=ANN)
    assert asked(beatless, run) == []
    assert beatless.client.get_run(run).result == [7, True]
    assert not client.approve_run(run, "ask", Refund(amount=7), by=ANN, key="click").new


def test_two_decisions_that_were_given_one_key_at_once_are_both_taken_in(beatless: Kit) -> None:
    """Each counts as decided: their run would wait for ever for one that is thrown away."""
    run = waiting(beatless, "essays")
    essay = {"text": "because"}
    with sqlalchemy.Connection(beatless.app.engine) as connection, connection.begin():
        beatless.approve(run, "one", essay, key="click", connection=connection)
        beatless.approve(run, "two", essay, key="click")
    beatless.work_until_idle()
    assert beatless.client.get_run(run).state == "completed"
    beatless.verify()


def test_the_first_question_of_a_loop_can_be_named_and_no_later_one_is_decided_for_it(
    beatless: Kit, api: Api
) -> None:
    run, client = waiting(beatless, "sends"), beatless.client
    (opened,) = api("GET", f"/v1/runs/{run}/waits").json["waits"]
    assert (opened["occurrence"], opened["exact"]) == ("send", "send#1")
    assert asked(beatless, run) == ["send#1"]
    path, body = f"/v1/runs/{run}/approvals/send%231", {"data": ONE, "by": ANN}
    told = []
    for _ in range(3):  # a double click, and one more
        told.append(api("POST", path, body))
        assert asked(beatless, run) == ["send#2"]
    assert [each.status for each in told] == [202, 200, 200]
    assert {each.json["occurrence"] for each in told} == {"send"}
    with pytest.raises(AlreadyDecided, match="approval send of"):
        client.approve_run(run, "send#1", TWO, by=BOB)
    assert asked(beatless, run) == ["send#2"]
    assert client.approve_run(run, "send#2", TWO, by=BOB).occurrence == "send#2"
    assert asked(beatless, run) == ["send#3"]
    assert decided(beatless, run) == ["send", "send#2"]

    late = waiting(beatless, "sends")
    beatless.advance(THREE_DAYS_S + 1)
    assert asked(beatless, late) == ["send#2"]
    with pytest.raises(ApprovalNotOpen, match="'send#1': open are send#2"):
        client.approve_run(late, "send#1", ONE, by=ANN)
    assert api("POST", f"/v1/runs/{late}/approvals/send%231", body).status == 409
    link = client.approval_link(late, "send#1", by=ANN)
    assert (link.occurrence, api("GET", f"/{link.path}").status) == ("send", 410)
    assert asked(beatless, late) == ["send#2"]


def test_a_link_whose_form_is_read_as_somebody_else_decides_decides_no_later_question(
    beatless: Kit,
) -> None:
    run = waiting(beatless, "sends")
    found = beatless.client.link_of(beatless.client.approval_link(run, "send", by=ANN).token)
    assert found is not None
    beatless.approve(run, "send", ONE, by=BOB)
    assert asked(beatless, run) == ["send#2"]
    with pytest.raises(AlreadyDecided):
        beatless.client.decide_by_link(found[0], TWO)
    assert asked(beatless, run) == ["send#2"]


# Over HTTP, and by links


def test_a_decision_over_http_is_checked_and_made_once(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    (opened,) = api("GET", f"/v1/runs/{run}/waits").json["waits"]
    assert (opened["kind"], opened["title"]) == ("approval", "refund?")
    assert opened["schema"]["required"] == ["amount"]
    (asked,) = [each for each in beatless.client.events(run) if each.type == "WaitStarted"]
    assert opened["exact"] == asked.data["exact"] == "refund#1"
    path = f"/v1/runs/{run}/approvals/refund"
    refused = api("POST", path, {"data": {"amount": "much"}, "by": ANN})
    assert refused.status == 422
    assert refused.json["detail"].startswith("the decision.amount is refused")
    good = {"data": {"amount": 12}, "by": ANN}
    assert [api("POST", path, good).status for _ in range(2)] == [202, 200]
    other = api("POST", path, {"data": {"amount": 1}, "by": BOB})
    assert (other.status, other.json["error"]) == (409, "AlreadyDecided")
    assert api("POST", f"/v1/runs/{run}/approvals/none", good).status == 409
    with http.Client(api.url) as client:
        assert not client.approve_run(run, "refund", {"amount": 12}, by=ANN).new
        with pytest.raises(AlreadyDecided):
            client.approve_run(run, "refund", {"amount": 1}, by=BOB)


def test_open_approvals_are_listed_with_their_runs_in_pages(beatless: Kit, api: Api) -> None:
    runs = [waiting(beatless, name) for name in ("asks", "graded", "asks")]
    beatless.approve(runs[0], "refund", {"amount": 1})
    listed, cursor = [], ""
    for _ in range(3):
        page = api("GET", f"/v1/approvals?limit=1{cursor}").json
        listed += [(each["run_id"], each["plan"], each["title"]) for each in page["approvals"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert listed == [(runs[2], "asks", "refund?"), (runs[1], "graded", "grade?")]
    beatless.work_until_idle()
    (only,) = api("GET", "/v1/approvals?plan=graded").json["approvals"]
    assert only["schema"]["required"] == ["grade"]
    assert len(api("GET", "/v1/approvals").json["approvals"]) == 2
    assert api("GET", "/v1/approvals?cursor=x").status == 400


def approvals_by_page(api: Api, pages: int) -> list[list[str]]:
    """The runs of the approvals on each page of the list; there must be so many at most."""
    listed, cursor = [], ""
    for _ in range(pages):
        page = api("GET", f"/v1/approvals?limit=500{cursor}").json
        listed.append([each["run_id"] for each in page["approvals"]])
        if page["next"] is None:
            return listed
        cursor = f"&cursor={page['next']}"
    raise AssertionError(listed)


def test_a_list_of_approvals_ends_after_so_many_bytes_of_runs(
    beatless: Kit, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it has the inputs of 500 runs in memory."""
    runs = [waiting(beatless, "asks") for _ in range(3)]
    monkeypatch.setattr(responses, "RUNS_BYTES", 1)
    assert approvals_by_page(api, 4) == [[run] for run in reversed(runs)] + [[]]


def test_a_list_of_approvals_ends_after_so_many_bytes_of_them(
    beatless: Kit, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one run are on one page."""
    runs = [waiting(beatless, "essays") for _ in range(3)]
    monkeypatch.setattr(responses, "RUNS_BYTES", len(ESSAY))
    assert approvals_by_page(api, 4) == [[run] * 2 for run in reversed(runs)]


FORM = {"Content_Type": "application/x-www-form-urlencoded"}


def post(api: Api, link: str, **fields: str) -> Any:
    given = {f"f.{name}": value for name, value in fields.items()}
    return api("POST", f"/{link}", urlencode(given).encode(), **FORM)


def test_a_link_shows_the_form_and_decides_once_in_the_name_of_its_person(
    beatless: Kit, api: Api
) -> None:
    run = waiting(beatless, "asks")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    for _ in range(2):  # a scanner of mail opens it too
        shown = api("GET", f"/{link.path}")
        assert shown.status == 200
        assert "refund?" in shown.text
        assert ANN in shown.text
        assert 'name="f.amount"' in shown.text
    assert beatless.client.get_run(run).state == "waiting"
    assert shown.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in shown.headers["content-security-policy"]

    refused = post(api, link.path, amount="much", reason="<b>late</b>")
    assert refused.status == 422
    assert "the decision.amount" in refused.text
    assert "(the field f.amount)" in refused.text
    assert "&lt;b&gt;late&lt;/b&gt;" in refused.text
    assert post(api, link.path, amount="7", reason="late").status == 200
    assert post(api, link.path, amount="8").status == 410
    assert api("GET", f"/{link.path}").status == 410
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result[1:3] == [7, ANN]
    received = next(e for e in beatless.client.events(run) if e.type == "SignalReceived")
    assert received.data is not None
    assert received.data["decision"]["link"] == link.id
    assert link.token not in str(beatless.client.events(run))
    assert link.token not in repr(link)
    beatless.verify()


def test_a_link_that_may_not_decide_says_why(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    client = beatless.client
    links = {name: client.approval_link(run, "refund", by=ANN) for name in ("revoked", "late")}
    short = client.approval_link(run, "refund", by=ANN, expires_in=30)
    client.revoke_approval_link(links["revoked"].id)
    with pytest.raises(BadRequest, match="does not exist"):
        client.revoke_approval_link("nothing")
    answers = {
        "nowhere": (api("GET", "/approve/ba_nothing"), 404, "no such link"),
        "revoked": (api("GET", f"/{links['revoked'].path}"), 410, "revoked"),
        "post": (post(api, links["revoked"].path, amount="1"), 410, "revoked"),
    }
    beatless.advance(60)
    answers["expired"] = (post(api, short.path, amount="1"), 410, "expired")
    client.approve_run(run, "refund", {"amount": 1}, by=BOB)
    answers["decided"] = (post(api, links["late"].path, amount="1"), 409, BOB)
    for answer, status, text in answers.values():
        assert (answer.status, text in answer.text) == (status, True), answer.text
    assert post(api, "approve/%00").status == 404


def test_a_link_that_is_revoked_while_its_form_is_read_decides_nothing(beatless: Kit) -> None:
    run = waiting(beatless, "asks")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    found = beatless.client.link_of(link.token)
    assert found is not None
    beatless.client.revoke_approval_link(link.id)
    with pytest.raises(ApprovalNotOpen):
        beatless.client.decide_by_link(found[0], {"amount": 1})
    assert outcomes(beatless, run) == []


def test_a_link_of_a_run_that_has_ended_or_timed_out_decides_nothing(
    beatless: Kit, api: Api
) -> None:
    cancelled, late = waiting(beatless, "asks"), waiting(beatless, "asks")
    links = [beatless.client.approval_link(run, "refund", by=ANN) for run in (cancelled, late)]
    beatless.client.cancel_run(cancelled)
    beatless.advance(THREE_DAYS_S + 1)
    beatless.work_until_idle()
    assert [api("GET", f"/{link.path}").status for link in links] == [410, 410]
    assert [post(api, link.path, amount="1").status for link in links] == [410, 410]
    with pytest.raises(RunEnded):
        beatless.client.approval_link(late, "refund", by=ANN)


def test_a_link_that_was_made_before_the_approval_is_of_its_next_occurrence(
    beatless: Kit, api: Api
) -> None:
    run = beatless.start_run("asks_async").run_id
    first = beatless.client.approval_link(run, "Ship_it", by=ANN)
    assert (first.occurrence, api("GET", f"/{first.path}").status) == ("Ship_it", 409)
    beatless.work_until_idle()
    assert post(api, first.path, approved="true").status == 200
    second = beatless.client.approval_link(run, "Ship_it#2", by=ANN)
    assert api("GET", f"/{second.path}").status == 409
    beatless.work_until_idle()
    assert beatless.client.approval_link(run, "Ship_it", by=ANN).occurrence == "Ship_it#2"
    assert post(api, first.path, approved="false").status == 410
    shown = api("GET", f"/{second.path}")
    assert "Approve</button>" in shown.text
    assert post(api, second.path, approved="false", comment="no").status == 200
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == [True, False, "no", "Ship_it#2"]


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_link_ends_with_the_token_that_made_it(beatless: Kit, api: Api, how: str) -> None:
    run = waiting(beatless, "asks")
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    token_id, secret = tokens.create([Scope.RUNS_WRITE], seconds=3600)
    tokens.create([Scope.RUNS_WRITE])
    path = f"/v1/runs/{run}/approvals/refund/links"
    made = api("POST", path, {"by": ANN}, Authorization=f"Bearer {secret}").json
    ours = beatless.client.approval_link(run, "refund", by=ANN)
    assert api("GET", f"/approve/{made['token']}").status == 200

    if how == "revoked":
        tokens.revoke(token_id)
    else:
        beatless.advance(3601)
    shown = api("GET", f"/approve/{made['token']}")
    assert (shown.status, "revoked" in shown.text) == (410, True)
    assert post(api, f"approve/{made['token']}", amount="1").status == 410
    assert beatless.client.get_run(run).state == "waiting"
    assert post(api, ours.path, amount="7").status == 200


def test_a_link_that_was_made_while_there_was_no_token_ends_with_the_first(
    beatless: Kit, api: Api
) -> None:
    run = waiting(beatless, "asks")
    made = api("POST", f"/v1/runs/{run}/approvals/refund/links", {"by": ANN}).json
    assert api("GET", f"/approve/{made['token']}").status == 200
    Tokens(beatless.app.engine, beatless.app.settings.schema).create([Scope.RUNS_READ])
    assert api("GET", f"/approve/{made['token']}").status == 410


def test_a_link_needs_no_token_and_lets_into_nothing_else(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, reader = tokens.create([Scope.RUNS_READ])
    _, writer = tokens.create([Scope.RUNS_WRITE])
    far = {"Host": "beatless.example", "X_Forwarded_For": "192.0.2.1"}
    assert api("GET", f"/{link.path}", **far).status == 200
    assert api("GET", f"/v1/runs/{run}", Authorization=f"Bearer {link.token}").status == 401
    assert api("GET", f"/v1/runs/{run}/stream?token={link.token}").status == 401
    decision = {"data": {"amount": 1}, "by": ANN}
    path = f"/v1/runs/{run}/approvals/refund"
    bearers = [f"Bearer {each}" for each in ("x", reader, writer)]
    statuses = [api("POST", path, decision, Authorization=each).status for each in bearers]
    assert statuses == [401, 403, 202]


def test_the_body_of_a_decision_by_a_link_is_a_form(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    assert api("POST", f"/{link.path}", {"f.amount": 1}).status == 415
    assert api("POST", f"/{link.path}", b"f.amount=\xff", **FORM).status == 400
    assert api("POST", f"/{link.path}", b"a=1&" * 1001, **FORM).status == 400
    assert api("POST", f"/{link.path}", b"x" * (1024 * 1024 + 1), **FORM).status == 413


def test_who_has_no_link_is_refused_before_the_body_has_come(beatless: Kit, api: Api) -> None:
    connection = HTTPConnection("127.0.0.1", api.port, timeout=60)
    with closing(connection):
        connection.putrequest("POST", "/approve/ba_nothing")
        connection.putheader("Content-Type", FORM["Content_Type"])
        connection.putheader("Content-Length", "10")
        connection.endheaders()
        assert connection.getresponse().status == 404


def test_the_address_of_a_link_is_that_of_the_proxy_which_ends_tls(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    _, api.token = Tokens(beatless.app.engine, beatless.app.settings.schema).create(
        [Scope.RUNS_WRITE]
    )
    path = f"/v1/runs/{run}/approvals/refund/links"
    proxied = {"Host": "beatless.example", "X_Forwarded_Proto": "https"}
    made = api("POST", path, {"by": ANN}, **proxied)
    assert made.status == 201, made.text
    assert made.json["url"] == f"https://beatless.example/approve/{made.json['token']}"
    assert api("POST", path, {"by": ANN}).json["url"].startswith(f"{api.url}/approve/")


def test_two_posts_of_two_links_at_once_decide_once(beatless: Kit, api: Api) -> None:
    run = waiting(beatless, "asks")
    links = [beatless.client.approval_link(run, "refund", by=who) for who in (ANN, BOB)]
    statuses: list[int] = []
    both = threading.Barrier(2)

    def decide(place: int) -> None:
        both.wait(timeout=60)
        statuses.append(post(api, links[place].path, amount=str(place)).status)

    threads = [threading.Thread(target=decide, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(statuses) == [200, 409]
    beatless.work_until_idle()
    assert outcomes(beatless, run) == ["received"]
    beatless.verify()


def test_a_removed_run_leaves_neither_links_nor_decisions(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = waiting(beatless, "asks")
    beatless.client.approval_link(run, "refund", by=ANN)
    beatless.approve(run, "refund", {"amount": 1}, by=ANN)
    beatless.work_until_idle()
    beatless.client.remove_run(run)
    for table in ("decisions", "approval_links"):
        (left,) = postgres.execute(f"SELECT count(*) FROM {table}").fetchone() or (None,)
        assert left == 0


DOCS = (Path(__file__).parents[2] / "docs" / "plans.md").read_text()


def documented(file: str) -> dict[str, Any]:
    """The names of an example of the documentation."""
    (block,) = re.findall(rf"```python\n(# {file}\n.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {"__name__": file}
    exec(block, names)
    return names


@pytest.mark.parametrize("decided", [True, False])
def test_the_list_of_the_documentation_does_what_it_says(beatless: Kit, decided: bool) -> None:
    beatless.app.plans["complaint"] = documented("complaint.py")["complaint"]
    run = waiting(beatless, "complaint")
    if decided:
        beatless.approve(run, "refund", {"amount": 12}, by=ANN)
    beatless.advance(0 if decided else THREE_DAYS_S + 1)
    beatless.work_until_idle()
    found = [e.step for e in beatless.client.events(run) if e.type == "StepFinished"]
    assert found == (["charge", "pay_back", "close"] if decided else ["charge", "close"])
    beatless.verify()


def test_the_function_of_the_documentation_does_what_it_says(beatless: Kit) -> None:
    beatless.app.plans["sale"] = documented("sale.py")["sale"]
    run = beatless.start_run("sale", {"amount": 30}).run_id
    beatless.work_until_idle()
    beatless.signal(run, "complaint")
    beatless.work_until_idle()
    beatless.approve(run, "refund", {"approved": True, "comment": "late"}, by=ANN)
    beatless.work_until_idle()
    payment = "paid 30, paid back: late"
    assert beatless.client.get_run(run).result == {"payment": payment, "by": ANN}
    beatless.verify()


@pytest.mark.parametrize("decided", [False, True])
def test_who_rewords_a_title_that_is_the_name_is_told_so(beatless: Kit, decided: bool) -> None:
    def reworded(title: str, **options: Any) -> Plan:
        @plan("reworded")
        def function(run: RunContext[Any]) -> None:
            run.approve(title, **options)
            run.wait("then")

        return function

    beatless.app.plans["reworded"] = reworded("Refund 7 euros?")
    run = waiting(beatless, "reworded")
    if decided:
        beatless.approve(run, "Refund_7_euros")
        beatless.work_until_idle()
    beatless.app.plans["reworded"] = reworded("Refund 8 euros?")
    if decided:
        beatless.signal(run, "then")
    else:
        beatless.approve(run, "Refund_7_euros")
    beatless.work_until_idle()
    told = "plan reworded asks for Refund_8_euros where Refund_7_euros is stored: if the title of"
    assert told in beatless.describe(run)
    assert 'run.approve(…, name="Refund_7_euros")' in beatless.describe(run)

    beatless.app.plans["reworded"] = reworded("Refund 8 euros?", name="Refund_7_euros")
    beatless.signal(run, "then")
    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run).state is RunState.COMPLETED
    beatless.verify()
