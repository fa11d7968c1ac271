"""The backends in whose place Django's own tests name its dummy and its immediate backend."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from beatless.django import client
from beatless.django.tasks import BeatlessBackend
from beatless.testing import Kit

kits: list[Kit] = []
"""That of the test that runs."""


class StoredBackend(BeatlessBackend):
    """Stores tasks as runs, with the two members of Django's dummy backend."""

    @property
    def results(self):
        """Also in a coroutine, where Django's tests ask for it: there is no block then."""
        if asyncio._get_running_loop() is None:
            return self.read()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self.read).result()

    def read(self):
        runs = client().list_runs()
        return [self.get_result(run.run_id) for run in reversed(runs)]

    def clear(self):
        for run in client().list_runs():
            client().cancel_run(run.run_id)
            client().remove_run(run.run_id)


class ExecutedBackend(BeatlessBackend):
    """Gives back results that a worker is done with, as Django's immediate backend does."""

    def enqueue(self, task, args, kwargs):
        stored = super().enqueue(task, args, kwargs)
        # In a thread of its own, as a worker is in a process: `aenqueue` keeps Django's busy.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(kits[-1].work_until_idle).result()
        return self.get_result(stored.id)
