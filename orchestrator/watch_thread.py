"""The watch of a relay over workers: a thread, without a session while no worker is there."""

import threading

from beatless.orchestrator.fleet_watch import WORKERS_CHANGED, FleetWatch
from beatless.outbox.observer import Observer
from beatless.outbox.sockets import Alarm, readable
from beatless.outbox.threads import LastingThread


class WatchThread:
    """Runs a `FleetWatch` as long as its relay runs, and whenever a worker announces itself."""

    def __init__(self, watch: FleetWatch, *, observer: Observer) -> None:
        self._watch = watch
        self._observer = observer
        self._stopping = threading.Event()
        self._alarm: Alarm | None = None
        self._thread: LastingThread | None = None

    def start(self) -> None:
        """Begin, or look again: workers may have come while the relay could hear none."""
        if self._thread is None:
            self._alarm = Alarm()
            self._thread = LastingThread("watch", self._run, observer=self._observer)
            self._thread.start()
        else:
            self._look()

    def heard(self, message: str) -> None:
        """A message on the channel of the relays."""
        if message == WORKERS_CHANGED:
            self._look()

    def note_load(self) -> None:
        """The relay has much to do."""
        if self._alarm is not None and self._watch.note_load():
            self._alarm.ring()

    def stop(self) -> None:
        """End the thread. May be called more than once."""
        self._stopping.set()
        if self._thread is None or self._alarm is None:
            return
        self._alarm.ring()
        self._thread.end()
        self._alarm.close()
        self._thread = self._alarm = None

    def _look(self) -> None:
        if self._alarm is not None:
            self._watch.look_soon()
            self._alarm.ring()

    def _run(self, thread: LastingThread) -> None:
        alarm = self._alarm
        try:
            while alarm is not None and not self._stopping.is_set():
                works = self._watch.once()
                (thread.works if works else thread.failed)()
                waiting: list[int | Alarm] = [alarm, *self._watch.descriptors()]
                readable(waiting, self._watch.patience())
                alarm.quiet()
        finally:
            self._watch.close()
