"""A connection that is not used again once psycopg has lost count of its answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import pq


class CountedConnection(psycopg.Connection[Any]):
    """A connection that is closed if a pipeline cannot be left.

    Behind a statement that fails psycopg 3.3 now and then takes one answer for another, when the
    machine is slow. The session then stays in pipeline mode, where every later statement fails.
    """

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        outermost = self.pgconn.pipeline_status == pq.PipelineStatus.OFF
        try:
            with super().pipeline() as pipeline:
                yield pipeline
        finally:
            left = self.closed or self.pgconn.pipeline_status == pq.PipelineStatus.OFF
            if outermost and not left:
                self.close()
