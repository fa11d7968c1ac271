"""The order of a stream, whatever arrives: duplicates, overlaps, gaps."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.stream import Cursor
from orchestrator.events import Event


def event(seq: int) -> Event:
    return Event(run_id="r", seq=seq, ts=0, type="DebugTrace", source="worker")


batches = st.lists(st.lists(st.integers(1, 30), max_size=12), max_size=20)


@given(st.integers(0, 10), batches)
def test_each_event_comes_once_and_in_order_whatever_arrives(after, arrivals):
    cursor = Cursor(after)
    delivered, heard = [], set()
    for batch in arrivals:
        heard |= set(batch)
        delivered += [found.seq for found in cursor.feed(map(event, batch))]

        assert delivered == list(range(after + 1, after + 1 + len(delivered)))
        # Everything that can be delivered has been.
        assert after + len(delivered) + 1 not in heard
        assert cursor.missing == any(seq > cursor.seq for seq in heard)


@given(st.integers(0, 10), batches)
def test_the_journal_fills_every_gap(after, arrivals):
    cursor = Cursor(after)
    delivered = [found.seq for batch in arrivals for found in cursor.feed(map(event, batch))]

    delivered += [found.seq for found in cursor.feed(map(event, range(cursor.seq + 1, 31)))]

    assert delivered == list(range(after + 1, 31))
    assert not cursor.missing


def test_an_abandoned_read_goes_on_where_it_stopped():
    cursor = Cursor(0)
    assert next(cursor.feed(map(event, [1, 2, 3]))).seq == 1
    assert [found.seq for found in cursor.feed([])] == [2, 3]
