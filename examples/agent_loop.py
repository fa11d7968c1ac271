"""An agent that explores an app on a device, turn by turn, as one durable run.

    beatless --app agent_loop:app dev     # then, in a second terminal in the same directory:
    beatless plan show agent_loop
    beatless start agent_loop --input '{"device": "'$PWD'/device.json"}' --follow

The device is a stand-in: a file that holds its state. Like any device or service worth using in a
durable run it takes an idempotency key with each action, so an action whose answer was lost with
its worker is not performed a second time. Everything the agent knows is in the results of its
steps; a worker that takes the run over goes on in the middle of a turn.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from beatless import App, Finish, Goto, Plan, Settings, StepContext, retry, step

SCREENS = 40
TRANSIENT = retry(max_attempts=3, initial=1, jitter=0)


class DeviceBusy(Exception):
    """The device did not take the action; another one may work."""


class Device:
    """A device with one app of many screens. Each action is performed once for its key."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def state(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"app": None, "launches": 0, "screen": 0, "log": [], "answers": {}}
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def perform(self, key: str, action: str) -> str | int:
        """The answer to an action. Raises DeviceBusy."""
        state = self.state()
        if key not in state["answers"]:
            state["answers"][key] = self._answer(state, action)
            state["log"].append(action)
            written = self.path.with_suffix(".new")
            written.write_text(json.dumps(state))
            written.replace(self.path)  # all of it or nothing, as if it were a transaction
        answer: str | int = state["answers"][key]
        if answer == "busy":
            raise DeviceBusy(action)
        return answer

    def _answer(self, state: dict[str, Any], action: str) -> str | int:
        match action.split():
            case ["install", app]:
                state["app"] = app
            case ["launch"]:
                state["launches"] += 1
                state["screen"] = 0
            case ["back"]:
                state["screen"] = max(0, state["screen"] - 1)
            case ["tap", place]:
                chance = mixed(state["screen"], place, len(state["log"]))
                if chance % 13 == 0:
                    return "busy"
                # Some places lead far, most stay near: there are corners to get stuck in.
                if mixed(state["screen"], place) % 3 == 0:
                    state["screen"] = mixed(state["screen"], place, "to") % SCREENS
        screen: int = state["screen"]
        return screen


