"""The plans that the suite runs, and the app by which worker processes find them."""

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from billiard.process import current_process

from beatless import (
    App,
    Fatal,
    Finish,
    Goto,
    LeaseLost,
    Plan,
    RunContext,
    Settings,
    Snooze,
    StepContext,
    StepFailed,
    plan,
    retry,
    step,
)
from beatless.demo import PLANS
from beatless.orchestrator.plan import Step


@step
def first(ctx: StepContext) -> str:
    return "one"


@step
def second(ctx: StepContext) -> str:
    return ctx.results["first"] + " two"


two_steps = Plan("two_steps", [first, second])
TWO_STEPS = ["RunStarted", *["StepStarted", "StepFinished"] * 2, "RunFinished"]
"""The events of its run, when nothing fails."""


@step
def many(ctx: StepContext) -> int:
    """As many traces as the input says."""
    for number in range(ctx.input["traces"]):
        ctx.trace("tick", number=number)
    return ctx.input["traces"]


traces = Plan("traces", [many])


def note(ctx: StepContext, step_name: str) -> None:
    """One line in the ledger that the input names: an effect outside of Postgres."""
    with Path(ctx.input["ledger"]).open("a") as ledger:
        ledger.write(json.dumps({"step": step_name, "key": ctx.key, "pid": os.getpid()}) + "\n")


@step(name="a")
def ledger_a(ctx: StepContext) -> str:
    note(ctx, "a")
    return "a"


