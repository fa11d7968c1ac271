"""Readers of npm find in our streams, cut anywhere, what the journal has: make test-readers."""

import json
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from beatless import Plan
from beatless.testing import Kit
from tests.integration.test_readers_of_others import cuts, rewritten, tell, told

HERE = Path(__file__).parent


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("tell", [tell])]


def test_the_events_are_those_of_the_journal_wherever_the_stream_is_cut(beatless: Kit) -> None:
    stream, expected = told(beatless)
    streams = [chunks for sent in (stream, rewritten(stream)) for chunks in cuts(sent)]
    read = subprocess.run(
        ["node", HERE / "read.mjs"],
        input=json.dumps([[b64encode(chunk).decode() for chunk in each] for each in streams]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert read.returncode == 0, read.stderr
    readers = json.loads(read.stdout)
    assert sorted(readers) == ["eventsource", "eventsource-parser", "fetch-event-source"]
    for name, answers in readers.items():
        assert len(answers) == len(streams)
        for found in answers:
            assert [(id, kind, json.loads(data)) for id, kind, data in found] == expected, name
