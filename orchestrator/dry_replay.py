"""A replay of a stored run that executes no step and writes nothing: what the function says."""

from collections.abc import Iterable
from functools import partial

from beatless.orchestrator.child_calls import ReadEnds
from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import Event
from beatless.orchestrator.function_call import Broken, Said, call_function
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import history_of
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Replay, departure, refused_input
from beatless.orchestrator.unfit_events import folded


def dry_replay(plan: FunctionPlan, run: Run, events: Iterable[Event], read_ends: ReadEnds) -> Said:
    """The first thing that the function says to which the journal has no answer.

    `read_ends` reads children of the run. It executes the code of the
    function, and calls no body of a step. The run is not cancelled. Raises UnreadableEvent.
    """
    history = folded(partial(history_of, plan), [*events])
    run = history.as_given(run)
    if found := departure(plan, run.plan_version, history):
        return found
    try:
        given = plan.input.load(run.input)
    except BadPayload as error:
        return refused_input(error)
    except Exception as error:  # of the user's type
        return Broken(error)
    call = call_function(run, given, Replay(plan=plan, history=history, read_ends=read_ends))
    try:
        return call.resume(None)
    finally:
        call.close()
