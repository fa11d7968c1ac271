"""What `make bench` measures is what the product executes."""

from beatless.orchestrator.journal import Journal
from benchmarks.relay import appends, without_outbox

RINGS = "pg_try_advisory_xact_lock_shared"


def test_appends_without_a_doorbell_and_without_an_outbox_row_are_other_statements() -> None:
    statement = Journal("bench", max_event_bytes=1).sql["append"]
    texts = appends(statement)

    assert texts["doorbell"] == statement
    assert {name: RINGS in text for name, text in texts.items()} == {
        "doorbell": True,
        "none": False,
        "notify": False,
    }
    assert "pg_notify" not in texts["none"]
    assert "pg_notify" in texts["notify"]
    assert "INSERT INTO bench.run_outbox" in statement
    assert "INSERT INTO bench.run_outbox" not in without_outbox(statement)