def mixed(*parts: object) -> int:
    """A number that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def device(ctx: StepContext) -> Device:
    return Device(ctx.input["device"])


def memory(ctx: StepContext) -> dict[str, Any]:
    """What the agent knew at the end of its last turn."""
    return ctx.results.get("Persist") or {"turn": 0, "seen": [], "tried": {}, "new_at": 0}


@step(name="EnsureDevice", retry=TRANSIENT)
def ensure_device(ctx: StepContext) -> dict[str, Any]:
    return {"device": ctx.input["device"], "ready": True}


@step(name="ProvisionApp", retry=TRANSIENT)
def provision_app(ctx: StepContext) -> str:
    device(ctx).perform(ctx.key, "install demo")
    return "demo"


@step(name="LaunchOrAttach", retry=TRANSIENT)
def launch_or_attach(ctx: StepContext) -> int | str:
    return device(ctx).perform(ctx.key, "launch")


@step(name="WaitIdle", retry=TRANSIENT, timeout=60)
def wait_idle(ctx: StepContext) -> bool:
    return device(ctx).state()["app"] is not None


@step(name="Perceive")
def perceive(ctx: StepContext) -> dict[str, Any]:
    return {"screen": device(ctx).state()["screen"], "turn": memory(ctx)["turn"] + 1}


@step(name="EnumerateActions")
def enumerate_actions(ctx: StepContext) -> list[str]:
    return [*(f"tap {place}" for place in range(ctx.input.get("places", 4))), "back"]


@step(name="ChooseAction")
def choose_action(ctx: StepContext) -> str:
    """The policy `curious` takes what was tried least on this screen, `wild` anything."""
    actions, seen = ctx.results["EnumerateActions"], ctx.results["Perceive"]
    if ctx.results.get("SwitchPolicy") == "wild":
        return actions[mixed(seen["turn"]) % len(actions)]
    tried = memory(ctx)["tried"]
    return min(actions, key=lambda action: tried.get(f"{seen['screen']} {action}", 0))


@step(name="Act")
def act(ctx: StepContext) -> Any:
    """The only step of a turn with an effect; the key makes it happen once."""
    try:
        return device(ctx).perform(ctx.key, ctx.results["ChooseAction"])
    except DeviceBusy as error:
        return Goto("RecoverFromError", result=f"busy: {error}")


@step(name="Verify")
def verify(ctx: StepContext) -> dict[str, Any]:
    now = device(ctx).state()["screen"]
    return {"screen": now, "changed": now != ctx.results["Perceive"]["screen"]}


@step(name="Persist")
def persist(ctx: StepContext) -> dict[str, Any]:
    known, screen = memory(ctx), ctx.results["Verify"]["screen"]
    turn = known["turn"] + 1
    place = f"{ctx.results['Perceive']['screen']} {ctx.results['ChooseAction']}"
    return {
        "turn": turn,
        "seen": sorted({*known["seen"], screen}),
        "tried": known["tried"] | {place: known["tried"].get(place, 0) + 1},
        "new_at": known["new_at"] if screen in known["seen"] else turn,
    }


@step(name="DetectProgress")
def detect_progress(ctx: StepContext) -> int:
    """Turns without anything new, since the app was started last."""
    known = memory(ctx)
    since = max(known["new_at"], ctx.results.get("RestartApp", 0))
    ctx.progress(100 * known["turn"] / ctx.input.get("turns", 200), f"{len(known['seen'])} screens")
    return known["turn"] - since


@step(name="ShouldContinue")
def should_continue(ctx: StepContext) -> Goto:
    stale, turn = ctx.results["DetectProgress"], memory(ctx)["turn"]
    if turn >= ctx.input.get("turns", 200):
        return Goto("Stop")
    if stale and stale % 12 == 0:
        return Goto("RestartApp")
    if stale and stale % 5 == 0:
        return Goto("SwitchPolicy")
    return Goto("Perceive")


@step(name="SwitchPolicy")
def switch_policy(ctx: StepContext) -> Goto:
    before = ctx.results.get("SwitchPolicy", "curious")
    return Goto("Perceive", result="wild" if before == "curious" else "curious")


@step(name="RestartApp", retry=TRANSIENT)
def restart_app(ctx: StepContext) -> Goto:
    device(ctx).perform(ctx.key, "launch")
    return Goto("WaitIdle", result=memory(ctx)["turn"])


@step(name="RecoverFromError", retry=TRANSIENT)
def recover_from_error(ctx: StepContext) -> Goto:
    device(ctx).perform(ctx.key, "back")
    return Goto("Perceive")


@step(name="Stop")
def stop(ctx: StepContext) -> Finish:
    """The digest is of all that the device was made to do, in order."""
    state = device(ctx).state()
    digest = hashlib.sha256("\n".join(state["log"]).encode()).hexdigest()
    return Finish(
        {
            "turns": memory(ctx)["turn"],
            "screens": len(memory(ctx)["seen"]),
            "launches": state["launches"],
            "actions": len(state["log"]),
            "digest": digest[:16],
        }
    )


agent_loop = Plan(
    "agent_loop",
    [
        ensure_device,
        provision_app,
        launch_or_attach,
        wait_idle,
        perceive,
        enumerate_actions,
        choose_action,
        act,
        verify,
        persist,
        detect_progress,
        should_continue,
        switch_policy,
        restart_app,
        recover_from_error,
        stop,
    ],
    routes={
        "Act": ["RecoverFromError"],
        "ShouldContinue": ["Perceive", "SwitchPolicy", "RestartApp", "Stop"],
        "SwitchPolicy": ["Perceive"],
        "RestartApp": ["WaitIdle"],
        "RecoverFromError": ["Perceive"],
    },
)

app = App(Settings.from_env(), [agent_loop])
