"""The order of a stream, whatever arrives: duplicates, overlaps, gaps, new beginnings."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beatless.orchestrator.events import EventText
from beatless.streams.cursor import Cursor


def event(seq: int) -> EventText:
    return EventText(seq, "DebugTrace", b"")


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


LAST = 40

steps = st.lists(
    st.one_of(
        # So many events are committed.
        st.tuples(st.just("commit"), st.integers(1, 9)),
        # Redis brings any of what is committed: late, doubled, in any order, with holes.
        st.tuples(st.just("live"), st.lists(st.integers(1, LAST), max_size=9)),
        # The journal is read from the cursor on, a page at once, or a page that came too late.
        st.tuples(st.just("journal"), st.integers(1, 9)),
        st.tuples(st.just("stale journal"), st.integers(0, LAST)),
        # What came early is dropped, as before each look into the journal for a hole.
        st.tuples(st.just("forget"), st.just(0)),
        # The viewer reads only so many of what it could have, and goes away.
        st.tuples(st.just("leave"), st.integers(0, 5)),
        # It comes again after the last that it had.
        st.tuples(st.just("again"), st.just(0)),
        # Its epoch is another one: it forgets all and begins anew.
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=40,
)


def seen_by_a_viewer(script: list) -> Iterator[list[int]]:
    """What a viewer has after each step, and at last after the journal was read to its end."""
    head, seen, cursor = 0, list[int](), Cursor(0)
    for kind, value in script:
        arrived: list[int] = []
        match kind:
            case "commit":
                head = min(LAST, head + value)
            case "live":
                arrived = [seq for seq in value if seq <= head]
            case "journal":
                arrived = list(range(cursor.seq + 1, min(head, cursor.seq + value) + 1))
            case "stale journal":
                arrived = list(range(value, min(head, value + 5) + 1))
            case "forget":
                cursor.forget()
                assert not cursor.missing
            case "again":
                cursor = Cursor(seen[-1] if seen else 0)
            case "reset":
                seen, cursor = [], Cursor(0)
        if kind == "leave":
            reader = cursor.feed(map(event, range(1, head + 1)))
            seen += [found.seq for _, found in zip(range(value), reader, strict=False)]
            cursor = Cursor(seen[-1] if seen else 0)
        else:
            seen += [found.seq for found in cursor.feed(map(event, arrived))]
        yield seen
    seen += [found.seq for found in cursor.feed(map(event, range(cursor.seq + 1, LAST + 1)))]
    yield seen
    assert seen == list(range(1, LAST + 1))
    assert not cursor.missing


def check_viewer(script: list) -> None:
    for seen in seen_by_a_viewer(script):
        assert seen == list(range(1, len(seen) + 1))


@given(steps)
def test_a_viewer_has_exactly_the_sequence_whatever_happens_on_the_way(script):
    check_viewer(script)


@pytest.mark.long
@settings(max_examples=3000)
@given(steps)
def test_a_viewer_has_exactly_the_sequence_in_many_more_cases(script):
    check_viewer(script)
