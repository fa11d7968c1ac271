"""Whether this process can answer requests, told without taking part in them."""

import asyncio
import logging

import anyio
import sqlalchemy
from fastapi.responses import JSONResponse
from sqlalchemy import exc

from beatless import schema
from beatless.app import App
from beatless.errors import SchemaBehind
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import execute
from beatless.transactions import first_line

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""How long an answer is given again: who asks often costs nothing."""

REDIS_TIMEOUT_S = 2.0
"""Below the timeouts of probes: a Redis that hangs must not take out an API that does without."""


class Readiness:
    """Asks through a connection and a thread of its own, one question at a time."""

    def __init__(self, app: App, engine: sqlalchemy.Engine) -> None:
        self._app = app
        self._engine = engine
        self._asking: asyncio.Task[JSONResponse] | None = None
        self._asked_at = 0.0

    async def answer(self) -> JSONResponse:
        """200 for ready, also without Redis, which streams can do without; else 503."""
        loop = asyncio.get_running_loop()
        asking = self._asking
        if (
            asking is None
            or asking.get_loop() is not loop
            or (asking.done() and monotonic() >= self._asked_at + FRESH_S)
        ):
            self._asked_at = monotonic()
            asking = self._asking = loop.create_task(self._ask(), name="beatless-readiness")
        return await asyncio.shield(asking)

    async def _ask(self) -> JSONResponse:
        alone = anyio.CapacityLimiter(1)
        return await anyio.to_thread.run_sync(self._check, limiter=alone, abandon_on_cancel=True)

    def _check(self) -> JSONResponse:
        try:
            schema.check(self._engine, self._app.settings.schema)
            with self._engine.connect() as connection:
                standby = execute(connection, "SELECT pg_is_in_recovery()", {})[0][0]
        except (exc.DBAPIError, exc.TimeoutError, SchemaBehind) as error:
            # Open to all callers: addresses of servers stay in the log.
            logger.warning("not ready", extra={"action": "not_ready", "reason": first_line(error)})
            reason = str(error) if isinstance(error, SchemaBehind) else "Postgres cannot be reached"
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        if standby:
            reason = "the database URL reaches a standby: streams must read the primary"
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        redis = self._app.settings.redis.client(
            socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
        )
        try:
            redis.ping()
        except Exception as error:
            logger.warning("degraded", extra={"action": "degraded", "reason": str(error)})
            reason = "Redis cannot be reached: streams read the journal"
            return JSONResponse({"status": "degraded", "reason": reason})
        finally:
            redis.close()
        return JSONResponse({"status": "ok"})
