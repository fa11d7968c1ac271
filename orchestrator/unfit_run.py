"""A run's row that contradicts its journal, as only SQL can write it: mended, so that the run ends.

With a `last_seq` that is not the seq of its last event a run could write nothing, also not its end.
"""

from beatless.orchestrator.errors import LeaseLost
from beatless.orchestrator.events import Event
from beatless.orchestrator.lease import Connection, Lease
from beatless.orchestrator.records import CheckpointPage
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements


def unfit_page(schema: str, lease: Lease, connection: Connection) -> CheckpointPage:
    """Mend the `last_seq` of a run: a page that has its last event, and says so.

    Raises LeaseLost if the run is not under this lease any more, or has no event.
    """
    sql = statements(__file__, schema)
    parameters = {"run_id": lease.run.run_id, "token": lease.token}
    with connection.transaction():
        held = execute(connection, sql["lock"], parameters)
        last = execute(connection, sql["last_event"], parameters) if held else []
        if not last:
            raise LeaseLost(lease.run.run_id, lease.token)
        event = Event.from_json(last[0][0])
        execute(connection, sql["mend"], parameters | {"after": event.seq})
    problem = f"last_seq was {held[0][0]}, and its journal ends with event {event.seq}"
    return CheckpointPage(events=[event], restarted_seq=0, last=True, unfit=problem)
