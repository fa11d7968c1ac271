"""Calls that start child runs, and wait for their ends. Pure.

The children of a run have numbers: 1, 2, 3 … in the order of the calls. So a call is a range of
numbers, which is in the journal of the parent, and its results are read from the rows of the
children, in pages and only when they are asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

from beatless.orchestrator.arguments import digest
from beatless.orchestrator.errors import BadPayload, ChildFailed
from beatless.orchestrator.events import Event, EventType, NewEvent, encode
from beatless.orchestrator.function_plan import given_input
from beatless.orchestrator.limit import limits_of
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun, Run, new_run_id
from beatless.orchestrator.typed_input import INPUT
from beatless.orchestrator.waits import Wait, WaitKind, check_name

PAGE_CHILDREN = 1000
"""Children that one statement starts."""

RIVALS = "rivals"
"""In ChildrenFinished: the numbers of the children of which one was waited for."""

PAGE_RESULTS = 200
"""Children whose results are read at once."""

MOST_RIVALS = 1000
"""Children of which `run.first` waits for one: their numbers are in one event."""

PAGE_DIGEST = 100
"""Inputs, and digests, of a call that starts its children little by little: it has a digest for
each hundred of its inputs, or for each hundredth of them. Part of the format of ChildrenStarted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The children of one call, by their numbers."""

    plan: str
    first: int
    count: int
    rivals: tuple[int, ...] = ()
    """Their numbers, of which any may end the call; else it is all from `first` on."""
    won: int | None = None
    """The number of the one that has ended well first, and so the call."""
    at_once: int | None = None
    collects: bool = False
    """The failure of a child ends none of the others."""
    run_id: str | None = None
    """Of a child that was started alone."""
    error: dict[str, Any] | None = None
    """The failure that has ended the call."""
    failures: int = 0
    """How many have failed, of a call that collects failures and has ended."""
    digests: Sequence[str] = ()
    """Of pages of the inputs, of a call that starts its children little by little."""

    @property
    def last(self) -> int:
        """The highest number."""
        return self.first + self.count - 1

    @property
    def numbers(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)

    @classmethod
    def from_event(cls, event: Event) -> Self:
        """Of a ChildrenStarted, or the ChildrenFinished of a call that has started none.

        Raises LookupError and TypeError for one that only SQL can have written.
        """
        data = event.data or {}
        if not all(type(data[name]) is int for name in ("first", "count")):
            raise TypeError("first and count are numbers")
        return cls(
            plan=data["plan"],
            first=data["first"],
            count=data["count"],
            at_once=data.get("at_once"),
            collects=data.get("failure") == "collect",
            run_id=data.get("run_id"),
            rivals=tuple(data.get(RIVALS, ())),
            won=data.get("won"),
            error=data.get("error"),
            digests=data.get("digests", ()),
        )

    def started(self, occurrence: str, **data: Any) -> NewEvent:
        """The event by which they are started."""
        facts: dict[str, Any] = {"plan": self.plan, "first": self.first, "count": self.count}
        if self.run_id is not None:
            facts["run_id"] = self.run_id
        else:
            facts["failure"] = "collect" if self.collects else "fail"
        if self.at_once is not None:
            facts["at_once"] = self.at_once
        if self.digests:
            facts["digests"] = list(self.digests)
        return _event(EventType.CHILDREN_STARTED, occurrence, facts | data)

    def finished(self, occurrence: str, **data: Any) -> NewEvent:
        """The event by which the wait for them ends."""
        facts: dict[str, Any] = {"plan": self.plan, "first": self.first, "count": self.count}
        if self.rivals:
            facts[RIVALS] = list(self.rivals)
        if self.won is not None:
            facts["won"] = self.won
        if self.error is not None:
            facts["error"] = self.error
        if self.failures:
            facts["failed"] = self.failures
        return _event(EventType.CHILDREN_FINISHED, occurrence, facts | data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrenWait:
    """The wait of a run for its children, as people are told of it."""

    occurrence: str
    """The call that has started the last of them."""
    ended: int
    count: int

    def __str__(self) -> str:
        """As in "12 of 20 have ended"."""
        return f"{self.ended} of {self.count} {'has' if self.count == 1 else 'have'} ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildCall(Wait):
    """A call of the function: which children are started, or of which the end is waited for."""

    plan: Plan
    inputs: Sequence[Any] = ()
    at_once: int | None = None
    collects: bool = False
    alone: bool = False
    """One child is started, and its end is waited for by another call, if at all."""
    detached: bool = False
    deadline_s: float | None = None
    group: str | None = None
    """That of the children; None: their parent's."""
    tags: Mapping[str, str] | None = None
    """All of the children's; None: their parent's."""
    children: Children | None = None
    """Those that were started by another call."""
    started_by: str = ""
    """The occurrence of that call."""

    def numbered(self, first: int) -> Children:
        """The children of this call, from this number on."""
        return Children(
            plan=self.plan.name,
            first=first,
            count=len(self.inputs),
            at_once=self.at_once,
            collects=self.collects,
        )

    def digest(self) -> str:
        """The digest of the call with all of its inputs. Raises BadPayload."""
        return digest(self.name, [self.alone, self.collects, list(self.inputs)], {})

    def is_open(self, children: Children | None) -> bool:
        """Whether these children are those of this call, apart from inputs that are compared later.

        By `has_inputs`, when they are started: for one that waits for places all of them would be
        compared each time.
        """
        return (
            children is not None
            and bool(children.digests)
            and (len(self.inputs), self.collects) == (children.count, children.collects)
        )

    def has_inputs(self, children: Children, numbers: range) -> bool:
        """Whether these children have the inputs that the call has begun with."""
        if len(self.inputs) != children.count:
            return False
        if not children.digests or not numbers:
            return True
        size = _page_size(children.count)
        first, last = (numbers[0] - children.first) // size, (numbers[-1] - children.first) // size
        try:
            return all(
                self._page_digest(page * size, size) == children.digests[page]
                for page in range(first, last + 1)
            )
        except BadPayload:
            return False

    def page_digests(self) -> Sequence[str]:
        """Those of pages of the inputs, if the children are not all started at once.

        Raises BadPayload.
        """
        count = len(self.inputs)
        if self.at_once is None or count <= max(self.at_once, PAGE_DIGEST):
            return ()
        size = _page_size(count)
        return [self._page_digest(place, size) for place in range(0, count, size)]

    def _page_digest(self, place: int, size: int) -> str:
        return digest(self.name, self.inputs[place : place + size], {})

    def _input(self, place: int) -> Any:
        """One of the inputs as JSON, of the type that the plan declares. Raises BadPayload."""
        return given_input(self.plan, self.inputs[place])

    def runs(
        self,
        parent: Run,
        children: Children,
        numbers: range,
        *,
        trace_context: Mapping[str, str] | None,
        limit: int,
    ) -> list[NewRun]:
        """The runs of some of the children, each of `limit` bytes at most. Raises BadPayload."""
        prefix, mark, _ = parent.run_id.rpartition("~")
        return [
            NewRun(
                run_id=children.run_id or f"{prefix}{mark}{new_run_id()}",
                namespace=parent.namespace,
                plan=self.plan.name,
                plan_version=self.plan.version,
                queue=self.plan.queue,
                input=encode(
                    self._input(number - children.first),
                    where=f"{INPUT} of child {number} of plan {self.plan.name}",
                    limit=limit,
                ),
                key=None,
                not_before=None,
                delay=None,
                deadline=self.deadline_s,
                deadline_at=parent.deadline_at,
                priority=parent.priority,
                group=self.group or parent.group,
                tags=parent.tags if self.tags is None else self.tags,
                trace_context=trace_context,
                parent_id=parent.run_id,
                child_no=number,
                detached=self.detached,
                limits=limits_of(
                    self.plan.limits,
                    self._input(number - children.first) if self.plan.limits else None,
                    prefix=f"{prefix}{mark}",
                ),
            )
            for number in numbers
        ]

    def check_plan(self, plans: Mapping[str, Plan], *, parent: str) -> None:
        """Raises PlanError for a plan that is none of these: no worker would know its runs."""
        if plans.get(self.plan.name) is not self.plan:
            raise PlanError(
                f"plan {parent} starts a run of plan {self.plan.name}, which the App does not "
                "have: make it once, in a module, and give it to the App, as in "
                f"App(settings, plans=[{parent}, {self.plan.name}])"
            )

    def check_inputs(self, limit: int) -> None:
        """Raises BadPayload for an input that a child cannot have: before any was started."""
        for place in range(len(self.inputs)):
            where = f"{INPUT} of plan {self.plan.name}, [{place}]"
            input = self._input(place)
            encode(input, where=where, limit=limit)
            limits_of(self.plan.limits, input, prefix="")


