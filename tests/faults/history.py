"""A recorded history: what callers did, what bodies did, what viewers saw, what is stored.

A history is a list of records (JSON objects) in any order; times are seconds by the clock of one
host. `kind` says what a record is:

| kind | members |
|---|---|
| `plan` | `plan`, `steps` in order, `cleanup` (may run after a cancel), `snoozing` (begin often) |
| `call` | `op`, `begin`, `end`, `outcome` (`ok`, `failed`, `unknown`, `rolled_back`), and |
| | of `start`: `run_id`, `plan`, `key`, `delay_s`; of `cancel`: `run_id`; |
| | of `retry`: `run_id`, `new` (the new run); of `pause`, `resume`: `queue` |
| `effect` | `run_id`, `step`, `attempt`, `key`, `call` (unique): a body has had its effect |
| `row` | `run_id`, `step`: a transactional step has written this row |
| `log` | `id`, `txid`, `run_id`, and either `event` (`type`, `source`, `step`, `attempt`) or |
| | `claim` (`token`, `was_running`, `lease_until`, `at`, `statement_at`, `queue`): |
| | written by triggers, under the lock of the run's row |
| `frame` | `viewer`, `run_id`, `seq`, `type`, `text`: in the order in which it was seen |
| `view` | `viewer`, `run_id`, `from_seq`, `ended` |
| `wire` | `connection`, `run_id`, `seq`: in the order in which Redis published them |
| `fault` | `name`, `begin`, `end` |
| `run` | `run_id`, `plan`, `state`, `last_seq`, `key`, `created_at`, `deadline_at`, `retry_of` |
| `event` | `run_id`, `seq`, `ts`, `type`, `step`, `attempt`, `data`, `text`: as stored |
| `outbox` | `rows`: what was left when all was over |
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


class History:
    """The records by kind and by run."""

    def __init__(self, records: Iterable[Record]) -> None:
        by_kind: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            by_kind[record["kind"]].append(record)
        self.plans = {plan["plan"]: plan for plan in by_kind["plan"]}
        self.calls = by_kind["call"]
        self.faults = by_kind["fault"]
        self.views = by_kind["view"]
        self.runs = {run["run_id"]: run for run in by_kind["run"]}
        self.outbox = sum(record["rows"] for record in by_kind["outbox"])
        self.events = self._by_run(by_kind["event"], "seq")
        self.effects = self._by_run(by_kind["effect"])
        self.rows = self._by_run(by_kind["row"])
        self.log = self._by_run(by_kind["log"], "id")
        self.frames: dict[str, list[Record]] = defaultdict(list)
        for frame in by_kind["frame"]:
            self.frames[frame["viewer"]].append(frame)
        self.wire: dict[tuple[str, str], list[int]] = defaultdict(list)
        for message in by_kind["wire"]:
            self.wire[message["connection"], message["run_id"]].append(message["seq"])

    @staticmethod
    def _by_run(records: list[Record], order: str = "") -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = defaultdict(list)
        for record in sorted(records, key=lambda record: record[order]) if order else records:
            found[record["run_id"]].append(record)
        return found

    def called(self, op: str, *outcomes: str) -> list[Record]:
        return [c for c in self.calls if c["op"] == op and c["outcome"] in (outcomes or ("ok",))]

    def faults_during(self, begin: float, end: float) -> int:
        return sum(fault["begin"] <= end and fault["end"] >= begin for fault in self.faults)
