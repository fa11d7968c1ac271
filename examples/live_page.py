"""FastAPI: a row and its run in one AsyncSession, followed live by the page viewer.html beside it.

beatless --app live_page:app dev --env-file dev.env     # then, in a second terminal:
set -a; . ./dev.env; set +a; uvicorn live_page:host     # open http://127.0.0.1:8000
"""

import secrets
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from beatless import App, Plan, Settings, StepContext, step
from beatless.api import Grant, Scope, create_api


@step
def write(ctx: StepContext) -> None:
    for word in f"Order {ctx.input['order']} is packed and on its way.".split():
        ctx.emit(f"{word} ")


app = App(Settings.from_env(), [Plan("letter", [write])])
VISITORS: set[str | None] = set()  # yours: a table, a signed cookie, request.session


def authenticate(request: Request) -> Grant | None:  # None: the API answers 401
    return Grant(scopes=[Scope.RUNS_READ]) if request.cookies.get("visitor") in VISITORS else None


@asynccontextmanager
async def lifespan(_: FastAPI):  # type: ignore[no-untyped-def]  # noqa: ANN201
    engine = create_async_engine(app.engine.url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS letters (id serial PRIMARY KEY)"))
    yield {"engine": engine}
    await engine.dispose()


host = FastAPI(lifespan=lifespan)
host.mount("/jobs", create_api(app, authenticate=authenticate))
host.get("/follow.js")(lambda: FileResponse(Path(__file__).with_name("follow.js")))


@host.get("/")
def page() -> FileResponse:
    VISITORS.add(visitor := secrets.token_urlsafe())
    cookie = {"Set-Cookie": f"visitor={visitor}; HttpOnly; SameSite=lax"}
    return FileResponse(Path(__file__).with_name("viewer.html"), headers=cookie)


@host.post("/orders")
async def order(request: Request) -> dict[str, str]:
    async with AsyncSession(request.state.engine) as session, session.begin():  # both, or neither
        number = await session.scalar(text("INSERT INTO letters DEFAULT VALUES RETURNING id"))
        run = await app.client.astart_run("letter", {"order": number}, connection=session)
    return {"run_id": run.run_id}