def check_plan(plan: Any) -> None:
    """Raises PlanError for anything but a plan."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"children are runs of a plan, and {plan!r:.200} is none: give them a plan of the App; "
            'of a step, make one: Plan("pack", [pack])'
        )


def child_call(plan: Any, inputs: Sequence[Any], **options: Any) -> ChildCall:
    """A call that starts children. Raises PlanError for anything but a plan."""
    check_plan(plan)
    return ChildCall(name=plan.name, kind=WaitKind.CHILDREN, plan=plan, inputs=inputs, **options)


def first_call(calls: Sequence[ChildCall], name: str) -> ChildCall:
    """A call that waits for the first of the children of other calls that ends well.

    `calls` are those that wait for one of them. Raises PlanError for none, and for too many.
    """
    if not 0 < len(calls) <= MOST_RIVALS:
        raise PlanError(
            f"run.first waits for one of 1 to {MOST_RIVALS} children, not of {len(calls)}: give it "
            "a list of what run.child has returned"
        )
    check_name(name)
    found = [call.children for call in calls if call.children is not None]
    numbers = tuple(dict.fromkeys(children.first for children in found))
    return ChildCall(
        name=name,
        kind=WaitKind.CHILDREN,
        plan=calls[0].plan,
        inputs=[call.started_by for call in calls],
        children=Children(
            plan=calls[0].plan.name, first=numbers[0], count=len(numbers), rivals=numbers
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrenLook:
    """The children of a call, as they are while the row of their parent is locked."""

    started: int
    unfinished: int
    failed: int | None
    """The number of one that has failed, or was cancelled."""
    won: int | None = None
    """The number of the one that has ended well first, if only that is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrenTurn:
    """What follows from a look."""

    start: range
    """The numbers of those that are to be started now."""
    left: int
    """The parent waits until at most so many are unfinished."""
    again: bool = False
    """Further ones can be started at once, in another statement."""
    done: bool = False
    """All have ended, and no further one will be started."""
    failed: int | None = None
    """The number of the one by whose failure the others are cancelled."""
    failures: int = 0
    """How many have failed, of a call that collects failures and is done."""
    won: int | None = None
    """The number of the one that has ended well first: the others are cancelled."""
    changed: bool = False
    """The call has other inputs than it had begun with: none was started."""


