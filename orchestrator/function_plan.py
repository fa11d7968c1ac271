"""Plans that are functions: `@plan`. No registry, no I/O."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from beatless.orchestrator.celery_task import is_celery_task
from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import encode
from beatless.orchestrator.forms import Form, find_form
from beatless.orchestrator.limit import Limit, checked_limits
from beatless.orchestrator.outcomes import STEP_NAME, PlanError
from beatless.orchestrator.plan import INPUT_BYTES, PLAN_NAME, Plan, Step
from beatless.orchestrator.step_body import body_of
from beatless.orchestrator.typed_input import typed_input

VERSIONS = 2**30
"""All versions are below it."""

UNDEFINED = ("class-not-fully-defined", "undefined-annotation")
"""The codes of pydantic's errors for a type that it does not find by its name."""


class FunctionPlan(Plan):
    """A plan whose steps are those that its function asks for. Made by `plan`."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        input: Any = None,
        version: int = 1,
        queue: str = "default",
        on_cancel: Step | None = None,
        default_input: Any = None,
        renamed: Mapping[str, str] | None = None,
        removed: Iterable[str] = (),
        limits: Iterable[Limit] | None = None,
    ) -> None:
        """Raises PlanError, naming the plan."""
        if not isinstance(name, str) or not PLAN_NAME.fullmatch(name):
            raise PlanError(
                f"plan name {name!r:.200} must match {PLAN_NAME.pattern}: "
                'give one, as in @plan("checkout")'
            )
        if type(version) is not int or not 1 <= version < VERSIONS:
            raise PlanError(
                f"plan {name}: version is {version!r}; give a number from 1 on, below 2**30"
            )
        self.name = name
        self.queue = queue
        self.limits = checked_limits(f"plan {name}", limits)
        self.function = function
        self.is_async = _check_function(name, function)
        self.number = version
        self.version = f"v{version}"
        self.elements = self.steps = tuple(_named_steps(name, function, on_cancel))
        self._by_name = {each.name: each for each in self.steps}
        self._after = {}
        self.routes = {}
        self.on_cancel = on_cancel
        self._check_on_cancel()
        self.undo_steps = self._undo_steps()
        self.removed = frozenset(_names(name, removed))
        self.renamed = self._resolve(renamed or {})
        self._check_input(input, default_input)
        self.__doc__ = function.__doc__

    def check_children(self, plans: Mapping[str, Plan]) -> None:
        """Raises PlanError for a plan that the code names and that is none of these.

        Its runs would be started, and no worker would know them.
        """
        for value in _named(self.function):
            if isinstance(value, Plan) and plans.get(value.name) is not value:
                raise PlanError(
                    f"plan {self.name} names plan {value.name}, which the App does not have: "
                    f"App(settings, plans=[{self.name}, {value.name}])"
                )

    def __call__(self, run: Any) -> Any:
        """Call the function itself, as a unit test would."""
        return self.function(run)

    def __repr__(self) -> str:
        return f"<plan {self.name!r}>"

    @property
    def first(self) -> None:
        """None: only the function knows."""
        return None

    def _may_have(self, name: str) -> bool:
        """True: the function may find a step in a way that its code does not show."""
        del name
        return True

    def following(self, name: str) -> list[str]:
        """None that is known: the function decides."""
        del name
        return []

    def form(self, occurrence: str, reference: str) -> Form | None:
        """As there: of the types that its code names, or that a loaded module has."""
        del occurrence
        return find_form(reference, _named(self.function))

    def started_with(self, stored: str) -> int:
        """The number in a stored version; 0 of a run that began with a list of steps."""
        number = stored.removeprefix("v")
        return int(number) if number != stored and number.isdecimal() else 0

    def _check_input(self, input: Any, default_input: Any) -> None:
        try:
            self.input = typed_input(input)
        except ImportError as error:
            raise PlanError(
                f"plan {self.name}: input={input!r} is checked by pydantic, which is not "
                "installed: pip install pydantic, or leave input away"
            ) from error
        except Exception as error:  # pydantic's, of several classes, and those of the user's type
            if getattr(error, "code", "") in UNDEFINED:
                raise PlanError(
                    f"plan {self.name}: input={input!r} names a type that is not known in its "
                    "module: define the types that it names in a module, and give input the type "
                    "itself, not its name"
                ) from error
            raise PlanError(
                f"plan {self.name}: input={input!r} is no type of JSON: {error}"
            ) from error
        self.typed = input is not None
        self.default_input = default_input
        if default_input is None:
            return
        try:
            self.default_input = self.input.dump(default_input)
            encode(
                self.default_input,
                where=f"plan {self.name}: default_input",
                limit=INPUT_BYTES,
            )
        except BadPayload as error:
            raise PlanError(f"plan {self.name}: default_input: {error}") from error


def plan(
    name: str,
    /,
    *,
    input: Any = None,
    version: int = 1,
    queue: str = "default",
    on_cancel: Step | None = None,
    default_input: Any = None,
    renamed: Mapping[str, str] | None = None,
    removed: Iterable[str] = (),
    limits: Iterable[Limit] | None = None,
) -> Callable[[Callable[..., Any]], FunctionPlan]:
    """Make a function a plan. It takes one argument, the RunContext, and returns the run's result.

    The function is called again from its top after each pause of the run; `run.step` gives it the
    stored results of the steps that have finished. It may be `async def`, and then awaits
    `run.step`.

    `input` is the type of the run's input: a dataclass, a TypedDict, a model of pydantic or a
    Struct of msgspec. It is checked before the run is stored. `version` is a number that a change
    of the function may raise (`run.version`): workers with a lower one leave the run alone from
    then on. `renamed` maps former names of steps to those of now; `removed` names steps that the
    function no longer asks for. `queue`, `on_cancel`, `default_input` and `limits` are as those of
    `Plan`.

    Raises PlanError, naming the plan, for a function that cannot be a plan.

    >>> from beatless import RunContext, plan, step
    >>> @step
    ... def reserve(ctx, lines): ...
    >>> @step
    ... def release(ctx, stock): ...
    >>> @plan("order")
    ... def order(run: RunContext):
    ...     stock = run.step(reserve, run.input["lines"])
    ...     if run.input["declined"]:
    ...         run.step(release, stock)
    ...     return {"stock": stock}
    >>> order
    <plan 'order'>
    """
    if not isinstance(name, str):
        raise PlanError(f'@plan needs the name of the plan: @plan("checkout"), not @plan({name!r})')

    def decorate(function: Callable[..., Any]) -> FunctionPlan:
        return FunctionPlan(
            name,
            function,
            input=input,
            version=version,
            queue=queue,
            on_cancel=on_cancel,
            default_input=default_input,
            renamed=renamed,
            removed=removed,
            limits=limits,
        )

    return decorate


def given_input(plan: Plan, given: Any) -> Any:
    """The input of a run as JSON, of the type that its plan declares. Raises BadPayload."""
    chosen = plan.default_input if given is None else given
    return plan.input.dump(chosen) if isinstance(plan, FunctionPlan) else chosen


def _check_function(name: str, function: Callable[..., Any]) -> bool:
    """Whether the function is async. Raises PlanError for one that cannot be a plan."""
    if isinstance(function, Plan):
        raise PlanError(f"plan {name} is plan {function.name} already: decorate the function once")
    if isinstance(function, Step):
        raise PlanError(
            f"plan {name} is step {function.name}: a plan asks for steps, as in "
            f"def {name}(run): return run.step({function.name})"
        )
    if is_celery_task(function):
        raise PlanError(
            f"plan {name} is a task of Celery's: a plan asks for steps, and a task becomes one by "
            f'Plan.task(…), as in Plan("{name}", [Plan.task(…)])'
        )
    if not callable(function) or inspect.isclass(function):
        raise PlanError(
            f"plan {name} is {function!r:.200}, which is no function: give it one (in a class: put "
            "@plan below nothing but @staticmethod, or outside)"
        )
    body = body_of(function)
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise PlanError(f"plan {name} is a generator: call run.step(…) instead of yielding")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise PlanError(
            f"plan {name} must take exactly one argument, the RunContext: a method of a class is "
            "called with none of its instances (put it outside, or use functools.partial)"
        ) from error
    except ValueError as error:
        raise PlanError(
            f"plan {name} is a builtin without a signature: write a function"
        ) from error
    return inspect.iscoroutinefunction(body)


def _names(plan: str, removed: Iterable[str]) -> Iterator[str]:
    names = [removed] if isinstance(removed, str) else removed
    if not isinstance(names, Iterable):
        raise PlanError(
            f"plan {plan}: removed is {removed!r:.200}; give a list of names of steps: "
            'removed=["before"]'
        )
    for each in names:
        if not isinstance(each, str) or not STEP_NAME.fullmatch(each):
            raise PlanError(f"plan {plan}: removed names {each!r:.200}, which is no step name")
        yield each


def _named_steps(plan: str, function: Callable[..., Any], on_cancel: Step | None) -> Iterator[Step]:
    """The steps that the code of a function names, in order.

    For drawings and metrics. Those that it finds in another way are executed like these. Raises
    PlanError for two steps of one name.
    """
    found: dict[str, Step] = {}
    for value in _named(function):
        if not isinstance(value, Step) or value is on_cancel:
            continue
        if found.setdefault(value.name, value) is not value:
            raise PlanError(f"plan {plan} names two steps called {value.name}")
    yield from found.values()


def _named(function: Callable[..., Any]) -> Iterator[Any]:
    """The values that the code of a function names, itself or in functions beside it, in order.

    By its globals and closures.
    """
    seen: set[CodeType] = set()
    ahead: list[Any] = [body_of(function)]
    while ahead:
        next_one = ahead.pop(0)
        body = inspect.unwrap(getattr(next_one, "__func__", next_one))
        if not isinstance(body, FunctionType) or body.__code__ in seen:
            continue
        seen.add(body.__code__)
        for value in _values_of(body):
            yield value
            if isinstance(value, FunctionType) and value.__module__ == body.__module__:
                ahead.append(value)


def _values_of(function: FunctionType) -> Iterator[Any]:
    """The global and closed-over values that the code names, also that of functions within it."""
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    codes = [function.__code__]
    while codes:
        code = codes.pop(0)
        for name in (*code.co_names, *code.co_freevars):
            if name in closed:
                try:
                    yield closed[name].cell_contents
                except ValueError:  # not filled yet: the function was decorated before
                    continue
            elif name in function.__globals__:
                yield function.__globals__[name]
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
