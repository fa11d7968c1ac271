"""Elements of a plan at which its runs wait: for a signal, a person, or a time. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from beatless.orchestrator.events import storable
from beatless.orchestrator.forms import Form, form_of
from beatless.orchestrator.open_enum import OpenEnum
from beatless.orchestrator.outcomes import STEP_NAME, Goto, PlanError
from beatless.outbox.times import MOST_S, problem_with_seconds


class WaitKind(OpenEnum):
    """The fact that ends a wait, beside its time-out.

    A kind that a newer version has written is shown, and its run left to that version.
    """

    SIGNAL = "signal"
    SLEEP = "sleep"
    CHILDREN = "children"
    APPROVAL = "approval"


TITLE_CHARACTERS = 200
"""Of the title of an approval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """An element of a plan at which a run holds no worker until a signal, or a time, has come."""

    name: str
    kind: WaitKind
    names: Sequence[str] = ()
    """The signals that end it; a sleep has none."""
    seconds: float | None = None
    """From its start to its time-out, or to the end of the sleep; None if it has no end."""
    on_timeout: Goto | None = None
    """The element that follows a time-out; None if it is the next one of the list."""
    title: str | None = None
    """The question of an approval."""
    form: Form | None = None
    """The type of the decision of an approval."""

    @property
    def route(self) -> Goto | None:
        """Where the run goes on instead of the next element of the list."""
        return self.on_timeout


def wait(
    *names: str,
    timeout: float | timedelta | None = None,
    on_timeout: Goto | None = None,
    name: str | None = None,
) -> Wait:
    """An element of a plan that waits for the oldest unconsumed signal of one of these names.

    A later step finds it under the name of the wait, as a `Signal`; or None after a time-out, which
    comes `timeout` (seconds or a timedelta) after the wait has begun. `on_timeout` says where the
    run goes on then. The wait is called like its first signal unless it is given a `name`.

    Raises PlanError for a bad name, a bad timeout, and an `on_timeout` without a timeout.

    >>> from beatless import Goto, days, wait
    >>> paid = wait("paid", "refused", timeout=days(3), on_timeout=Goto("release"))
    >>> paid.name, paid.seconds
    ('paid', 259200.0)
    """
    if not names:
        raise PlanError('a wait needs the name of a signal: wait("paid")')
    label = names[0] if name is None else name
    for each in (label, *names):
        check_name(each)
    if len(set(names)) < len(names):
        raise PlanError(f"wait {label} names a signal twice: {', '.join(names)}")
    seconds = _seconds_until(f"wait {label}", timeout, on_timeout)
    return Wait(
        name=label, kind=WaitKind.SIGNAL, names=names, seconds=seconds, on_timeout=on_timeout
    )


def approve(
    title: str,
    *,
    form: Any = None,
    timeout: float | timedelta | None = None,
    on_timeout: Goto | None = None,
    name: str | None = None,
) -> Wait:
    """An element of a plan that waits until a person has decided: `client.approve_run`.

    `title` is the question that the person is asked. `form` is the type of the decision: a
    dataclass, a TypedDict or a model of pydantic, by which it is checked when it is sent. Without
    one it is a `Verdict`: `approved` and a `comment`. A later step finds an `Approval` under the
    name of the wait, with the decision as its `data`; or None after a time-out, which is as that of
    `wait`. The name is made of the title unless it is given: `refund` of "refund?".

    Raises PlanError for a bad title, name, form or timeout.

    >>> from beatless import Goto, approve, days
    >>> asked = approve("Refund the order?", timeout=days(3), on_timeout=Goto("close"))
    >>> asked.name, asked.title
    ('Refund_the_order', 'Refund the order?')
    """
    if not isinstance(title, str) or not title.strip() or len(title) > TITLE_CHARACTERS:
        raise PlanError(
            f"title {title!r:.200} of an approval must be text of 1 to {TITLE_CHARACTERS} "
            'characters: approve("Refund the order?")'
        )
    if not storable(title):
        raise PlanError(f"title {title!r} of an approval has a NUL or half of a surrogate pair")
    label = re.sub(r"[^A-Za-z0-9_]+", "_", title).strip("_") if name is None else name
    if not isinstance(label, str) or not STEP_NAME.fullmatch(label):
        raise PlanError(
            f"name {label!r} of approval {title!r} must match {STEP_NAME.pattern}: give it one, "
            'as in approve("…", name="refund")'
        )
    return Wait(
        name=label,
        kind=WaitKind.APPROVAL,
        seconds=_seconds_until(f"approval {label}", timeout, on_timeout),
        on_timeout=on_timeout,
        title=title,
        form=_form_of_approval(label, form),
    )


def _form_of_approval(label: str, form: Any) -> Form:
    try:
        return form_of(form)
    except PlanError as error:
        raise PlanError(f"approval {label}: {error}") from error


def _seconds_until(
    where: str, timeout: float | timedelta | None, on_timeout: Goto | None
) -> float | None:
    """The seconds of a time-out, and a check of its route. Raises PlanError."""
    seconds = None if timeout is None else seconds_of_wait(f"{where}: timeout", timeout)
    if on_timeout is not None:
        if not isinstance(on_timeout, Goto):
            raise PlanError(
                f'{where}: on_timeout is {on_timeout!r}; give it a Goto: Goto("release")'
            )
        if on_timeout.result is not None:
            raise PlanError(
                f"{where}: on_timeout carries a result; after a time-out the result is None"
            )
        if seconds is None:
            raise PlanError(f"{where} has an on_timeout and no timeout: it would never come")
    return seconds


def sleep(
    *,
    days: float = 0,
    hours: float = 0,
    minutes: float = 0,
    seconds: float = 0,
    name: str = "sleep",
) -> Wait:
    """An element of a plan that lets so much time pass, without a worker.

    Raises PlanError for a bad name, and for anything but more than 0 seconds and at most ten years.

    >>> from beatless import sleep
    >>> sleep(days=14, name="cool_down").seconds
    1209600.0
    """
    try:
        length = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"sleep {name}: {error}; give it numbers: sleep(days=14)") from error
    return sleep_of(length, name)


def sleep_of(length: float | timedelta, name: str) -> Wait:
    """The same of a length in seconds, or a timedelta. Raises PlanError."""
    check_name(name)
    return Wait(
        name=name, kind=WaitKind.SLEEP, seconds=seconds_of_wait(f"sleep {name}: its time", length)
    )


def days(number: float) -> timedelta:
    """A duration.

    >>> from beatless import days
    >>> days(3).total_seconds()
    259200.0
    """
    return timedelta(days=number)


def hours(number: float) -> timedelta:
    """A duration.

    >>> from beatless import hours
    >>> hours(2).total_seconds()
    7200.0
    """
    return timedelta(hours=number)


def minutes(number: float) -> timedelta:
    """A duration.

    >>> from beatless import minutes
    >>> minutes(5).total_seconds()
    300.0
    """
    return timedelta(minutes=number)


def check_name(name: str) -> None:
    """Raises PlanError for a name that no wait can have."""
    if not isinstance(name, str) or not STEP_NAME.fullmatch(name):
        raise PlanError(f"name {name!r} of a wait must match {STEP_NAME.pattern}")


def seconds_of_wait(where: str, given: float | timedelta) -> float:
    """A duration in seconds. Raises PlanError, naming it."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if problem_with_seconds(seconds) or seconds == 0:
        raise PlanError(f"{where} must be more than 0 seconds and at most {MOST_S:.0f}: {given!r}")
    return float(seconds)
