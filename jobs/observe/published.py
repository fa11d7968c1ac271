"""Finds facts in the bytes of published events, without parsing their JSON.

A body is the events of one append, one a line, as Postgres builds them. Nothing in users' data
looks like the patterns: jsonb writes a space after a colon.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

STARTED = b'"type":"RunStarted","v":1,"source":"api","data":{"plan": "'
CANCELLED = b'"type":"RunFinished","v":1,"source":"api","data":{"plan": "'
QUEUE = b'", "queue": "'
FINISHED = b'"type":"RunFinished"'
TIMESTAMP = re.compile(rb'"ts":(\d+)')
SEQ = re.compile(rb'"seq":(\d+),')
TRACEPARENT = re.compile(rb'"traceparent": "([0-9a-f-]{55})"')


def starts(batch: bytes) -> Mapping[tuple[str, str], int]:
    """Starts of runs, by plan and queue."""
    found: Counter[bytes] = Counter()
    for begin in _ends(batch, STARTED):
        queue = batch.index(QUEUE, begin) + len(QUEUE)
        found[batch[begin : batch.index(b'"', queue)]] += 1
    names = {text: text.decode().partition(QUEUE.decode()) for text in found}
    return {(plan, queue): found[text] for text, (plan, _, queue) in names.items()}


def cancellations(batch: bytes) -> Iterator[str]:
    """The plans of runs that were cancelled before a worker had them, one for each run."""
    for begin in _ends(batch, CANCELLED):
        yield batch[begin : batch.index(b'"', begin)].decode()


def written_at_ms(body: bytes) -> int | None:
    """The time of the first event, in milliseconds since the epoch."""
    found = TIMESTAMP.search(body)
    return int(found[1]) if found else None


def last_seq(body: bytes) -> int | None:
    """The seq of the last event."""
    found = SEQ.search(body, body.rfind(b"\n") + 1)
    return int(found[1]) if found else None


def begins_run(body: bytes, run_id: bytes) -> bool:
    """Whether the first event is the first one of its run."""
    offset = len(run_id) + len(b'{"run_id":"')
    return body.startswith(b'","seq":1,', offset)


def ends_run(body: bytes) -> bool:
    """Whether the run's last event is among them."""
    return FINISHED in body


def traceparent(body: bytes) -> str | None:
    """The W3C traceparent that a run was started with, in the body of its start."""
    found = TRACEPARENT.search(body)
    return found[1].decode() if found else None


def _ends(batch: bytes, pattern: bytes) -> Iterator[int]:
    """Offsets after each occurrence of the pattern. Faster than a regular expression."""
    offset = batch.find(pattern)
    while offset >= 0:
        yield offset + len(pattern)
        offset = batch.find(pattern, offset + len(pattern))
