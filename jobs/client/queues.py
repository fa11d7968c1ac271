"""Calls about queues and their runs, for the whole fleet."""

from datetime import timedelta

from beatless.client.base import BaseClient
from beatless.client.requests import queue_name, seconds
from beatless.errors import BadRequest
from beatless.orchestrator.queues import QueueState
from beatless.transactions import reaching_postgres


class QueueCalls(BaseClient):
    """Queue control, and the removal of runs."""

    def queues(self) -> list[QueueState]:
        """Every queue with its counts: that has runs, a setting or a worker, or is paused.

        >>> run = client.start_run("checkout", {"order": 1}, queue="mail")
        >>> [queue.queued for queue in client.queues() if queue.name == "mail"]
        [1]
        """
        with reaching_postgres(self._journal.schema, self._engine):
            return self._queues.states()

    def pause_queue(self, queue: str) -> None:
        """After this returned no run of the queue starts anywhere; those that run go on.

        >>> client.pause_queue("mail")
        >>> [queue.paused_at is not None for queue in client.queues() if queue.name == "mail"]
        [True]
        """
        with reaching_postgres(self._journal.schema, self._engine):
            self._queues.pause(queue_name(queue))

    def resume_queue(self, queue: str) -> None:
        """Let the queue's runs start again.

        >>> client.pause_queue("mail")
        >>> client.resume_queue("mail")
        """
        with reaching_postgres(self._journal.schema, self._engine):
            self._queues.resume(queue_name(queue))

    def set_age_after(self, queue: str, age_after: float | timedelta | None) -> None:
        """Let runs that wait for longer than this come before those of a higher priority.

        Seconds, or a timedelta; None: priority alone orders them, as at first. Those that wait the
        longest come first; in a queue with groups, in their groups. From the next look of the
        relays on, and a deploy keeps it. Raises BadRequest.

        >>> client.set_age_after("mail", 600)
        >>> [queue.age_after for queue in client.queues() if queue.name == "mail"]
        [600.0]
        >>> client.set_age_after("mail", None)
        """
        age_after_s = seconds("age_after", age_after)
        if age_after_s == 0:
            raise BadRequest("age_after", "is 0 seconds: give more, or None for no ageing")
        with reaching_postgres(self._journal.schema, self._engine):
            self._queues.set_age(queue_name(queue), age_after_s)

    def drain_queue(self, queue: str) -> int:
        """Take away the runs that wait, leave those that run; how many were taken away.

        Raises BadRequest for a queue that nothing knows.

        >>> run = client.start_run("checkout", {"order": 1}, queue="letters")
        >>> client.drain_queue("letters")
        1
        """
        with reaching_postgres(self._journal.schema, self._engine):
            return self._queues.drain(self._known(queue))

    def obliterate_queue(self, queue: str, *, force: bool = False) -> int:
        """Take away the queue with all of its runs; how many.

        Raises QueueBusy without `force`, and BadRequest for a queue that nothing knows.

        >>> run = client.start_run("checkout", {"order": 1}, queue="parcels")
        >>> client.obliterate_queue("parcels", force=True)
        1
        """
        with reaching_postgres(self._journal.schema, self._engine):
            return self._queues.obliterate(self._known(queue), force=force)

    def _known(self, queue: str) -> str:
        """The name, if a plan names the queue, or it is paused, is consumed or has runs.

        Raises BadRequest: a name that was mistyped must not look as if it were done.
        """
        name = queue_name(queue)
        if name in {plan.queue for plan in self._plans.values()} or self._queues.is_known(name):
            return name
        raise unknown_queue(name)

    def remove_run(self, run_id: str) -> None:
        """Take a run away with all of its events. Raises RunNotFound, RunIsActive.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> stopped = client.cancel_run(run.run_id)
        >>> client.remove_run(run.run_id)
        """
        run_id = self.get_run(run_id).run_id
        with reaching_postgres(self._journal.schema, self._engine):
            self._queues.remove_run(run_id, namespace=self._namespace)

    def clean(self, state: str, older_than: float | timedelta, limit: int = 1000) -> int:
        """Take away up to `limit` runs that ended in this state so long ago; how many.

        >>> run = client.cancel_run(client.start_run("checkout", {"order": 1}).run_id)
        >>> beatless.advance(7 * 86_400)
        >>> client.clean("cancelled", older_than=7 * 86_400) >= 1
        True
        """
        age = _age(older_than)
        with reaching_postgres(self._journal.schema, self._engine):
            return self._queues.clean(state, seconds=age, limit=limit, namespace=self._namespace)

    def count_finished(self, state: str, older_than: float | timedelta) -> tuple[int, int]:
        """(runs, events) that `clean` would take away without a limit.

        >>> run = client.cancel_run(client.start_run("checkout", {"order": 1}).run_id)
        >>> runs, events = client.count_finished("cancelled", older_than=0)
        >>> runs >= 1 and events >= 3
        True
        """
        age = _age(older_than)
        with reaching_postgres(self._journal.schema, self._engine):
            return self._queues.count_finished(state, seconds=age, namespace=self._namespace)


def unknown_queue(name: str) -> BadRequest:
    """The error for a queue that nothing knows."""
    return BadRequest(
        "queue",
        f"is {name!r}, which no plan names, no worker consumes and no run is in: "
        "`beatless queues` lists those that there are",
    )


def _age(older_than: float | timedelta) -> float:
    age = seconds("older_than", older_than)
    if age is None:
        raise BadRequest("older_than", "is missing: 0 removes all ended runs")
    return age
