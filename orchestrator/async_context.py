"""The argument of an `async def` step: as that of others, and nothing in it blocks the loop."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from beatless.orchestrator.context import StepContext, in_percent
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.loop_thread import Together, WriteLane

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

BLOCKS_AT = 8
"""How often the output of a step is full that does not await, until it blocks the loop."""


class Write(Awaitable[None]):
    """A write that was handed over, in its order. It may be awaited: then it is committed.

    It happens also if nobody awaits it, or who does is cancelled: before the step's end is
    committed.
    """

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()


class AsyncStepContext(StepContext):
    """The StepContext of an `async def` step: its traces can be awaited.

    >>> from beatless import AsyncStepContext, step
    >>> @step(timeout=60)
    ... async def ask_model(ctx: AsyncStepContext):
    ...     await ctx.trace("asked", prompt=ctx.input["prompt"])
    ...     return {"answer": "yes"}
    """

    def __init__(
        self,
        *,
        lane: WriteLane,
        share: Callable[[NewEvent], Together | None],
        **options: Any,
    ) -> None:
        """`share` has an event written together with those of other runs, if it can be."""
        super().__init__(**options)
        self._lane = lane
        self._share = share
        self._nothing = Write(_written())
        self._emptied = _written()
        """The write of output that was handed over last."""

    @property
    def connection(self) -> "AsyncConnection":  # type: ignore[override]  # asynchronous, as the step
        """The transaction that also commits this step's StepFinished: transactional steps only.

        An SQLAlchemy AsyncConnection. Raises RuntimeError in other steps.
        """
        found: AsyncConnection = self._given_connection()
        return found

    def trace(self, name: str, /, **data: Any) -> Awaitable[None]:  # type: ignore[override]  # awaitable
        """Hand over a DebugTrace event. `await` it to know that it is committed.

        Raises BadPayload at once; when awaited also LeaseLost if the run was taken, and StepEnded
        after the end of the step. Without `await` it is written as well, before the step ends.
        """
        return self._handed_over(self._trace_event(name, data))

    def emit(self, piece: Any, /) -> Awaitable[None]:  # type: ignore[override]  # awaitable
        """Add a piece to the output of the step, as in any step, without blocking the loop.

        `await` it to wait while Postgres is slower than the step: 1,024 pieces wait in memory, and
        8,192 of a step that does not await; then the call blocks. A trace before it may come after
        it in the journal, unless that was awaited. Raises what it raises in any step.
        """
        self._speak()
        full = self._output.add(piece)
        if full >= BLOCKS_AT or (full and not _in_loop()):
            self._output.write()
        elif full and self._emptied.done():
            self._emptied = self._lane.put(self._output.write)
        return Write(self._emptied) if full else self._nothing

    def progress(self, pct: float, note: str | None = None) -> Awaitable[None]:  # type: ignore[override]  # awaitable
        """Trace the progress of the step, in percent. At most four a second are stored."""
        if self._progress_is_due():
            return self.trace("progress", pct=in_percent(pct), note=note)
        return self._nothing

    def raise_if_cancelled(self) -> None:
        """Raise RunCancelled if a cancel was requested: at once, without a look at Postgres.

        The look is made meanwhile, at most four times a second: the next call knows. Raises
        LeaseLost if the run was taken from this worker.
        """
        super().raise_if_cancelled()

    async def drained(self) -> None:
        """Return once all that was handed over is written."""
        await self._lane.drained()

    def _handed_over(self, event: NewEvent) -> Awaitable[None]:
        handed_over = self._lane.put(lambda: self._append(event), self._share(event))
        if not _in_loop():  # a thread of the step, which may wait
            handed_over.result()
        return Write(handed_over)

    def _look_for_cancel(self) -> None:
        if _in_loop():
            self._lane.put(super()._look_for_cancel)
        else:
            super()._look_for_cancel()


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _written() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
