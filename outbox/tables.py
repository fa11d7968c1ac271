"""The tables that carry facts out of Postgres, for reads and for the migration check.

The DDL is in `jobs/migrations`; a test compares the two.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

Id = Text(collation="C")
Time = DateTime(timezone=True)

run_events = Table(
    "run_events",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("ts", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("type", Text, nullable=False),
    Column("v", SmallInteger, nullable=False, server_default=text("1")),
    Column("source", Text, nullable=False),
    Column("step", Text),
    Column("attempt", Integer),
    Column("data", JSONB),
    Index("run_events_finished", "ts", postgresql_where=text("type = 'RunFinished'")),
    Index(
        "run_events_outcome",
        text("(data ->> 'outcome')"),
        "ts",
        postgresql_where=text("type = 'RunFinished'"),
    ),
)

run_outbox = Table(
    "run_outbox",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("run_id", Id, nullable=False),
    Column("from_seq", Integer, nullable=False),
    Column("to_seq", Integer, nullable=False),
)

dispatches = Table(
    "dispatches",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("shard", SmallInteger, nullable=False),
    Column("task", Text, nullable=False),
    Column("queue", Id, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("due_at", Time, nullable=False),
    Column("reason", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("deadline_at", Time),
    Column("parent_id", Id),
    Column("child_no", Integer),
    Column("children_left", Integer),
    Column("wakes_on_failure", Boolean),
    Column("schedule_id", BigInteger),
    Column("dedupe_key", Text),
    Column("dedupe_next", Boolean, nullable=False, server_default=text("false")),
    Column("limit_id", Id),
    Column("limit_since", Time),
    Column("group_id", Id, nullable=False, server_default=text("''")),
    Index(
        "dispatches_turns",
        "queue",
        "group_id",
        text("priority DESC"),
        "due_at",
        postgresql_where=text("state = 'waiting'"),
    ),
    Index(
        "dispatches_limited",
        "limit_id",
        text("priority DESC"),
        "limit_since",
        postgresql_where=text("state = 'delayed' AND reason = 'limit'"),
    ),
    Index(
        "dispatches_let_in",
        "limit_id",
        postgresql_where=text("limit_id IS NOT NULL AND state IN ('waiting', 'sent')"),
    ),
    Index(
        "dispatches_children",
        "parent_id",
        "child_no",
        postgresql_where=text("parent_id IS NOT NULL"),
    ),
    Index(
        "dispatches_schedule",
        "schedule_id",
        postgresql_where=text("schedule_id IS NOT NULL"),
    ),
    Index("dispatches_deadline", "deadline_at", postgresql_where=text("deadline_at IS NOT NULL")),
    Index(
        "dispatches_waiting",
        "queue",
        "priority",
        "due_at",
        postgresql_where=text("state = 'waiting'"),
    ),
    Index("dispatches_out", "due_at", postgresql_where=text("state <> 'waiting'")),
    Index("dispatches_sent", "queue", postgresql_where=text("state = 'sent'")),
    Index(
        "dispatches_dedupe",
        "task",
        "dedupe_key",
        "dedupe_next",
        unique=True,
        postgresql_where=text("dedupe_key IS NOT NULL"),
    ),
    Index("dispatches_next", "run_id", postgresql_where=text("dedupe_next")),
)

wakes = Table(
    "wakes",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("run_id", Id, nullable=False),
    Column("reason", Text),
    Column("failed", Boolean),
    Column("first_child", Integer),
    Column("last_child", Integer),
    Column("plan", Text),
    Column("dedupe_key", Text),
)

limit_notes = Table(
    "limit_notes",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("limit_id", Id, nullable=False),
    Column("due_at", Time),
    Index("limit_notes_limit", "limit_id"),
)
"""Limits that a relay is to look at, now or when they have a token."""

group_weights = Table(
    "group_weights",
    metadata,
    Column("group_id", Id, primary_key=True),
    Column("weight", Integer, nullable=False),
    Column("changed_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)
"""What a person has set; a group without a row has the weight 1."""

group_turns = Table(
    "group_turns",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("queue", Id, primary_key=True),
    Column("group_id", Id, primary_key=True),
    Column("finish", Double, nullable=False),
    Index("group_turns_finish", "shard", "queue", "finish"),
)
"""Groups that had turns lately, and where the next one of each begins."""

queue_turns = Table(
    "queue_turns",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("queue", Id, primary_key=True),
    Column("served", Double, nullable=False),
    Column("cursor", Id, nullable=False),
)
"""How far the turns of a queue have come; of many groups, the last one that was looked at."""

queues = Table(
    "queues",
    metadata,
    Column("name", Id, primary_key=True),
    Column("paused_at", Time),
    Column("age_after_s", Double),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("run_id", Id, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", JSONB, nullable=False),
    Column("created_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)

history = Table("history", metadata, Column("token", Text, nullable=False))
