"""An execution without Postgres: what it asks for and what it writes, whatever comes of it.

The journal is a list here, and a worker is a loop that answers requests. It dies where a test says
so, and the next worker goes on with what the list holds.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from beatless import BadPayload, Fatal, Finish, Goto, Plan, Snooze, retry, step
from beatless.orchestrator.boundaries import MAX_LOSSES
from beatless.orchestrator.errors import RunCancelled, StepTimeout, WorkerStops
from beatless.orchestrator.events import Event, NewEvent
from beatless.orchestrator.execution import Execution
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.parallel_execution import ParallelExecution
from beatless.orchestrator.records import CheckpointPage, Run
from beatless.orchestrator.requests import (
    AwaitBody,
    BeginBody,
    BodyEnded,
    Cancelled,
    Commit,
    CommitFailed,
    CommitIfQuiet,
    Committed,
    EndBody,
    Raised,
    ReadJournal,
    Recover,
    Recovered,
    Reply,
    Request,
    Requests,
    Returned,
    RunBody,
    Signalled,
    Stopped,
    TransactionLost,
    Unstorable,
)
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.undo_execution import UndoExecution

MAX_EVENT_BYTES = 1000
START_MS = 1_700_000_000_000


class WorkerDied(Exception):
    """The worker of the test ends here, without a word."""


Body = Callable[[RunBody], Any]
"""What a step does: it returns a value, or the Reply of a body that has not returned."""


@dataclass
class Journal:
    """One run as the database has it."""

    plan: Plan
    events: list[Event] = field(default_factory=list)
    state: RunState = RunState.QUEUED
    cancelled: bool = False
    boundaries: list[Boundary] = field(default_factory=list)
    """What was committed, in order."""
    reasons: list[str] = field(default_factory=list)
    claims: int = 0
    input: Any = None
    version: str = "1"
    inbox: list[tuple[str, Any]] = field(default_factory=list)
    """Signals that are not events yet."""
    passed_s: float = 0.0
    """Time that a test has let pass."""
    unseen: bool = False
    """Nobody knows whether a worker that says nothing more has died: its lease runs out."""

    def __post_init__(self) -> None:
        self.append("RunStarted", data={"plan": self.plan.name})

    def append(self, type: str, **members: Any) -> None:
        seq = len(self.events) + 1
        ts = START_MS + seq + round(self.passed_s * 1000)
        if type == "WaitStarted" and "seconds" in members["data"]:
            members["data"]["until"] = ts + round(members["data"]["seconds"] * 1000)
        self.events.append(Event(run_id="r", seq=seq, ts=ts, type=type, source="worker", **members))

    def take_in(self) -> None:
        """Make events of the signals that have come."""
        for name, data in self.inbox:
            self.append("SignalReceived", data={"name": name, "data": data, "key": "k"})
        self.inbox.clear()

    def cancel(self) -> None:
        self.cancelled = True
        undo = self.plan.on_cancel
        self.append("CancelRequested", data={"on_cancel": undo.name} if undo else None)

    def write(self, settlement: Settlement) -> Committed:
        boundary = settlement.chosen(cancelled=self.cancelled)
        for event in boundary.events:
            self.append(event.type.value, **members(event))
        self.state = boundary.state
        self.boundaries.append(boundary)
        self.reasons.append(settlement.reason)
        last_seq = len(self.events)
        if self.state is RunState.RUNNING:
            self.take_in()
        return Committed(cancelled=self.cancelled, last_seq=last_seq)

    def claim(self, *, begun: bool = False, late: bool = False) -> Lease:
        # A cancel makes the run due, and leaves no time since when.
        ran_out = self.unseen and self.state is RunState.RUNNING
        waited = 0.0 if self.state is RunState.QUEUED and not self.cancelled else None
        self.state = RunState.RUNNING
        self.claims += 1
        if begun:
            self.append("StepStarted", step=self.plan.steps[0].name, attempt=1)
        now = datetime.fromtimestamp(START_MS / 1000, UTC)
        run = Run(
            run_id="r",
            namespace="default",
            plan=self.plan.name,
            plan_version=self.version,
            queue="default",
            priority=0,
            state=RunState.RUNNING,
            input=self.input,
            result=None,
            error=None,
            key=None,
            last_seq=len(self.events),
            attempt=self.claims,
            worker="w",
            cancel_requested_at=now if self.cancelled else None,
            not_before=None,
            deadline_at=None,
            tags={},
            retry_of=None,
            created_at=now,
            started_at=now,
            finished_at=None,
            pruned_seq=0,
        )
        deadline = 0.0 if late else None
        return Lease(
            run=run,
            token=1,
            begun=begun,
            cancelled=self.cancelled,
            deadline=deadline,
            waited=waited,
            ran_out=ran_out,
            age=self.passed_s,
        )

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events[1:]]

    @property
    def calls(self) -> list[str]:
        """What has happened, as "StepStarted a"."""
        return [f"{event.type} {event.step or ''}".strip() for event in self.events[1:]]


def members(event: NewEvent) -> dict[str, Any]:
    data = None if event.data is None else json.loads(event.data)
    return {"step": event.step, "attempt": event.attempt, "data": data}


class Worker:
    """Answers the requests of an execution from a journal, and dies at one of them if told to."""

    def __init__(
        self,
        journal: Journal,
        body: Body = lambda request: request.occurrence,
        *,
        dies_before: int | None = None,
        dies_after: int | None = None,
        commit: Callable[[Commit], Reply | None] = lambda _commit: None,
        looks: Callable[[], object] = lambda: None,
        picks: Callable[[list[str]], str] = lambda names: names[0],
        page_events: int = 1000,
        **options: Any,
    ) -> None:
        """`commit` may answer a commit in the journal's place, with or without writing it.

        `looks` is called before each look for signals, and `picks` says which of the bodies that
        are in flight ends next.
        """
        self.journal = journal
        self.body = body
        self.commit, self.looks, self.picks = commit, looks, picks
        self.in_flight: dict[str, RunBody] = {}
        """The bodies that were begun beside one another."""
        self.told_to_end: list[str] = []
        self.page_events = page_events
        self.told = 0
        """The seq up to which the execution knows the signals."""
        self.dies_before, self.dies_after = dies_before, dies_after
        self.requests: list[Request] = []
        self.committed = False
        """Whether the commit in doubt has happened."""
        self.options = options

    def work(self, *, begun: bool = False, late: bool = False) -> None:
        lease = self.journal.claim(begun=begun, late=late)
        plan = self.journal.plan
        options = {"max_event_bytes": MAX_EVENT_BYTES, **self.options}
        execution = (
            ParallelExecution(plan, lease, read_ends=lambda _first, _last: [], plans={}, **options)
            if isinstance(plan, FunctionPlan)
            else Execution(plan, lease, **options)
        )

        def asked() -> Requests:
            yield from execution.requests()
            if execution.undoes:
                undo = UndoExecution(plan, lease, read_ends=lambda _first, _last: [], **options)
                yield from undo.requests()

        requests, reply = asked(), None
        while True:
            try:
                request = requests.send(reply)
            except StopIteration:
                return
            self.requests.append(request)
            if len(self.requests) == self.dies_before:
                raise WorkerDied
            reply = self.answer(request)
            if len(self.requests) == self.dies_after:
                raise WorkerDied

    def answer(self, request: Request) -> Reply | None:
        match request:
            case ReadJournal(behind=behind):
                return self.page(0 if behind is None else behind.events[-1].seq)
            case CommitIfQuiet():
                self.looks()
                self.journal.take_in()
                fresh = [e for e in self.journal.events[self.told :] if e.type == "SignalReceived"]
                self.told = len(self.journal.events)
                return Signalled(fresh) if fresh else self.journal.write(request.settlement)
            case Recover():
                return Recovered(committed=self.committed, ended=self.journal.state.final)
            case Commit():
                return self.commit(request) or self.journal.write(request.settlement)
            case RunBody():
                return self.call(request)
            case BeginBody(body=body):
                assert body.occurrence not in self.in_flight
                self.in_flight[body.occurrence] = body
                return None
            case AwaitBody():
                name = self.picks(list(self.in_flight))
                return BodyEnded(occurrence=name, outcome=self.call(self.in_flight.pop(name)))
            case EndBody(occurrence=occurrence):
                self.told_to_end.append(occurrence)
                return None

    def page(self, after: int) -> CheckpointPage:
        """What is behind this seq, a page of a few events at a time."""
        ahead = [event for event in self.journal.events if event.seq > after]
        events = ahead[: self.page_events]
        self.told = events[-1].seq
        return CheckpointPage(events=events, restarted_seq=0, last=events == ahead)

    def call(self, request: RunBody) -> Reply:
        value = self.body(request)
        if isinstance(value, Raised | Cancelled | Stopped | TransactionLost):
            return value
        try:
            return Returned(request.conclude(value))
        except (BadPayload, Fatal) as error:
            return Raised(error)


def steps(*names: str, **options: Any) -> list[Any]:
    return [step(name=name, **options)(lambda ctx: None) for name in names]


UNDO = step(name="undo")(lambda ctx: None)
FAILS = ValueError("no")
RETRIED = {"retry": retry(max_attempts=2, initial=10, jitter=0)}

WENT_ON = ["StepFinished", "StepStarted"]
ENDED = ["StepFinished", "RunFinished"]
FAILED = ["StepFailed", "RunFinished"]

OUTCOMES: dict[str, tuple[Any, list[str], RunState, list[str], list[str]]] = {
    # what the body of `a` gives, then the events and the state that follow,
    # then the events if the run was cancelled before, without and with an `on_cancel` step
    "a result": (1, WENT_ON, RunState.RUNNING, ENDED, ["StepFinished"]),
    "Goto": (Goto("c", 1), WENT_ON, RunState.RUNNING, ENDED, ["StepFinished"]),
    "Finish": (Finish(1), ENDED, RunState.COMPLETED, ENDED, ["StepFinished"]),
    "Snooze": (Snooze(5), ["DebugTrace"], RunState.QUEUED, ["RunFinished"], []),
    "a failure": (Raised(FAILS), ["StepFailed"], RunState.QUEUED, FAILED, ["StepFailed"]),
    "Fatal": (Raised(Fatal("no")), FAILED, RunState.FAILED, FAILED, ["StepFailed"]),
    "no JSON": (object(), FAILED, RunState.FAILED, FAILED, ["StepFailed"]),
    "too large a result": ("x" * 2000, FAILED, RunState.FAILED, FAILED, ["StepFailed"]),
    "no such route": (Goto("b"), FAILED, RunState.FAILED, FAILED, ["StepFailed"]),
    "a worker that stops": (
        *(Stopped(), ["DebugTrace"], RunState.QUEUED),
        *(["DebugTrace", "RunFinished"], ["DebugTrace"]),
    ),
}


def first_boundary(plan: Plan, value: Any, *, cancelled: bool) -> tuple[list[str], Journal]:
    """What the first attempt commits, and the journal after it."""
    journal = Journal(plan)

    def body(_request: RunBody) -> Any:
        if cancelled:
            journal.cancel()
        return value

    worker = Worker(journal, body, dies_before=3)
    with suppress(WorkerDied):
        worker.work(begun=True)
    # Only a run that goes on here is asked anything more of.
    assert len(worker.requests) == 2 + (journal.state is RunState.RUNNING)
    (boundary,) = journal.boundaries
    return [event.type.value for event in boundary.events], journal


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_writes_one_boundary(outcome: str) -> None:
    value, expected, state, *_ = OUTCOMES[outcome]
    plan = Plan("p", steps("a", "b", "c", **RETRIED), routes={"a": ["c"]})
    types, journal = first_boundary(plan, value, cancelled=False)
    assert (types, journal.state) == (expected, state)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_of_a_cancelled_run_ends_it(outcome: str) -> None:
    value, *_, expected, _ = OUTCOMES[outcome]
    plan = Plan("p", steps("a", "b", "c", **RETRIED), routes={"a": ["c"]})
    types, journal = first_boundary(plan, value, cancelled=True)
    assert (types, journal.state) == (expected, RunState.CANCELLED)
    assert journal.events[-1].data["outcome"] == "cancelled"


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_of_a_cancelled_run_is_followed_by_its_undoing(outcome: str) -> None:
    value, *_, expected = OUTCOMES[outcome]
    plan = Plan("p", steps("a", "b", "c", **RETRIED), routes={"a": ["c"]}, on_cancel=UNDO)
    types, journal = first_boundary(plan, value, cancelled=True)
    assert (types, journal.state) == (expected, RunState.QUEUED)

    undone = Worker(journal)
    undone.work()
    assert journal.calls[-3:] == ["StepStarted undo", "StepFinished undo", "RunFinished"]
    assert journal.events[-2].data == {"result": "undo", "on_cancel": True}
    assert journal.state is RunState.CANCELLED


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_no_outcome_of_the_undoing_ends_as_anything_but_cancelled(outcome: str) -> None:
    value, *_ = OUTCOMES[outcome]
    plan = Plan("p", steps("a", "b"), on_cancel=UNDO)
    journal = Journal(plan)
    journal.append("StepStarted", step="a", attempt=1)
    journal.cancel()
    with pytest.raises(WorkerDied):
        Worker(journal, lambda request: value, dies_after=4).work()
    waits = isinstance(value, Snooze | Stopped)
    assert journal.state is (RunState.QUEUED if waits else RunState.CANCELLED)


def test_a_body_that_heeds_the_cancel_has_failed_with_it() -> None:
    plan = Plan("p", steps("a", "b"))
    types, journal = first_boundary(plan, Cancelled(), cancelled=True)
    assert types == FAILED
    assert journal.events[-2].data["error"]["type"] == RunCancelled.__name__
    assert journal.state is RunState.CANCELLED


def test_a_body_that_heeds_the_cancel_is_followed_by_the_undoing() -> None:
    types, journal = first_boundary(
        Plan("p", steps("a"), on_cancel=UNDO), Cancelled(), cancelled=True
    )
    assert (types, journal.state, journal.reasons) == (["StepFailed"], RunState.QUEUED, ["cancel"])


def test_a_worker_without_the_step_that_a_cancel_has_promised_leaves_the_run_to_others() -> None:
    journal = Journal(Plan("p", steps("a"), on_cancel=UNDO))
    journal.append("StepStarted", step="a", attempt=1)
    journal.cancel()
    journal.plan = Plan("p", steps("a"))
    Worker(journal).work()
    assert (journal.state, journal.reasons) == (RunState.QUEUED, ["unknown_step"])


@pytest.mark.parametrize(
    ("reason", "types"),
    [
        (StepTimeout("a", 1.0), ["StepFailed"]),
        (RunCancelled("r"), FAILED),
        (WorkerStops("r"), ["DebugTrace"]),
    ],
)
def test_an_attempt_that_must_end_before_its_body_writes_what_the_reason_says(
    reason: Exception, types: list[str]
) -> None:
    journal = Journal(Plan("p", steps("a", **RETRIED)))
    worker = Worker(journal, dies_before=2)
    with pytest.raises(WorkerDied):
        worker.work(begun=True)
    (body, _) = worker.requests
    assert isinstance(body, RunBody)
    commit = body.interrupted(reason)
    assert [event.type.value for event in commit.settlement.normal.events] == types
    assert (commit.failure is not None) is isinstance(reason, StepTimeout)


def finished_once(journal: Journal) -> None:
    """Each step has one result, and the run one end."""
    calls = journal.calls
    ends = [call for call in calls if call.startswith(("StepFinished", "RunFinished"))]
    assert ends == ["StepFinished a", "StepFinished b", "StepFinished c", "RunFinished"]
    assert [event.seq for event in journal.events] == list(range(1, len(calls) + 2))


def points() -> Iterator[tuple[str, int]]:
    worker = Worker(Journal(Plan("p", steps("a", "b", "c"))))
    worker.work(begun=True)
    for number in range(1, len(worker.requests) + 1):
        yield "dies_before", number
        yield "dies_after", number


@pytest.mark.parametrize(("when", "number"), list(points()))
def test_a_worker_that_dies_anywhere_is_followed_by_one_that_goes_on(
    when: str, number: int
) -> None:
    journal, called = Journal(Plan("p", steps("a", "b", "c"))), []

    def body(request: RunBody) -> str:
        # Begun in the journal before it is called, and not called again once it has finished.
        assert f"StepStarted {request.occurrence}" in journal.calls
        assert f"StepFinished {request.occurrence}" not in journal.calls
        called.append(request.occurrence)
        return request.occurrence

    with pytest.raises(WorkerDied):
        Worker(journal, body, **{when: number}).work(begun=True)
    if not journal.state.final:
        Worker(journal, body).work()
    finished_once(journal)
    assert journal.state is RunState.COMPLETED
    assert len(called) <= 4


def test_a_step_that_ends_its_process_each_time_is_given_up() -> None:
    journal = Journal(Plan("p", steps("a", retry=retry(max_crashes=3))))
    for claim in range(3):
        with pytest.raises(WorkerDied):
            Worker(journal, dies_before=1 if claim == 0 else 3).work(begun=claim == 0)
    Worker(journal).work()
    assert journal.types == ["StepStarted"] * 3 + FAILED
    assert journal.events[-1].data["error"]["type"] == "StepCrashed"


@pytest.mark.parametrize("happened", [True, False])
@pytest.mark.parametrize("lost", [TransactionLost("gone"), CommitFailed(FAILS, leaving=False)])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_commit_whose_answer_is_lost_is_looked_for_and_made_once(
    at: int, lost: Reply, happened: bool
) -> None:
    journal = Journal(Plan("p", steps("a", "b", "c", **RETRIED)))
    commits = 0

    def commit(request: Commit) -> Reply | None:
        nonlocal commits
        commits += 1
        if commits != at:
            return None
        if happened:
            journal.write(request.settlement)
        worker.committed = happened
        return lost

    worker = Worker(journal, commit=commit)
    worker.work(begun=True)
    if not happened and isinstance(lost, CommitFailed):  # the step has failed, and is tried again
        assert journal.state is RunState.QUEUED
        Worker(journal).work()
    finished_once(journal)
    if happened:
        assert "DebugTrace" not in journal.types
    assert len([request for request in worker.requests if isinstance(request, Recover)]) == 1
    starts = [event.attempt for event in journal.events if event.type == "StepStarted"]
    assert set(starts) <= ({1} if happened or isinstance(lost, TransactionLost) else {1, 2})


def test_transactions_that_are_lost_in_a_row_wait_longer_and_end_at_last() -> None:
    journal = Journal(Plan("p", steps("a")))
    claims = 0
    while not journal.state.final:
        Worker(journal, lambda request: TransactionLost("gone")).work(begun=claims == 0)
        claims += 1
    assert journal.events[-1].data["error"]["type"] == "TransactionLost"
    assert journal.types.count("StepStarted") == MAX_LOSSES
    delays = [boundary.delay_s for boundary in journal.boundaries if boundary.delay_s]
    assert delays[0] < delays[4] < delays[-1] <= 60


def test_refused_transactions_never_end_a_run() -> None:
    journal = Journal(Plan("p", steps("a")))
    for claim in range(MAX_LOSSES + 5):
        Worker(journal, lambda request: TransactionLost("full", refused=True)).work(begun=not claim)
    assert journal.state is RunState.QUEUED
    Worker(journal).work()
    assert journal.state is RunState.COMPLETED


def test_a_failure_that_cannot_be_stored_is_replaced_by_one_that_can() -> None:
    journal = Journal(Plan("p", steps("a")))
    refused: list[Commit] = []

    def commit(request: Commit) -> Reply | None:
        if request.failure is None:
            return None
        refused.append(request)
        return Unstorable("character \u20ac has no equivalent in LATIN1")

    Worker(journal, lambda request: Raised(FAILS), commit=commit).work(begun=True)
    assert len(refused) == 1
    assert journal.state is RunState.FAILED
    error = journal.events[-1].data["error"]
    assert error["type"] == "BadPayload"
    assert error["message"].isascii()


def test_a_process_that_is_ended_in_a_body_gives_its_run_back_first() -> None:
    journal = Journal(Plan("p", steps("a")))
    with pytest.raises(SystemExit):
        Worker(journal, lambda request: Stopped(SystemExit())).work(begun=True)
    assert (journal.state, journal.reasons) == (RunState.QUEUED, ["shutdown"])
    Worker(journal).work()
    assert {event.attempt for event in journal.events if event.step} == {1}


@pytest.mark.parametrize("happened", [True, False])
def test_a_process_that_is_ended_in_a_commit_gives_its_run_back_first(happened: bool) -> None:
    journal = Journal(Plan("p", steps("a", "b", "c")))

    def commit(request: Commit) -> Reply | None:
        if len(worker.requests) > 2:
            return None
        if happened:
            journal.write(request.settlement)
        worker.committed = happened
        return CommitFailed(SystemExit(), leaving=True)

    worker = Worker(journal, commit=commit)
    with pytest.raises(SystemExit):
        worker.work(begun=True)
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "shutdown")
    Worker(journal).work()
    finished_once(journal)


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"stopping": lambda: True}])
def test_a_run_that_is_given_back_goes_on_where_it_was(options: dict[str, Any]) -> None:
    journal = Journal(Plan("p", steps("a", "b", "c")))
    for claim in range(3):
        Worker(journal, **options).work(begun=not claim)
    finished_once(journal)
    assert [len(boundary.events) for boundary in journal.boundaries] == [1, 1, 1, 1, 2]
    # For a version of the plan in which the step that has finished is no more.
    given_back = [event.data for event in journal.events if event.type == "StepFinished"][:2]
    assert [data["following"] for data in given_back] == ["b", "c"]


def test_a_run_whose_deadline_has_passed_fails_at_its_next_boundary() -> None:
    journal = Journal(Plan("p", steps("a", "b")))
    Worker(journal).work(begun=True, late=True)
    assert journal.types == ["StepStarted", *ENDED]
    assert journal.events[-1].data["error"]["type"] == "DeadlineExceeded"


def test_a_run_at_an_unknown_step_waits_the_longer_the_longer_it_has_waited() -> None:
    before = Plan("p", steps("a", "gone", "b"))
    journal = Journal(before)
    with pytest.raises(WorkerDied):
        Worker(journal, dies_after=2).work(begun=True)
    journal.plan = Plan("p", steps("a", "b"))
    Worker(journal, redispatch_s=15.0).work()
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "unknown_step")
    assert journal.boundaries[-1].delay_s == 1.0
    lease = journal.claim()
    lease.age = 20.0
    execution = Execution(journal.plan, lease, max_event_bytes=MAX_EVENT_BYTES)
    requests = execution.requests()
    next(requests)
    commit = requests.send(CheckpointPage(events=journal.events, restarted_seq=0, last=True))
    assert isinstance(commit, Commit)
    assert commit.settlement.normal.delay_s == pytest.approx(10.0, abs=0.1)


def test_runs_can_share_one_thread_and_commit_their_boundaries_together() -> None:
    """Another driver over the same core: one body at a time, and a commit for all that wait."""
    plan = Plan("p", steps("a", "b", "c"))
    workers = [Worker(Journal(plan)) for _ in range(5)]
    executions = [
        Execution(plan, worker.journal.claim(begun=True), max_event_bytes=MAX_EVENT_BYTES)
        for worker in workers
    ]
    requests = [execution.requests() for execution in executions]
    asked: dict[int, Request] = {run: next(requests[run]) for run in range(len(workers))}
    rounds, bodies = 0, 0
    while asked:
        for run, request in list(asked.items()):
            if isinstance(request, RunBody):
                bodies += 1
                asked[run] = requests[run].send(workers[run].answer(request))
        rounds += 1
        group = list(asked.items())
        replies = {run: workers[run].answer(request) for run, request in group}
        asked = {}
        for run, reply in replies.items():
            with suppress(StopIteration):
                asked[run] = requests[run].send(reply)
    assert (rounds, bodies) == (3, 15)
    for worker in workers:
        finished_once(worker.journal)
