"""Named points at which a test may end the process, compiled in and free when unused."""

import os
import signal
import threading
from collections import Counter

POINTS = frozenset(
    {
        "claim.committed",
        "step.before",
        "step.effect_done",
        "step.committed",
        "beside.before",
        "beside.committed",
        "wait.before",
        "wait.signalled",
        "children.before",
        "children.started",
        "wait.committed",
        "task.before_ack",
        "relay.after_claim",
        "relay.after_publish",
        "retention.pruned",
        "schedule.before",
        "schedule.fired",
    }
)


class SimulatedCrash(BaseException):
    """The process "died" here, as far as a test in the same process is concerned.

    A BaseException, because nothing that a real SIGKILL would skip may run: no `except Exception`.
    """

    def __init__(self, point: str) -> None:
        super().__init__(point)
        self.point = point

    def __str__(self) -> str:
        return f"simulated crash at {self.point}"


class CrashPoints:
    """Ends the process at the n-th pass of a named point.

    The specification is `point@n:action`, comma separated; `@n` defaults to 1, the action is `kill`
    (SIGKILL to this process, the default), `stop` (SIGSTOP: it is frozen there until SIGCONT) or
    `raise` (`SimulatedCrash`).
    """

    def __init__(self, specification: str = "") -> None:
        self._armed: dict[str, tuple[int, str]] = {}
        self._passes: Counter[str] = Counter()
        self._mutex = threading.Lock()
        for part in filter(None, specification.split(",")):
            name, _, action = part.partition(":")
            point, _, nth = name.partition("@")
            self.arm(point, nth=int(nth or 1), action=action or "kill")

    def arm(self, point: str, *, nth: int = 1, action: str = "raise") -> None:
        """Crash at the nth pass from now. Raises ValueError for an unknown point or action."""
        if point not in POINTS:
            raise ValueError(f"no crash point {point!r}: choose one of {', '.join(sorted(POINTS))}")
        if action not in ("kill", "stop", "raise"):
            raise ValueError(f"no crash action {action!r}: choose kill, stop or raise")
        self._armed[point] = (nth, action)
        self._passes[point] = 0

    def disarm(self, point: str) -> None:
        """Do not crash there after all."""
        self._armed.pop(point, None)

    def reach(self, point: str) -> None:
        """Report that this point was passed."""
        if not self._armed:
            return
        with self._mutex:  # bodies of one run may pass a point at the same time
            self._passes[point] += 1
            nth, action = self._armed.get(point, (0, ""))
            if self._passes[point] != nth:
                return
            del self._armed[point]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "raise":
            raise SimulatedCrash(point)
        os.kill(os.getpid(), signal.SIGSTOP)
