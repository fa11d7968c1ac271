"""The runbook: its figures are those that were measured, and what it names is there."""

import json

import pytest

from beatless.outbox.message import SHARDS
from benchmarks.runbook import PAGE, RESULTS, page


def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_its_tables_are_made_from_the_results() -> None:
    assert page(PAGE.read_text(), results()) == PAGE.read_text()


@pytest.mark.parametrize("key", [key for key in results() if key.startswith("capacity.")])
def test_another_result_is_another_page(key: str) -> None:
    changed = results()
    changed[key]["value"] = changed[key]["value"] * 3 + 1
    assert page(PAGE.read_text(), changed) != PAGE.read_text()


def test_connections_are_what_the_settings_page_says() -> None:
    found = results()
    assert found["capacity.relay.connections"]["value"] == 3
    assert found["capacity.worker.connections"]["value"] == 1
    settings = (PAGE.parent / "settings.md").read_text()
    assert "| relay | 3 direct;" in settings
    assert "| worker child (or thread) | 1;" in settings
    assert f"there are {SHARDS} shards" in PAGE.read_text()
