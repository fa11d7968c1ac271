"""Answers the calls of a plan's function from the history of its run, as long as there is one.

Only a call that the history does not answer is for the execution. What the function has passed
over, or asked for with other arguments, is a mismatch: the run waits for a worker with that plan.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from beatless.orchestrator.arguments import as_json, digest, digest_of_wait
from beatless.orchestrator.branches import BRANCH, Branch
from beatless.orchestrator.child_calls import ChildCall, ChildEnd, Children, ReadEnds, failure_of
from beatless.orchestrator.errors import BadPayload, ChildFailed, StepFailed
from beatless.orchestrator.failure import describe, line_of, text_of
from beatless.orchestrator.forms import Form
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import History, StoredCall, result_of
from beatless.orchestrator.limit import bound_limits
from beatless.orchestrator.open_waits import Approval, Received, Signal
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Step, not_a_step, step_of
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP, Progress
from beatless.orchestrator.waits import Wait, WaitKind

CALL_ID = re.compile(r"(?!\d+\Z)[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""Not only digits: those count the occurrences without an id."""

ATOMS = frozenset({str, int, float, bool, type(None)})
"""The types of values in JSON that hold no others."""

DETAIL_LIMIT = 200
"""Characters of an exception's text that a mismatch tells."""


class PlanLeft(BaseException):
    """Leaves the function of a plan, whose run leaves this worker. Let it pass through."""


@dataclass(slots=True, kw_only=True)
class Call(Progress):
    """The step or wait at which the function is, as the place of its run."""

    named: str
    arguments: str | None
    given: dict[str, Any] | None = None
    """The arguments as JSON, for the step that undoes this one."""
    due_ms: float = 0.0
    """When its next attempt is due, of a step that was begun beside others."""
    beside: bool = False
    """It is executed alone, while other calls of the run are in hand."""

    @property
    def occurrence(self) -> str:
        """As the function has named it."""
        return self.named


@dataclass(slots=True, kw_only=True)
class Several(Progress):
    """The steps and waits at which the branches of the function are, as the place of its run."""

    calls: Sequence[Call]
    """In the order in which they were asked for; the `step` is that of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The function does not do what the journal says: another version, or not repeatable."""

    step: str
    """The stored occurrence that it has passed over, or changed."""
    reason: str
    """`unknown_step` or `changed_call`."""
    message: str
    """The difference, as a log line has it."""
    advice: str
    """What lets the run go on."""
    instead: str = ""
    """The occurrence that it asks for there, or its exception with the line."""
    detail: str = ""
    """The text of that exception, which is not logged."""

    @property
    def kind(self) -> tuple[str, ...]:
        """The same for runs that differ by their occurrences alone."""
        return self.reason, step_of(self.step), step_of(self.instead)


def departure(plan: FunctionPlan, stored_version: str, history: History) -> Mismatch | None:
    """The mismatch of a version of the plan that is lower than one that executed the run."""
    needed = max(history.version, plan.started_with(stored_version))
    if needed <= plan.number:
        return None
    return Mismatch(
        step="",
        reason=UNKNOWN_STEP,
        message=(
            f"the run was executed by version {needed} of plan {plan.name}, and this is version "
            f"{plan.number}"
        ),
        advice=f"deploy version {needed} of plan {plan.name}, or a higher one",
    )


def limited_beside(plan: str, named: str) -> PlanError:
    """The error of a step with limits that is asked for while other calls are in hand."""
    return PlanError(
        f"plan {plan} asks for step {named}, which has limits, in a branch or beside one: a run "
        "that waits for a slot leaves its worker, with all of its steps; ask for it alone, or "
        "start children whose plan has the limits (run.map)"
    )


