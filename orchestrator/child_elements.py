"""Elements of a list of steps at which its runs start runs of other plans, and wait for these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from beatless.orchestrator.child_calls import (
    ChildCall,
    check_plan,
    child_call,
    plain,
)
from beatless.orchestrator.child_options import check_group, check_map, child_tags
from beatless.orchestrator.outcomes import Goto, PlanError
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.step_body import unfinished
from beatless.orchestrator.waits import Wait, WaitKind, check_name, seconds_of_wait


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementContext:
    """A run so far: the argument of a function that gives its children their inputs.

    >>> from beatless import ElementContext
    >>> def lines(ctx: ElementContext) -> list:
    ...     return ctx.results["reserve"]["lines"]
    """

    run_id: str
    input: Any
    tags: Mapping[str, str]
    results: Mapping[str, Any]
    """As the steps of the plan find them in `ctx.results`."""


Inputs = Callable[[ElementContext], Any]
"""Gives an input for a child, or the list of them: from the run alone, the same each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildElement(Wait):
    """An element at which a run starts children, and goes on when they have ended."""

    plan: Plan
    inputs: Inputs | None
    alone: bool
    """It is one child, whose input and result are those of the element: no lists."""
    at_once: int | None = None
    collects: bool = False
    deadline_s: float | None = None
    group: str | None = None
    """That of the children; None: their parent's."""
    tags: Mapping[str, str] | None = field(default=None, hash=False)
    """Of the children, beside those of their parent."""
    on_failure: Goto | None = None
    """The element that follows when a child has failed; None: the run fails."""

    @property
    def route(self) -> Goto | None:
        return self.on_failure

    def call(self, context: ElementContext, last: Any) -> ChildCall:
        """The call that starts its children.

        `last` is the result of the step or child that finished last. Raises PlanError, and
        anything that the function for the inputs raises.
        """
        found = context.input if last is None else last
        found = plain(found if self.inputs is None else self.inputs(context))
        if not self.alone and not isinstance(found, list | tuple):
            raise PlanError(
                f"{self.name} starts a child for each member of a list, and got "
                f"{type(found).__name__}: give it the list, as in "
                f'map_("{self.name}", {self.plan.name}, inputs=lambda ctx: ctx.input["files"])'
            )
        return child_call(
            self.plan,
            [found] if self.alone else list(found),
            alone=self.alone,
            at_once=self.at_once,
            collects=self.collects,
            deadline_s=self.deadline_s,
            group=self.group,
            tags=child_tags(self.name, context.tags, self.tags),
        )


def child(
    name: str,
    plan: Plan,
    *,
    input: Inputs | None = None,
    deadline: float | timedelta | None = None,
    group: str | None = None,
    tags: Mapping[str, str] | None = None,
    on_failure: Goto | None = None,
) -> ChildElement:
    """An element of a plan that starts a run of another plan, and waits for its end.

    `input` is a function of the run so far (`ElementContext`), without effects: it is called again
    after a crash. Without it the child gets the result of the step or child that finished last, or
    the input of the run if that is None. Its result is that of the element. If it fails or is
    cancelled, the run goes on with `on_failure`, which finds the `type`, `message` and `run_id` of
    the failure as the result of the element; without it the run fails. The child ends by the
    deadline of the run; `deadline` (seconds or a timedelta) may be earlier. It has the group of the
    run without `group`, and the tags of the run; `tags` come beside them, or in place of one of the
    same name.

    Raises PlanError for a bad name, duration, group or tags, and for anything but a plan.

    >>> from beatless import Plan, child, step
    >>> @step
    ... def render(ctx): ...
    >>> @step
    ... def send(ctx):
    ...     return ctx.results["invoice"]
    >>> invoice = Plan("invoices", [render])
    >>> Plan("billing", [child("invoice", invoice), send])
    Plan('billing', [invoice, send])
    """
    where = f"child {name}"
    seconds = None if deadline is None else seconds_of_wait(f"{where}: deadline", deadline)
    return _element(
        where, name, plan, input, on_failure, alone=True, deadline_s=seconds, group=group, tags=tags
    )


def map_(
    name: str,
    plan: Plan,
    *,
    inputs: Inputs | None = None,
    at_once: int | None = None,
    failure: str = "fail",
    group: str | None = None,
    tags: Mapping[str, str] | None = None,
    on_failure: Goto | None = None,
) -> ChildElement:
    """An element of a plan that starts a run of another plan for each of several inputs.

    `inputs` is a function as that of `child`, and gives a list. The result of the element is the
    list of their results in order, which is read in pages when it is looked at. At most `at_once`
    are unfinished at a time. With `failure="fail"` the first child that fails has the others
    cancelled, and the run goes on with `on_failure`, or fails, once these have ended; with
    "collect" the list has a ChildFailed in its place. The children have the group of the run
    without `group`, and its tags, with `tags` beside them.

    Raises PlanError for a bad name and bad options, and for anything but a plan.

    >>> from beatless import Plan, map_, step
    >>> @step
    ... def resize(ctx): ...
    >>> thumbnail = Plan("thumbnail", [resize])
    >>> Plan("gallery", [map_("files", thumbnail, inputs=lambda ctx: ctx.input["photos"])])
    Plan('gallery', [files])
    """
    where = f"map_ {name}"
    check_map(where, at_once, failure)
    if on_failure is not None and failure != "fail":
        raise PlanError(f"{where} collects failures and has an on_failure: it would never come")
    return _element(
        where,
        name,
        plan,
        inputs,
        on_failure,
        at_once=at_once,
        collects=failure == "collect",
        group=group,
        tags=tags,
    )


def _element(
    where: str,
    name: str,
    plan: Any,
    inputs: Any,
    on_failure: Any,
    *,
    alone: bool = False,
    **options: Any,
) -> ChildElement:
    check_name(name)
    check_plan(plan)
    check_group(where, options.get("group"))
    child_tags(where, {}, options.get("tags"))
    if inputs is not None and not callable(inputs):
        raise PlanError(
            f"{where}: its input is {inputs!r:.200}; give it a function of the run so far, as in "
            'lambda ctx: ctx.results["reserve"]["lines"]'
        )
    if inputs is not None and (given := unfinished(inputs)):
        raise PlanError(f"{where}: its input is a function that gives {given}; let it return JSON")
    if on_failure is not None and not isinstance(on_failure, Goto):
        raise PlanError(f'{where}: on_failure is {on_failure!r}; give it a Goto: Goto("release")')
    if on_failure is not None and on_failure.result is not None:
        raise PlanError(f"{where}: on_failure carries a result; it is that of the failure")
    return ChildElement(
        name=name,
        kind=WaitKind.CHILDREN,
        plan=plan,
        inputs=inputs,
        alone=alone,
        on_failure=on_failure,
        **options,
    )


def check_child_elements(plan: Plan, plans: Mapping[str, Plan]) -> None:
    """Raises PlanError for an element whose plan is none of these: nobody would know its runs."""
    for each in plan.elements:
        if isinstance(each, ChildElement) and plans.get(each.plan.name) is not each.plan:
            raise PlanError(
                f"plan {plan.name} starts runs of plan {each.plan.name}, which the App does not "
                f"have: App(settings, plans=[{plan.name}, {each.plan.name}])"
            )