def turn_of_rivals(look: ChildrenLook) -> ChildrenTurn:
    """What is to be done where the first child that ends well ends the call.

    The parent is called for each that ends otherwise. It goes on when all have ended, so that none
    has an effect after the function was told.
    """
    left = 0 if look.won is not None else max(0, look.unfinished - 1)
    return ChildrenTurn(start=range(0), left=left, done=not look.unfinished, won=look.won)


def next_turn(children: Children, look: ChildrenLook) -> ChildrenTurn:
    """What is to be done: places that have become free are filled a quarter at a time at least.

    So a parent with many places is not called for each child that ends.
    """
    if look.failed is not None and not children.collects:
        none = range(0)
        return ChildrenTurn(start=none, left=0, done=not look.unfinished, failed=look.failed)
    room = children.count - look.started
    if children.at_once is not None:
        room = min(room, children.at_once - look.unfinished)
    begin = children.first + look.started
    start = range(begin, begin + max(0, min(room, PAGE_CHILDREN)))
    left = 0
    if children.at_once is not None and look.started + len(start) < children.count:
        left = children.at_once - max(1, children.at_once // 4)
    return ChildrenTurn(
        start=start,
        left=left,
        again=room > len(start),
        done=look.started == children.count and not look.unfinished,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """A child that has ended."""

    number: int
    run_id: str
    result: Any
    error: dict[str, Any] | None

    @property
    def failure(self) -> dict[str, Any]:
        """Its error, as the event of its parent has it."""
        error = self.error or {}
        return {
            "type": str(error.get("type")),
            "message": str(error.get("message"))[:1000],
            "run_id": self.run_id,
        }


NewRuns = Callable[[range], Sequence[NewRun] | None]
"""The runs of the children with these numbers; None if their inputs are not those of before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tends:
    """The children of a call, while their parent waits."""

    children: Children | None
    """None: all that are attached, which are cancelled."""
    runs: NewRuns


ReadEnds = Callable[[int, int], Sequence[ChildEnd]]
"""Reads the children with numbers from the first to the last that are stored and have ended."""


def removed(number: int) -> dict[str, Any]:
    """The failure of a child that was removed, as the event of its parent has it."""
    return {"type": "RunNotFound", "message": f"child {number} was removed", "run_id": ""}


def failure_of(facts: dict[str, Any]) -> ChildFailed:
    """The error of a child, of the facts in the journal of its parent."""
    return ChildFailed(str(facts.get("run_id")), str(facts.get("type")), str(facts.get("message")))


class ChildResults(Sequence[Any]):
    """The results of the children of a call, in the order of their inputs. Read in pages.

    Of a child that has failed it is a ChildFailed, if the call collects failures.
    """

    def __init__(self, children: Children, read: ReadEnds) -> None:
        self._children = children
        self._read = read
        self._page: dict[int, ChildEnd] = {}

    def __len__(self) -> int:
        return self._children.count

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        numbers = range(self._children.first, self._children.last + 1)
        if isinstance(place, slice):
            return [self._result(number) for number in numbers[place]]
        return self._result(numbers[place])

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._children.first, self._children.last + 1):
            yield self._result(number)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, list | ChildResults):
            return list(self) == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment] # as of a list

    def __repr__(self) -> str:
        return f"<results of {len(self)} runs of plan {self._children.plan}>"

    def _result(self, number: int) -> Any:
        if number not in self._page:
            last = min(self._children.last, number + PAGE_RESULTS - 1)
            self._page = {end.number: end for end in self._read(number, last)}
        found = self._page.get(number)
        failed = None
        if found is None:
            failed = failure_of(removed(number))
        elif found.error is not None:
            failed = failure_of(found.failure)
        if failed is None and found is not None:
            return found.result
        if self._children.collects:
            return failed
        assert failed is not None  # noqa: S101 - there is a result or a failure
        raise failed


def with_results(results: Mapping[str, Any], read: ReadEnds) -> dict[str, Any]:
    """Results of a run by name, with those of children in place of the children of a map."""
    return {
        name: ChildResults(each, read) if isinstance(each, Children) else each
        for name, each in results.items()
    }


def has_reads(results: Mapping[str, Any]) -> bool:
    """Whether a look at one of these may need Postgres."""
    return any(isinstance(each, ChildResults) for each in results.values())


def without_reads(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, with those of children read: to look at one later needs no Postgres."""
    return {
        name: list(each) if isinstance(each, ChildResults) else each
        for name, each in results.items()
    }


def plain(value: Any) -> Any:
    """The value with lists in place of the results of children, also within lists and objects."""
    match value:
        case ChildResults():
            return list(value)
        case dict() if type(value) is dict:
            return {name: plain(each) for name, each in value.items()}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(plain, value))
    return value


def _page_size(count: int) -> int:
    """Inputs with one digest, of a call with so many of them."""
    return max(PAGE_DIGEST, -(-count // PAGE_DIGEST))


def _event(type: EventType, occurrence: str, data: dict[str, Any]) -> NewEvent:
    """Its data was checked before, or is ours."""
    text = encode(data, where=f"children {occurrence}", limit=2**30)
    return NewEvent(type=type, step=occurrence, data=text)
