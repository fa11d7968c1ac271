"""The argument of a plan's function: the run's input, its steps, and values that are stored."""

import random
import uuid
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from beatless.orchestrator.plan import Step
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Call, Mismatch, Outcome, Replay

Input = TypeVar("Input")

Asked = Call | Mismatch
"""What the execution is asked for by a function that is suspended meanwhile."""


class RunContext(Generic[Input]):
    """One run, in the function of its plan.

    The executor makes it. A unit test of a function gives anything that has the methods.

    >>> from beatless import RunContext, plan, step
    >>> @step
    ... def ask_model(ctx, prompt): ...
    >>> @plan("research")
    ... def research(run: RunContext) -> dict:
    ...     began = run.now()
    ...     answers = [run.step(ask_model, question) for question in run.input["questions"]]
    ...     return {"answers": answers, "seconds": (run.now() - began).total_seconds()}
    """

    def __init__(
        self,
        *,
        run: Run,
        input: Input,
        version: int,
        replay: Replay,
        ask: Callable[[Asked], Outcome],
    ) -> None:
        self.id = run.run_id
        """The run's id."""
        self.input = input
        """The run's input: of the type that the plan declares, else JSON."""
        self.tags = run.tags
        self.version = version
        """The version of the plan that the run was started with: `if run.version >= 2: …`."""
        self._replay = replay
        self._ask = ask

    def step(self, step: Step, /, *args: Any, id: str | None = None, **kwargs: Any) -> Any:
        """The result of a step, as JSON; it is executed unless it has finished before.

        Other arguments follow the context in the call of the step. The occurrences of one step are
        named in the order of the calls: `name`, `name#2`. `id` names this one `name#id` instead,
        and its arguments are not compared with those of an earlier call. In an `async def` plan
        this is awaited.

        Raises StepFailed when the step has failed for good, PlanError for a second step of one
        name, TypeError for arguments that the step does not take, and BadPayload for arguments that
        are not JSON.
        """
        return self._answer(self._replay.step(step, args, kwargs, id))

    def now(self) -> datetime:
        """The time in UTC, stored: the same whenever the function is called again."""
        text = self._replay.value("now", lambda: datetime.now(UTC).isoformat())
        return datetime.fromisoformat(text)

    def random(self) -> float:
        """A random number from 0 up to 1, stored."""
        return float(self._replay.value("random", random.random))  # no secret

    def uuid(self) -> uuid.UUID:
        """A random UUID, stored."""
        return uuid.UUID(self._replay.value("uuid", lambda: str(uuid.uuid4())))

    def _answer(self, found: Outcome | Asked) -> Any:
        outcome = found if isinstance(found, Outcome) else self._ask(found)
        return outcome.give()


class AsyncRunContext(RunContext[Input]):
    """The RunContext of a function that is `async def`: its steps are awaited."""

    def _answer(self, found: Outcome | Asked) -> Any:
        return Awaited(found)


class Awaited:
    """A call that an `async def` plan awaits."""

    def __init__(self, found: Outcome | Asked) -> None:
        self._found = found

    def __await__(self) -> Generator[Asked, Outcome, Any]:
        found = self._found
        outcome = found if isinstance(found, Outcome) else (yield found)
        return outcome.give()
