"""Which history a database has, asked by many threads at once and of a disk that goes back."""

from collections.abc import Callable
from typing import Any

from beatless.streams.history import Origin


class Disk:
    """A journal on a disk that was flushed up to a place. No threads, every order of answers."""

    def __init__(self) -> None:
        self.flushed = 100
        self.renewed = 0
        self.meanwhile: Callable[[], Any] | None = None

    def epoch(self, _connection: Any) -> tuple[str, int]:
        answer = f"a{self.renewed}t1", self.flushed
        self.meanwhile, meanwhile = None, self.meanwhile
        if meanwhile is not None:
            meanwhile()  # between the statement and its answer
        return answer

    def renew(self, _connection: Any, _epoch: str) -> None:
        self.renewed += 1


def origin(disk: Disk) -> tuple[Origin, Any]:
    connection: Any = None
    return Origin(disk), connection  # type: ignore[arg-type] # all that it asks a journal for


def test_an_answer_that_another_threads_has_overtaken_is_no_disk_that_went_back() -> None:
    disk = Disk()
    found, connection = origin(disk)
    assert found.epoch(connection) == "a0t1"

    def overtake() -> None:
        disk.flushed = 200
        assert found.epoch(connection) == "a0t1"

    disk.meanwhile = overtake
    assert found.epoch(connection) == "a0t1"
    assert disk.renewed == 0


def test_a_disk_that_went_back_is_noticed_after_an_overtaken_answer_too() -> None:
    disk = Disk()
    found, connection = origin(disk)
    found.epoch(connection)
    disk.meanwhile = lambda: (setattr(disk, "flushed", 200), found.epoch(connection))
    found.epoch(connection)
    disk.flushed = 150  # below what was seen last, above what was answered last

    assert found.epoch(connection) == "a1t1"
    assert disk.renewed == 1
