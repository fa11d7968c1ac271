"""The declaration of a limit, and its key for one run. No I/O."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import storable
from beatless.orchestrator.failure import describe
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.step_body import unfinished

LIMIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")

MAX_AT_ONCE = 10_000
"""Slots of one key at most."""

MAX_STARTS = 1_000_000
"""Starts of one key in the period of a rate at most."""

RATE = re.compile(r"([0-9]{1,7})/(s|min|h|day)")

PERIODS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86_400.0}
"""Seconds of the period of a rate, by its name."""

MAX_KEY_CHARS = 256

MAX_LIMITS = 8
"""Limits of one plan: each is taken by every claim of its runs."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How many runs with the same key may have a lease at once, or begin in a time, in the fleet.

    `key` is called with the input of each run when it is started, and gives a text or a whole
    number; a text is the key of all runs, and without one all runs share the limit. Limits of one
    name are one limit, whatever plan has them.

    `at_once` is a number of runs, 1 to 10,000. `rate` is how many begin in a second, minute, hour
    or day, as "100/min": a token bucket, which holds as many as that and fills evenly; a run takes
    one token at its first claim. A limit has one of the two. `beatless limits set` changes it while
    runs wait.

    A run that waits holds no slot, and takes one again when it goes on. With `hold="run"` it keeps
    its slot from its first claim until it has ended, also while it waits, and lends it to its
    children: those with the same limit and key take none of their own.

    Raises PlanError, naming the limit, for a bad name, key, number, rate or hold.

    >>> from beatless import Limit, Plan, step
    >>> @step
    ... def charge(ctx): ...
    >>> stripe = Limit("stripe", key=lambda order: order["account"], at_once=3)
    >>> Plan("charge", [charge], limits=[stripe]).limits
    (Limit('stripe', at_once=3),)
    >>> Limit("llm", rate="100/min")
    Limit('llm', rate='100/min')
    >>> Limit("gpu", at_once=2, hold="run")
    Limit('gpu', at_once=2, hold='run')
    """

    name: str
    at_once: int | None
    rate: str | None
    key: Callable[[Any], str | int] | str | None
    hold: Literal["run"] | None

    def __init__(
        self,
        name: str,
        *,
        at_once: int | None = None,
        rate: str | None = None,
        key: Callable[[Any], str | int] | str | None = None,
        hold: Literal["run"] | None = None,
    ) -> None:
        if not isinstance(name, str) or not LIMIT_NAME.fullmatch(name):
            raise PlanError(f"limit name {name!r:.200} must match {LIMIT_NAME.pattern}")
        if (at_once is None) == (rate is None):
            raise PlanError(
                f'limit {name} needs at_once or rate, as in Limit("{name}", at_once=10) or '
                f'Limit("{name}", rate="100/min"); for both, make two limits'
            )
        if at_once is not None and (problem := problem_with_at_once(at_once)):
            raise PlanError(f"limit {name}: at_once {problem}")
        if rate is not None and (problem := problem_with_rate(rate)):
            raise PlanError(f"limit {name}: rate {problem}")
        if key is not None and not callable(key) and not _is_key(key):
            raise PlanError(
                f"limit {name}: key is {key!r:.200}; give a function of the run's input, as in "
                f'key=lambda order: order["account"], or a text'
            )
        if callable(key) and (given := unfinished(key)):
            raise PlanError(f"limit {name}: key is a function that gives {given}; return a text")
        if hold not in (None, "run"):
            raise PlanError(
                f'limit {name}: hold is {hold!r:.200}; give hold="run", by which a run keeps its '
                "slot until it has ended, or leave it out"
            )
        if hold is not None and at_once is None:
            raise PlanError(
                f"limit {name}: a rate has no slots to hold; leave hold out, or give at_once"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "at_once", at_once)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "hold", hold)

    def __repr__(self) -> str:
        how = f"rate={self.rate!r}" if self.rate else f"at_once={self.at_once}"
        held = f", hold={self.hold!r}" if self.hold else ""
        return f"Limit({self.name!r}, {how}{held})"

    def key_of(self, *given: Any, **named: Any) -> str:
        """The key of a run with this input, as JSON, or of a call of a step with these arguments.

        Raises BadPayload, naming the limit.
        """
        if not callable(self.key):
            return self.key or ""
        try:
            found = self.key(*given, **named)
        except Exception as error:
            told = describe(error, "")
            raise BadPayload(
                f"the key of limit {self.name}",
                f"cannot be computed of this input: {told['type']}: {told['message']}",
            ) from error
        if not _is_key(found):
            raise BadPayload(
                f"the key of limit {self.name}",
                f"is {found!r:.200}, which is no text of at most {MAX_KEY_CHARS} characters, and "
                "no whole number",
            )
        return str(found)


class Rule(Protocol):
    """What a limit says, as it is declared or as it is now."""

    @property
    def at_once(self) -> int | None: ...
    @property
    def rate(self) -> str | None: ...
    @property
    def hold(self) -> str | None: ...


def rule_of(limit: Rule) -> str:
    """The rule of a limit, for people.

    >>> rule_of(Limit("gpu", at_once=2, hold="run")), rule_of(Limit("llm", rate="100/min"))
    ('2 at once, held to the end', '100/min')
    """
    if limit.rate is not None:
        return limit.rate
    held = ", held to the end" if limit.hold else ""
    return f"{limit.at_once} at once{held}"


def problem_with_at_once(given: Any) -> str:
    """The problem with a number of runs, to follow its name; "" if there is none."""
    if type(given) is int and 1 <= given <= MAX_AT_ONCE:
        return ""
    return f"is {given!r:.200}; give a number of runs, 1 to {MAX_AT_ONCE:,}"


def problem_with_rate(given: Any) -> str:
    """The problem with a rate, to follow its name; "" if there is none."""
    match = RATE.fullmatch(given) if isinstance(given, str) else None
    if match and 1 <= int(match[1]) <= MAX_STARTS:
        return ""
    return f'is {given!r:.200}; give starts in a second, minute, hour or day, as in rate="100/min"'


def starts_of(rate: str) -> tuple[int, float]:
    """How many runs a checked rate lets begin, in how many seconds.

    >>> starts_of("100/min")
    (100, 60.0)
    """
    starts, _, period = rate.partition("/")
    return int(starts), PERIODS_S[period]


def rate_of(starts: int, period_s: float) -> str:
    """The rate as it is written."""
    return f"{starts}/{next(name for name, each in PERIODS_S.items() if each == period_s)}"


def _is_key(found: object) -> bool:
    if isinstance(found, str):
        return len(found) <= MAX_KEY_CHARS and storable(found)
    return type(found) is int and abs(found) < 2**63


def checked_limits(where: str, limits: Iterable[Limit] | None) -> tuple[Limit, ...]:
    """The limits of a plan or step, which is named by `where`. Raises PlanError."""
    found: Any = () if limits is None else limits
    if isinstance(found, str | Limit) or not isinstance(found, Iterable):
        raise PlanError(
            f'{where}: limits is {found!r:.200}; give a list: limits=[Limit("llm", at_once=10)]'
        )
    given = tuple(found)
    for each in given:
        if not isinstance(each, Limit):
            raise PlanError(f'{where}: {each!r:.200} is no limit; give Limit("llm", at_once=10)')
    if len({each.name for each in given}) < len(given):
        raise PlanError(f"{where} has two limits of one name: give one another name")
    if len(given) > MAX_LIMITS:
        raise PlanError(f"{where} has {len(given)} limits; {MAX_LIMITS} at most")
    return given


def check_kinds(limits: Iterable[tuple[str, Limit]]) -> None:
    """Check that limits of one name are of one kind; given with the names of their plans.

    Raises PlanError: they are one limit, of which runs have a slot or a token.
    """
    known: dict[str, tuple[str, Limit]] = {}
    for plan, limit in limits:
        other, first = known.setdefault(limit.name, (plan, limit))
        if (first.rate is None) != (limit.rate is None):
            raise PlanError(
                f"limit {limit.name} has {_kind(first)} in plan {other}, and {_kind(limit)} in "
                f"plan {plan}: limits of one name are one limit; give one of them another name"
            )


def _kind(limit: Limit) -> str:
    return "at_once" if limit.rate is None else "a rate"


def limits_of_step(step: str, limits: Iterable[Limit] | None) -> tuple[Limit, ...]:
    """The limits of a step. Raises PlanError, naming it."""
    found = checked_limits(f"step {step}", limits)
    for each in found:
        if each.hold is not None:
            raise PlanError(
                f"step {step}: limit {each.name} has hold={each.hold!r}, and a step keeps no slot "
                "when it has ended: give the limit to the plan, or leave hold out"
            )
    return found


def check_unlimited(where: str, limits: Sequence[Limit]) -> None:
    """Raises PlanError for limits of a step that is called when its run is ending."""
    if limits:
        raise PlanError(
            f"{where} has limits, and the end of a run waits for no slot: leave them out"
        )


def bound_limits(
    limits: Sequence[Limit], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Limit, ...]:
    """The limits of a step with their keys for a call with these arguments. Raises BadPayload."""
    return tuple(
        Limit(each.name, at_once=each.at_once, rate=each.rate, key=each.key_of(*args, **kwargs))
        for each in limits
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimit:
    """A limit of one run, as it is stored with it."""

    id: str
    """The name of the limit, behind that of the namespace unless it is the default one, and the
    run's key: `stripe:acct_7`, `team~stripe:acct_7`."""
    at_once: int | None = None
    hold: str | None = None
    starts: int | None = None
    period_s: float | None = None
    step: str | None = None
    """The occurrence of the step that has it; None: it is the plan's."""

    def to_dict(self) -> dict[str, Any]:
        """The members that it has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def limits_of(
    limits: Sequence[Limit], input: Any, *, prefix: str, step: str | None = None
) -> tuple[RunLimit, ...]:
    """The limits of a run with this input, in the order in which they are taken.

    Or those of its `step`. `prefix` is that of the ids of its namespace. Raises BadPayload for an
    input without a key.
    """
    if not limits:
        return ()
    found = [_run_limit(each, f"{prefix}{each.name}:{each.key_of(input)}", step) for each in limits]
    return tuple(sorted(found, key=lambda each: each.id.encode()))


def _run_limit(limit: Limit, id: str, step: str | None) -> RunLimit:
    if limit.rate is None:
        return RunLimit(id=id, at_once=limit.at_once, hold=limit.hold, step=step)
    starts, period_s = starts_of(limit.rate)
    return RunLimit(id=id, starts=starts, period_s=period_s, step=step)
