"""The reference plan `agents.run`: an agent's session on a device, in exactly 13 events.

The device is a stand-in that is derived from its name, so the same run gives the same results.
"""

import zlib
from typing import Any

from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.plan import Plan, step


def _device(ctx: StepContext) -> str:
    given = {} if ctx.input is None else ctx.input
    if not isinstance(given, dict):
        raise Fatal('the input must be an object, for example {"device": "d1", "app": "browser"}')
    return str(given.get("device") or f"device-{zlib.crc32(ctx.run_id.encode()) % 1000:03d}")


@step(name="EnsureDevice")
def ensure_device(ctx: StepContext) -> dict[str, Any]:
    """Find the device and look at its battery."""
    serial = _device(ctx)
    battery = 40 + zlib.crc32(serial.encode()) % 60
    ctx.trace("ensureDevice.check", serial=serial, battery=battery, online=True)
    return {"serial": serial, "battery": battery}


@step(name="Warmup")
def warmup(ctx: StepContext) -> dict[str, Any]:
    """Unlock the screen; a low battery dims it."""
    battery = ctx.results["EnsureDevice"]["battery"]
    return {"unlocked": True, "brightness": 100 if battery > 60 else 50}


@step(name="OpenApp")
def open_app(ctx: StepContext) -> dict[str, Any]:
    """Bring the app to the front."""
    serial = ctx.results["EnsureDevice"]["serial"]
    return {"app": (ctx.input or {}).get("app", "browser"), "window": f"{serial}/main"}


@step(name="Ping")
def ping(ctx: StepContext) -> dict[str, Any]:
    """Ask the app for an answer."""
    window = ctx.results["OpenApp"]["window"]
    return {"window": window, "answer": f"pong {zlib.crc32(window.encode()):08x}"}


@step(name="Teardown")
def teardown(ctx: StepContext) -> dict[str, Any]:
    """Close the app and report the outcome."""
    return {
        "serial": ctx.results["EnsureDevice"]["serial"],
        "answer": ctx.results["Ping"]["answer"],
        "closed": True,
    }


agents_run = Plan("agents.run", [ensure_device, warmup, open_app, ping, teardown])