def refused_input(error: BadPayload) -> Mismatch:
    """The mismatch of a stored input that the plan does not take."""
    return Mismatch(
        step="",
        reason=CHANGED_CALL,
        message=str(error),
        advice="let the type of input= take what is stored: give new members a default",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to a call."""

    result: Any = None
    failure: StepFailed | ChildFailed | None = None
    seq: int = 0
    """Of the event that has it, if it was in the history: the function is told in their order."""

    def give(self) -> Any:
        """The result. Raises StepFailed and ChildFailed."""
        if self.failure is not None:
            raise self.failure
        return self.result


@dataclass(frozen=True, slots=True, eq=False)
class Again:
    """The function begins again, with this input."""

    input: Any


@dataclass(slots=True, kw_only=True)
class Replay:
    """The calls of a function so far, beside its history."""

    plan: FunctionPlan
    history: History
    read_ends: ReadEnds
    """Reads the children of the run that have ended."""
    unread: BaseException | None = None
    """The error of a read, for which the function is left."""
    results: dict[str, Any] = field(default_factory=dict)
    """Those of all finished steps, by occurrence and by name, for the bodies of steps."""
    drawn: list[tuple[str, Any]] = field(default_factory=list)
    """The values that are not stored yet, with their kinds."""
    branch: Branch = field(init=False)
    """The function itself."""
    ended_children: set[int] = field(default_factory=set)
    """The numbers of those whose end the function knows of by a call for the first of several."""
    last_name: str = ""
    """The occurrence that the last call was given."""
    _again: Again | None = None
    _ahead: dict[str, None] = field(default_factory=dict)
    """The stored occurrences that the function has not asked for yet, in order."""
    _left_out: dict[str, StoredCall] = field(default_factory=dict)
    """Those without an end that `removed=` names, and that it has not asked for."""
    _waits: set[str] = field(default_factory=set)
    _steps: dict[str, tuple[Step, inspect.Signature]] = field(default_factory=dict)
    _given: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.branch = Branch(visits=Counter(self.history.visits))
        self._ahead = dict.fromkeys(
            name for name in self.history.calls if step_of(name) not in self.plan.removed
        )
        self._left_out = {
            name: call
            for name, call in self.history.calls.items()
            if step_of(name) in self.plan.removed and not (call.ended or call.left_out)
        }

    def left_out(self) -> list[StoredCall]:
        """The calls that the function goes on without, of which the journal does not say so yet."""
        left, self._left_out = list(self._left_out.values()), {}
        for call in left:
            call.left_out = True
        return left

    @property
    def visits(self) -> Counter[str]:
        """How often each name was called outside of branches, in earlier generations too."""
        return self.branch.visits

    def step(
        self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any], id: str | None
    ) -> Outcome | Call | Mismatch:
        """The answer of the history to a call. Raises PlanError, TypeError and BadPayload."""
        self._check(step, args, kwargs)
        name = self._named(step.name, id)
        if step.limits and BRANCH.get(self.branch) is not self.branch:
            raise limited_beside(self.plan.name, name)
        arguments = digest(step.name, args, kwargs) if id is None else None
        given = None if step.undo is None else as_json(step.name, args, kwargs)
        found = self._answer(
            step.name, name, arguments, lambda: _with_arguments(step, args, kwargs)
        )
        if isinstance(found, Call):
            found.given = given
        return found

    def wait(self, wait: Wait, id: str | None) -> Outcome | Call | Mismatch:
        """The same of a wait. Raises PlanError."""
        if wait.name in self._steps:
            raise self._ambiguous(wait.name)
        self._waits.add(wait.name)
        name = self._named(wait.name, id)
        arguments = digest_of_wait(wait.kind, wait.names) if id is None else None
        found = self._answer(wait.name, name, arguments, lambda: wait)
        if wait.form is None or not isinstance(found, Outcome):
            return found
        try:
            return self._as_form(wait.form, name, wait.name, found)
        except BadPayload as error:
            return Mismatch(
                step=name,
                reason=CHANGED_CALL,
                message=f"plan {self.plan.name} cannot take the stored {name}: {error}",
                advice="let the type of form= take what is stored: give new members a default",
            )

    def children(self, call: ChildCall, id: str | None) -> Outcome | Call | Mismatch:
        """The same of a call that starts children: a `Children` once they were started or ended.

        Raises PlanError, and BadPayload for inputs that are not JSON.
        """
        if call.name in self._steps:
            raise self._ambiguous(call.name)
        self._waits.add(call.name)
        name = self._named(call.name, id)
        stored = self.history.calls.get(name)
        is_open = stored is not None and not stored.ended and call.is_open(stored.children)
        arguments = call.digest() if id is None and not is_open else None
        return self._answer(call.name, name, arguments, lambda: call)

    def result(self, call: ChildCall, occurrence: str) -> Outcome | Call | Mismatch:
        """The same of the wait for the child that the call of this occurrence has started."""
        return self._answer(call.name, result_of(occurrence), None, lambda: call)

    def ends(self, first: int, last: int) -> Sequence[ChildEnd]:
        """Read children that have ended. Raises PlanLeft if they cannot be read now."""
        try:
            return self.read_ends(first, last)
        except BaseException as error:
            self.unread = error
            raise PlanLeft from error

    def ended(self, call: Call, children: Children) -> Outcome:
        """The children of a call were started, or have ended."""
        stored = self.history.call(call.named, call.begun)
        stored.ended, stored.children = True, children
        stored.arguments = call.arguments or stored.arguments
        return self._outcome(step_of(call.named), stored)

    def value(self, kind: str, draw: Callable[[], Any]) -> Any:
        """The stored value, or one that is drawn now and stored with the next boundary."""
        place = self._given[kind]
        self._given[kind] += 1
        stored = self.history.values.setdefault(kind, [])
        if place == len(stored):
            stored.append(draw())
            self.drawn.append((kind, stored[place]))
        return stored[place]

    def again(self, input: Any) -> Again:
        """Note that the function begins again, with this input. Raises BadPayload."""
        self._again = Again(self.plan.input.dump(input))
        return self._again

    def check_end(self, value: Any) -> None:
        """Raises PlanError for a function that goes on after it has begun again."""
        if self._again is not None and value is not self._again:
            raise PlanError(
                f"plan {self.plan.name} calls run.again(…) and goes on: write return run.again(…)"
            )

    def end(self, error: BaseException | None = None) -> Mismatch | None:
        """The stored call that a function has passed over which ends now; None if there is none.

        Also of one that has raised: before it was where the run is, by code that may be mended.
        """
        return self.passed_over(error=error)

    def finished(self, call: Call, result: Any) -> Outcome:
        """The step of a call has this result."""
        stored = self.history.call(call.named, call.begun)
        stored.ended, stored.result, stored.arguments = True, result, call.arguments
        return self._outcome(step_of(call.named), stored)

    def waited(self, call: Call, signal: Received | None) -> Outcome:
        """The wait of a call was ended by this signal, or by its time. Raises BadPayload."""
        self.history.inbox.end(call.key, None if signal is None else signal.seq)
        outcome = self.finished(call, signal)
        if not isinstance(call.step, Wait) or call.step.form is None:
            return outcome
        return self._as_form(call.step.form, call.named, call.step.name, outcome)

    def _as_form(self, form: Form, named: str, base: str, outcome: Outcome) -> Outcome:
        """The outcome with an approval of the type of its form. Raises BadPayload."""
        if not isinstance(outcome.result, Approval):
            return outcome
        shown = outcome.result.as_form(form)
        self.results[named] = self.results[base] = shown
        return replace(outcome, result=shown)

    def failed(self, call: Call, error: dict[str, Any]) -> Outcome:
        """The step of a call has failed for good."""
        stored = self.history.call(call.named, call.begun)
        stored.ended, stored.error, stored.arguments = True, error, call.arguments
        return self._outcome(step_of(call.named), stored)

    def _check(self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = self.plan.name
        if not isinstance(step, Step):
            raise PlanError(f"plan {name}: run.step({step!r:.200}): it {not_a_step(step)}")
        if self.plan.on_cancel is not None and step.name == self.plan.on_cancel.name:
            raise PlanError(
                f"plan {name}: step {step.name} is its on_cancel step and cannot be asked for"
            )
        if step.name in self._waits:
            raise self._ambiguous(step.name)
        if step.undo is not None and self.plan.undo_steps.get(step.undo.name) is not step.undo:
            raise PlanError(
                f"plan {name} asks for step {step.name} in a way that its code does not show, and "
                f"nobody would find its undo {step.undo.name} after a crash: name the step in the "
                "function, or in a function of its module that it calls"
            )
        if step.name not in self._steps:
            self._steps[step.name] = step, inspect.signature(step.function)
        known, signature = self._steps[step.name]
        if known.function != step.function:
            raise PlanError(
                f"plan {name} asks for two steps called {step.name}: give one another name, as in "
                'step(name="…")(function)'
            )
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"step {step.name}: {error}; run.step gives it the context") from error

    def _outcome(self, name: str, stored: StoredCall) -> Outcome:
        if stored.children is not None:
            error = stored.children.error
            self.ended_children.update(stored.children.rivals)
            return Outcome(
                result=stored.children,
                failure=failure_of(error) if error else None,
                seq=stored.ended_seq,
            )
        if stored.error is None:
            self.results[stored.occurrence] = self.results[name] = stored.result
            # A copy: what the function does to it is seen by no step, as when it is called again.
            return Outcome(result=_copy(stored.result), seq=stored.ended_seq)
        error = stored.error
        failure = StepFailed(stored.occurrence, str(error.get("type")), str(error.get("message")))
        return Outcome(failure=failure, seq=stored.ended_seq)

    def _ambiguous(self, name: str) -> PlanError:
        return PlanError(
            f"plan {self.plan.name} has a step, and a wait or children, called {name}: "
            "give one of them another name"
        )

    def _named(self, name: str, id: str | None) -> str:
        """The occurrence of a call. Raises PlanError."""
        self.last_name = self._name(name, id)
        return self.last_name

    def _name(self, name: str, id: str | None) -> str:
        if id is None:
            return BRANCH.get(self.branch).occurrence(name, self.history.generation)
        if not isinstance(id, str) or not CALL_ID.fullmatch(id):
            raise PlanError(
                f"plan {self.plan.name}: the id {id!r:.200} of {name} must be a str of letters, "
                "digits, _ . and -, up to 100, and not of digits alone, since "
                f'{name}#7 is the seventh call of {name}: give it a word, as in id="line-7"'
            )
        generation = self.history.generation
        return f"{name}#{id}" if generation == 1 else f"{name}#{id}#{generation}"

    def _answer(
        self, base: str, name: str, arguments: str | None, element: Callable[[], Step | Wait]
    ) -> Outcome | Call | Mismatch:
        """The answer to a call of the occurrence `name`; `base` is the name of its element."""
        self._ahead.pop(name, None)
        self._left_out.pop(name, None)
        stored = self.history.calls.get(name)
        if stored is not None:
            if None not in (arguments, stored.arguments) and arguments != stored.arguments:
                return self.changed(name)
            if stored.ended:
                return self._outcome(base, stored)
        call = Call(
            step=element(),
            named=name,
            arguments=arguments,
            results=self.results,
            inbox=self.history.inbox,
        )
        if stored is not None:
            call.begun = stored.key
            call.starts, call.failures = stored.starts, stored.failures
            call.lost, call.refused = stored.lost, stored.refused
            call.deaths, call.due_ms = stored.deaths, stored.due_ms
            call.ran_out, call.in_flight = stored.ran_out, stored.in_flight
        return call

    def passed_over(
        self, *, asked: str | None = None, error: BaseException | None = None
    ) -> Mismatch | None:
        """The first stored call that is still ahead; the function asks for another, or ends.

        Once it has been told all that is stored.
        """
        if not self._ahead:  # first: to look into a dict that was emptied takes as long as it was
            return None
        name = next(iter(self._ahead))
        plan, stored, detail = self.plan.name, step_of(name), ""
        gone = f'if it asks for {stored} no more: removed=["{stored}"] in @plan(…)'
        if error is not None:
            instead = f"{describe(error, '')['type']} ({line_of(error)})"
            message = f"the function of plan {plan} raised {instead} before the stored {name}"
            advice, detail = "mend the function", text_of(error)[:DETAIL_LIMIT]
        elif asked is None:
            instead, message, advice = "", f"plan {plan} ends before the stored {name}", gone
        else:
            instead, message = asked, f"plan {plan} asks for {asked} where {name} is stored"
            advice = (
                f"if {step_of(asked)} is new: `if run.version >= N`, with version=N in @plan(…); "
                f'if it is another name: renamed={{"{stored}": "{step_of(asked)}"}}; {gone}'
            )
            if self._is_approval(name):
                advice = (
                    f"if the title of the approval was reworded, which was its name as well: keep "
                    f'this, as in run.approve(…, name="{stored}"); {advice}'
                )
        return Mismatch(
            step=name,
            reason=UNKNOWN_STEP,
            message=message,
            advice=advice,
            instead=instead,
            detail=detail,
        )

    def _is_approval(self, occurrence: str) -> bool:
        """Whether the stored call is an approval, open or decided."""
        wait = self.history.inbox.waits.get(occurrence)
        if wait is not None:
            return wait.kind is WaitKind.APPROVAL
        return isinstance(self.history.calls[occurrence].result, Approval)

    def changed(self, name: str) -> Mismatch:
        """The mismatch of a call with other arguments, signals or inputs than are stored."""
        return Mismatch(
            step=name,
            reason=CHANGED_CALL,
            message=(
                f"plan {self.plan.name} asks for {name} with other arguments, signals or "
                "inputs than are stored"
            ),
            advice=(
                "they must be the same each time (run.now(), not datetime.now()); if they were "
                "changed on purpose: those of before `if run.version < N`, with version=N in "
                "@plan(…); of calls with id= none are compared"
            ),
        )


def _copy(value: Any) -> Any:
    """A deep copy of a stored result. `copy.deepcopy` takes ten times as long."""
    kind = type(value)
    if kind is dict:
        return {name: each if type(each) in ATOMS else _copy(each) for name, each in value.items()}
    if kind is list:
        return [each if type(each) in ATOMS else _copy(each) for each in value]
    return replace(value, data=_copy(value.data)) if kind is Signal else value


def _with_arguments(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Step:
    if not args and not kwargs:
        return step
    body = step.function
    return replace(
        step,
        function=lambda context: body(context, *args, **kwargs),
        limits=bound_limits(step.limits, args, kwargs) if step.limits else (),
    )
