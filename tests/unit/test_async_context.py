"""Writes that an async step has handed over happen, whoever awaits them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from beatless.orchestrator.async_context import Write
from beatless.orchestrator.loop_thread import WriteLane


async def awaits(write: Write) -> str:
    await write
    return "written"


def test_a_write_happens_if_one_who_awaits_it_is_cancelled_and_the_others_go_on() -> None:
    before, written = threading.Event(), []

    async def body(writers: ThreadPoolExecutor) -> str:
        lane = WriteLane(writers, asyncio.get_running_loop())
        lane.put(lambda: before.wait(60))
        write = Write(lane.put(lambda: written.append("trace")))
        tasks = [asyncio.ensure_future(awaits(write)) for _ in range(2)]
        await asyncio.wait(tasks, timeout=0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        before.set()
        return await tasks[1]

    with ThreadPoolExecutor(1) as writers:
        assert asyncio.run(body(writers)) == "written"
    assert written == ["trace"]
