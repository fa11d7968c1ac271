"""Plans and steps wherever Python lets one write a function: they work, or are refused at once."""

import sys
import types
from typing import Any

import pytest

from beatless import Plan, RunState
from beatless.orchestrator.outcomes import PlanError
from beatless.testing import Kit

HEAD = """
import functools
from dataclasses import dataclass
from beatless import Plan, RunContext, StepContext, plan, step

@step
def double(ctx, number=1):
    return 2 * number
"""

WORKS: dict[str, str] = {
    "a lambda": """
made = plan("p")(lambda run: run.step(double, 3))
""",
    "a partial": """
def times(run, factor):
    return run.step(double, factor)

made = plan("p")(functools.partial(times, factor=3))
""",
    "an async partial": """
async def times(run, factor):
    return await run.step(double, factor)

made = plan("p")(functools.partial(times, factor=3))
""",
    "a bound method": """
class Shop:
    factor = 3

    def sell(self, run):
        return run.step(double, self.factor)

made = plan("p")(Shop().sell)
""",
    "a class method": """
class Shop:
    factor = 3

    @classmethod
    def sell(cls, run):
        return run.step(double, cls.factor)

made = plan("p")(Shop.sell)
""",
    "below staticmethod": """
class Shop:
    @staticmethod
    @plan("p")
    def sell(run):
        return run.step(double, 3)

made = Shop.sell
""",
    "above staticmethod": """
class Shop:
    @plan("p")
    @staticmethod
    def sell(run):
        return run.step(double, 3)

made = Shop.sell
""",
    "above an async staticmethod": """
class Shop:
    @plan("p")
    @staticmethod
    async def sell(run):
        return await run.step(double, 3)

made = Shop.sell
""",
    "an object that can be called": """
class Sells:
    async def __call__(self, run):
        return await run.step(double, 3)

made = plan("p")(Sells())
""",
    "a function with a wrapper": """
def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

@plan("p")
@logged
def made(run):
    return run.step(double, 3)
""",
    "a local function": """
def make(factor):
    @step
    def times(ctx, number):
        return factor * number

    @plan("p")
    def local(run):
        return run.step(times, 3)

    return local

made = make(2)
""",
    "annotations as text": """
from __future__ import annotations

@dataclass
class Order:
    number: int = 3

@plan("p", input=Order, default_input={})
def made(run: RunContext[Order]) -> int:
    return run.step(double, run.input.number)
""",
    "annotations that name nothing": """
from __future__ import annotations

@step
def times(ctx: Nowhere, number: Missing) -> Unknown:
    return 2 * number

@plan("p")
def made(run: RunContext[Lost]) -> Gone:
    return run.step(times, 3)
""",
    "a type that was defined locally": """
def make():
    @dataclass
    class Order:
        number: int = 3

    @plan("p", input=Order, default_input={})
    def local(run):
        return run.step(double, run.input.number)

    return local

made = make()
""",
    "one function of two plans": """
def sell(run):
    return run.step(double, 3)

other = plan("q")(sell)
made = plan("p")(sell)
""",
    "a step that is a method": """
class Shop:
    factor = 2

    def times(self, ctx, number):
        return self.factor * number

times = step(Shop().times)
made = plan("p")(lambda run: run.step(times, 3))
""",
    "a step that is a partial": """
def times(ctx, factor, number):
    return factor * number

times = step(name="times")(functools.partial(times, factor=2))
made = plan("p")(lambda run: run.step(times, number=3))
""",
    "a step above an async staticmethod": """
class Shop:
    @step(name="times")
    @staticmethod
    async def times(ctx, number):
        return 2 * number

made = plan("p")(lambda run: run.step(Shop.times, 3))
""",
    "a list of steps in a class": """
class Shop:
    @step
    def six(ctx):
        return 6

    plan = Plan("p", [six])

made = Shop.plan
""",
}

REFUSED: dict[str, tuple[str, str]] = {
    "a method": (
        """
class Shop:
    @plan("p")
    def sell(self, run):
        return run.step(double, 3)
""",
        "put it outside, or use functools.partial",
    ),
    "above classmethod": (
        """
class Shop:
    @plan("p")
    @classmethod
    def sell(cls, run):
        return run.step(double, 3)
""",
        "put\n@plan below nothing but @staticmethod, or outside",
    ),
    "a class": (
        """
@plan("p")
class Sells:
    def __init__(self, run): ...
""",
        "is no function: give it one",
    ),
    "no name": (
        """
@plan
def made(run): ...
""",
        '@plan needs the name of the plan: @plan("checkout")',
    ),
    "a generator": (
        """
@plan("p")
def made(run):
    yield run.step(double, 3)
""",
        "is a generator: call run.step",
    ),
    "two arguments": (
        """
@plan("p")
def made(run, number): ...
""",
        "must take exactly one argument",
    ),
    "a type that names a local one": (
        """
from __future__ import annotations

def make():
    @dataclass
    class Line:
        number: int

    @dataclass
    class Order:
        lines: list[Line]

    return plan("p", input=Order)(lambda run: None)

make()
""",
        "define the types that it names in a module",
    ),
    "the name of a type": (
        """
@dataclass
class Order:
    number: int = 3

made = plan("p", input="Order")(lambda run: None)
""",
        "give input the type itself",
    ),
    "a step that is a method": (
        """
class Shop:
    @step
    def times(self, ctx):
        return 1

made = Plan("p", [Shop.times])
""",
        "must take exactly one argument, the context",
    ),
}


def executed(source: str, module: str) -> dict[str, Any]:
    """The names that it defines, as in a notebook: it has no file, and may be `__main__`."""
    names = types.ModuleType(module).__dict__
    future = "from __future__ import annotations\n"
    text = (future if future in source else "") + HEAD + source.replace(future, "")
    exec(compile(text, "<cell 1>", "exec"), names)
    return names


@pytest.mark.parametrize("module", ["__main__", "plans_of_a_test"])
def test_a_plan_works_wherever_its_function_is_written(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    if module != "__main__":
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for kind, source in WORKS.items():
        made: Plan = executed(source, module)["made"]
        beatless.app.plans["p"] = made
        run = beatless.start_run("p")
        beatless.executor().execute(made, run.run_id, 0)
        ended = beatless.client.get_run(run.run_id)
        assert (ended.state, ended.result) == (RunState.COMPLETED, 6), (kind, ended.error)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_plan_is_refused_where_it_is_written(kind: str) -> None:
    source, advice = REFUSED[kind]
    with pytest.raises(PlanError) as refused:
        executed(source, "__main__")
    assert advice.replace("\n", " ") in str(refused.value).replace("\n", " ")
