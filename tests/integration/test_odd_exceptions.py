"""Exceptions whose own code raises: whatever is asked of them, the attempt has failed, once."""

import asyncio
import logging
import sys
from functools import partial
from typing import Any

import pytest

from beatless import (
    BadPayload,
    Fatal,
    JsonLines,
    Limit,
    Plan,
    RunContext,
    RunState,
    StepContext,
    StepFailed,
    TextLines,
    Undone,
    child,
    plan,
    step,
)
from beatless.orchestrator.failure import describe
from beatless.testing import Kit


class Document(Exception):
    """Members of a document as attributes, as many API clients have them."""

    def __init__(self, document: Any) -> None:
        super().__init__(document["title"])
        self.document = document

    def __getattr__(self, name: str) -> Any:
        return self.document[name]


class Recursive(Exception):
    """What is left of one like the above when it was made without its __init__."""

    def __getattr__(self, name: str) -> Any:
        return self.document[name]


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class NoText(Exception):
    def __str__(self) -> str:
        return ODD  # type: ignore[return-value]


class Leaves(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Hidden(Exception):
    @property
    def __traceback__(self) -> Any:
        raise ValueError("no traceback")

    __cause__ = __context__ = __suppress_context__ = __notes__ = __class__ = __traceback__


class HiddenRuntimeError(RuntimeError):
    """What asyncio says of an await that it refuses is a RuntimeError too."""

    @property
    def __class__(self) -> Any:
        raise ValueError("no class")

    def __str__(self) -> str:
        raise ValueError("no text")


class Silent(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Unlike(Exception):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


class Odd(str):
    __slots__ = ()

    def __getitem__(self, _key: Any) -> str:
        raise RuntimeError

    def __format__(self, _spec: str) -> str:
        raise RuntimeError

    encode = __str__ = __format__  # type: ignore[assignment]


class OddText(Exception):
    def __str__(self) -> str:
        return Odd("odd text")


class NoName(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError


class Nameless(Exception, metaclass=NoName):
    pass


LONG = type("E" * 1_000_000, (Exception,), {})

ODD = {
    "document": (lambda: Document({"title": "quota exceeded"}), "Document", "quota exceeded"),
    "recursive": (lambda: Recursive("lost"), "Recursive", "lost"),
    "mute": (Mute, "Mute", "<Mute whose text cannot be shown>"),
    "no text": (NoText, "NoText", "<NoText whose text cannot be shown>"),
    "leaves": (Leaves, "Leaves", "<Leaves whose text cannot be shown>"),
    "hidden": (lambda: Hidden("seen"), "Hidden", "seen"),
    "hidden RuntimeError": (
        HiddenRuntimeError,
        "HiddenRuntimeError",
        "<HiddenRuntimeError whose text cannot be shown>",
    ),
    "silent": (lambda: Silent("said"), "Silent", "said"),
    "unlike": (lambda: Unlike("any"), "Unlike", "any"),
    "odd text": (OddText, "OddText", "odd text"),
    "nameless": (lambda: Nameless("who"), "an exception", "who"),
    "group": (
        lambda: ExceptionGroup("two", [Silent("a"), Recursive("b")]),
        "ExceptionGroup",
        "two (2 sub-exceptions)",
    ),
    "fatal": (lambda: Fatal(5), "Fatal", "5"),  # type: ignore[arg-type]
}


def odd_of(name: str) -> BaseException:
    found: BaseException = ODD[name][0]()
    return found


calls: list[str] = []


@step
def body(ctx: StepContext) -> None:
    calls.append(ctx.step)
    raise odd_of(ctx.input)


@step(name="tx", transactional=True)
def in_a_transaction(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("SELECT 1")
    body.function(ctx)


@plan("function")
def function(run: RunContext) -> None:
    raise odd_of(run.input)


@plan("async_function")
async def async_function(run: RunContext) -> None:
    raise odd_of(run.input)


@plan("of_steps")
def of_steps(run: RunContext) -> None:
    run.step(body)


@plan("of_branches")
async def of_branches(run: RunContext) -> None:
    await asyncio.gather(run.step(body), run.step(body))


@plan("passes")
def passes(run: RunContext) -> None:
    try:
        run.step(body)
    except StepFailed as failed:
        raise odd_of(run.input) from failed


@step
def undoes(ctx: StepContext, undone: Undone) -> None:
    raise odd_of(ctx.input)


@step(undo=undoes)
def done(ctx: StepContext) -> None: ...


def inputs(ctx: Any) -> Any:
    raise odd_of(ctx.input)


PLANS = [
    function,
    async_function,
    of_steps,
    of_branches,
    passes,
    Plan("undone", [done, body]),
    Plan("starts", [child("one", function, input=inputs)]),
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    calls.clear()
    return [Plan("p", [body]), Plan("tx", [in_a_transaction]), *PLANS]


@pytest.mark.parametrize("plan", ["p", "tx"])
def test_an_exception_that_cannot_be_asked_has_failed_its_attempt_once(
    beatless: Kit, subtests: pytest.Subtests, plan: str
) -> None:
    runs = {odd: beatless.start_run(plan, odd) for odd in ODD}
    beatless.work_until_idle()
    assert len(calls) == len(ODD)
    for odd, run in runs.items():
        with subtests.test(odd):
            found = beatless.client.get_run(run.run_id)
            assert found.state is RunState.FAILED
            assert found.error is not None
            assert (found.error["type"], found.error["message"]) == ODD[odd][1:]
            assert "in body" in found.error["traceback"]
    beatless.verify()


@pytest.mark.parametrize("plan", [each.name for each in PLANS])
def test_a_run_fails_once_with_what_the_code_of_its_plan_has_raised(
    beatless: Kit, plan: str
) -> None:
    runs = {odd: beatless.start_run(plan, odd).run_id for odd in ODD}
    beatless.work_until_idle()
    claims = set()
    for odd, run_id in runs.items():
        found = beatless.client.get_run(run_id)
        claims.add(found.attempt)
        assert (odd, found.state) == (odd, RunState.FAILED)
        assert found.error is not None
        assert (found.error["type"], found.error["message"]) == ODD[odd][1:]
    assert len(claims) == 1
    beatless.verify()


def test_a_key_that_raises_refuses_its_start() -> None:
    def key(odd: str) -> str:
        raise odd_of(odd)

    limit = Limit("odd", key=key, at_once=1)
    for odd, (_, kind, message) in ODD.items():
        with pytest.raises(BadPayload) as refused:
            limit.key_of(odd)
        assert str(refused.value).endswith(f"{kind}: {message}")


def test_a_description_is_short_and_can_be_stored() -> None:
    told = describe(LONG("x" * 10_000_000), "s")
    assert (told["type"], told["message"]) == ("E" * 200, "x" * 2000)
    assert len(told["traceback"]) == 4000
    assert describe(ValueError("a\0b\ud800"), "s")["message"] == "a\\0b\\ud800"


def test_of_a_deep_traceback_the_innermost_calls_are_told(request: pytest.FixtureRequest) -> None:
    """A body may raise the limit of recursion to a million, each of which would take its time."""
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(5000)

    def deep(calls: int) -> float:
        return deep(calls - 1) if calls else 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        deep(3000)
    error = raised.value
    record = logging.makeLogRecord({"exc_info": (type(error), error, error.__traceback__)})
    lines = [each.format(record) for each in (TextLines(), JsonLines())]
    for told in (describe(error, "s")["traceback"], *lines):
        assert "[Previous line repeated 997 more times]" in told
        assert "ZeroDivisionError" in told


def test_an_error_that_was_raised_by_code_without_a_name_is_described() -> None:
    with pytest.raises(ValueError, match="here") as raised:
        exec("raise ValueError('here')", {"__name__": 5})
    assert describe(raised.value, "s")["message"] == "here"