@step(name="b")
def ledger_b(ctx: StepContext) -> str:
    """Kills its own process in the first attempt, after its effect."""
    note(ctx, "b")
    if ctx.attempt <= ctx.input.get("kills", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return ctx.results["a"] + "b"


@step(name="c")
def ledger_c(ctx: StepContext) -> str:
    note(ctx, "c")
    return ctx.results["b"] + "c"


ledger = Plan("ledger", [ledger_a, ledger_b, ledger_c])


@step(retry=retry(max_attempts=3, initial=10, backoff=2, jitter=0))
def flaky(ctx: StepContext) -> int:
    """Fails as often as the input says."""
    if ctx.attempt <= ctx.input["failures"]:
        raise ValueError(f"attempt {ctx.attempt} fails")
    return ctx.attempt


retries = Plan("retries", [flaky])


@step
def fatal(ctx: StepContext) -> None:
    raise Fatal("no use trying again")


fatally = Plan("fatally", [fatal])


@step
def turn(ctx: StepContext) -> Any:
    """Counts its visits, and goes round until the input's number of turns."""
    turns = ctx.results.get("turn", 0) + 1
    if turns < ctx.input["turns"]:
        return Goto("turn", result=turns)
    if ctx.input.get("finish"):
        return Finish({"turns": turns})
    return turns


@step
def stop(ctx: StepContext) -> str:
    return f"stopped after {ctx.results['turn']}"


loop = Plan("loop", [turn, stop], routes={"turn": ["turn"]})


@step
def doze(ctx: StepContext) -> Any:
    """Snoozes until its ledger file exists."""
    return "awake" if Path(ctx.input["wake"]).exists() else Snooze(60)


sleepy = Plan("sleepy", [doze])


@step(transactional=True)
def insert(ctx: StepContext) -> int:
    """One row for each execution, in the transaction that commits the step."""
    ctx.connection.exec_driver_sql(
        f"INSERT INTO {ctx.input['table']} VALUES (%(key)s)", {"key": ctx.key}
    )
    if ctx.input.get("fail"):
        raise ValueError("after the insert")
    return 1


@step
def after_insert(ctx: StepContext) -> str:
    return "done"


transactional = Plan("transactional", [insert, after_insert])


@step
def returns_input(ctx: StepContext) -> Any:
    """Returns what the input names, so that tests can return what is not JSON."""
    return {"nan": float("nan"), "set": {1}, "nul": "a\0b", "big": "x" * 300_000}[ctx.input["what"]]


bad_results = Plan("bad_results", [returns_input])


@step
def wait_for_file(ctx: StepContext) -> str:
    """Looks for a cancel until the file of the input exists."""
    Path(ctx.input["started"]).touch()
    while not Path(ctx.input["go"]).exists():
        ctx.raise_if_cancelled()
    return "gone"


patient = Plan("patient", [wait_for_file, first])


@step
def wait_at_a_fifo(ctx: StepContext) -> int:
    """Notes its process, and waits until somebody writes to the FIFO of the input."""
    with Path(ctx.input["pids"]).open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    Path(ctx.input["fifo"]).read_text()
    return os.getpid()


at_a_fifo = Plan("at_a_fifo", [wait_at_a_fifo])


@step(retry=retry(max_attempts=1, max_crashes=1))
def obstinate(ctx: StepContext) -> int:
    """Does not come back in its first process, in the way that the input names."""
    with Path(ctx.input["pids"]).open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    if len(Path(ctx.input["pids"]).read_text().splitlines()) == 1:
        hang(ctx)
    return ctx.attempt


obstinate_plan = Plan("obstinate", [obstinate])


def hang(ctx: StepContext) -> None:
    """Does not come back in the time of any test, in the way that the input names."""
    Path(ctx.input["started"]).touch()
    how = ctx.input.get("how", "wait")
    while how == "swallow":
        with suppress(Exception):
            threading.Event().wait(120)
    while how == "spin":
        pass
    while how == "trace":
        ctx.trace("tick")
    if how == "stuck":
        re.match(r"(a+)+$", "a" * 64 + "b")  # holds the interpreter's lock for years
    if how == "query":
        ctx.connection.exec_driver_sql("SELECT pg_sleep(120)")
    threading.Event().wait(120)


@step(timeout=0.5, retry=retry(max_attempts=2, initial=10, jitter=0))
def hangs(ctx: StepContext) -> str:
    """Hangs in as many attempts as the input says."""
    if ctx.attempt <= ctx.input.get("hangs", 1):
        hang(ctx)
    return f"attempt {ctx.attempt}"


limited = Plan("limited", [hangs, first])
stuck = Plan("stuck", [replace(hangs, timeout=5), first])
"""Its second attempt has time, on a machine that has none."""


@step(timeout=0.5, transactional=True, retry=retry(max_attempts=2, initial=10, jitter=0))
def hangs_in_transaction(ctx: StepContext) -> int:
    """Inserts, then hangs in the first attempt."""
    ctx.connection.exec_driver_sql(
        f"INSERT INTO {ctx.input['table']} VALUES (%(key)s)", {"key": ctx.key}
    )
    if ctx.attempt == 1:
        hang(ctx)
    return ctx.attempt


limited_transaction = Plan("limited_transaction", [hangs_in_transaction])

UNLIMITED = [
    Plan("limited", [replace(hangs, timeout=None), first]),
    Plan("limited_transaction", [replace(hangs_in_transaction, timeout=None)]),
    two_steps,
]
"""The same with time, for an attempt that does not hang on a machine that does."""


@step(timeout=0.1)
def dawdles(ctx: StepContext) -> str:
    """Goes on until it is told that its run was taken from it, and hides that."""
    with suppress(LeaseLost):
        while True:
            ctx.raise_if_cancelled()
    return "too late"


late = Plan("late", [dawdles, first])


@step(terminate_on_cancel=True)
def deaf(ctx: StepContext) -> None:
    """Never looks for a cancel."""
    hang(ctx)


terminable = Plan("terminable", [deaf])


@step
def unlimited(ctx: StepContext) -> None:
    hang(ctx)


endless = Plan("endless", [unlimited])


def six_step(number: int) -> Step:
    """A step with an effect outside of Postgres; one of them kills its process if told so."""

    @step(name=f"s{number}")
    def body(ctx: StepContext) -> int:
        with Path(ctx.input["ledger"]).open("a") as ledger:
            ledger.write(json.dumps([ctx.run_id, ctx.step, ctx.attempt]) + "\n")
        if ctx.input.get("kill_in") == ctx.step and ctx.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return body


@step(name="s3", transactional=True)
def six_transactional(ctx: StepContext) -> int:
    ctx.connection.exec_driver_sql(
        f"INSERT INTO {ctx.input['table']} VALUES (%(key)s)", {"key": ctx.key}
    )
    return 3


six = Plan("six", [*map(six_step, (1, 2)), six_transactional, *map(six_step, (4, 5, 6))])


@step
def gate(ctx: StepContext) -> str:
    """Waits for the file of the input, without work for the processor."""
    while not Path(ctx.input["go"]).exists():
        threading.Event().wait(0.05)
    return "through"


gated = Plan("gated", [gate])


@step
def half_second(ctx: StepContext) -> None:
    raise Fatal(f"with {ctx.results['first']}")


half = Plan("half", [first, half_second])


@step(retry=retry(max_attempts=2, initial=10, jitter=0))
def undo(ctx: StepContext) -> dict[str, Any]:
    """Undoes what the steps before it have done; the cancel is no news to it."""
    ctx.raise_if_cancelled()
    if ctx.attempt <= (ctx.input or {}).get("undo_failures", 0):
        raise ValueError("cannot be undone")
    return {"undone": sorted(ctx.results)}


@step(retry=retry(max_attempts=2, initial=10, jitter=0))
def wavers(ctx: StepContext) -> str:
    """Waits for a second attempt, or looks for a cancel, as the input says."""
    if (ctx.input or {}).get("look"):
        while True:
            ctx.raise_if_cancelled()
    if ctx.attempt == 1:
        raise ValueError("try again")
    return "done"


compensated = Plan("compensated", [first, wavers, second], on_cancel=undo)
undeaf = Plan("undeaf", [first, deaf], on_cancel=undo)


@step
def tell_trace(ctx: StepContext) -> dict[str, str | None]:
    """Where a span of the user's own would hang, and what a call of another service would carry."""
    try:
        found = importlib.import_module("opentelemetry.trace")
    except ImportError:
        return {"current": None, "traceparent": ctx.traceparent}
    here = found.get_current_span().get_span_context()
    return {
        "current": f"{here.trace_id:032x}/{here.span_id:016x}",
        "traceparent": ctx.traceparent,
    }


tells_its_trace = Plan("tells_its_trace", [tell_trace])


@step
def exit_for_want(ctx: StepContext) -> None:
    sys.exit("the configuration is missing")


exits = Plan("exits", [exit_for_want])


@step
def hold(ctx: StepContext) -> str:
    """Waits in C, with the interpreter's lock, until somebody writes to the FIFO of the input."""
    while ctypes.PyDLL(None).open(ctx.input["fifo"].encode(), os.O_RDONLY) < 0:  # by a signal
        pass
    return "held"


@step
def multiply(ctx: StepContext) -> dict[str, list[int]]:
    """In processes of its own, of each kind that the standard library has."""
    results = {}
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            results[method] = pool.map(abs, [-1, -2])
            pool.close()  # or the block's end is a SIGTERM, which coverage answers in a handler
            pool.join()
    with ProcessPoolExecutor(1) as executor:
        results["executor"] = list(executor.map(abs, [-3, -4]))
    with multiprocessing.Manager() as manager:
        results["manager"] = list(manager.list([5, 6]))
    return results


@step
def look_for_its_process(ctx: StepContext) -> bool:
    """Whether the collector looks at what stands for the process, made just before it began."""
    return any(each is current_process() for each in gc.get_objects())


multiplies = Plan("multiplies", [multiply])
looks_for_its_process = Plan("looks_for_its_process", [look_for_its_process])
keeps_its_place = Plan("keeps_its_place", [step(name="keeps", timeout=0.3)(gate.function)])
holds_the_lock = Plan("holds_the_lock", [hold])


@step(name="hangs_for_good", timeout=0.5)
def hangs_for_good(ctx: StepContext, how: str) -> None:
    hang(ctx)


@plan("asks")
def asks(run: RunContext[dict[str, Any]]) -> Any:
    """A step that kills its process, and one that the watchdog has to end, in a function."""
    run.step(ledger_a)
    run.step(ledger_b)
    try:
        run.step(hangs_for_good, run.input["how"])
    except StepFailed as failed:
        return [run.step(ledger_c), failed.type]


ALL = [
    asks,
    *PLANS,
    two_steps,
    traces,
    ledger,
    retries,
    fatally,
    loop,
    sleepy,
    transactional,
    bad_results,
    patient,
    at_a_fifo,
    obstinate_plan,
    late,
    limited,
    limited_transaction,
    stuck,
    terminable,
    endless,
    six,
    gated,
    half,
    compensated,
    undeaf,
    tells_its_trace,
    exits,
    holds_the_lock,
    keeps_its_place,
    multiplies,
    looks_for_its_process,
]

app = App(Settings.from_env(), ALL)
