"""The table of runs, for reads and for the migration check. The DDL is in `jobs/migrations`."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from beatless.orchestrator.options import STORED
from beatless.outbox.tables import Id, Time, metadata

FAILED_OR_CANCELLED = (
    "(\nCASE\n    WHEN (error ->> 'type'::text) = 'RunCancelled'::text "
    "AND NOT error ? 'traceback'::text THEN 'cancelled'::text\n    ELSE 'failed'::text\nEND)"
)
"""The state of a run that has an error. As Postgres shows it, for Alembic compares the texts."""

runs = Table(
    "runs",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("namespace", Id, nullable=False, server_default=text("'default'")),
    Column("plan", Text, nullable=False),
    Column("plan_version", Text, nullable=False),
    Column("queue", Id, nullable=False),
    Column("state", Text, nullable=False),
    Column("input", JSONB),
    Column("result", JSONB),
    Column("error", JSONB),
    Column("key", Text),
    Column("last_seq", Integer, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("lease_token", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_expires_at", Time),
    Column("worker", Text),
    Column("cancel_requested_at", Time),
    Column("not_before", Time),
    Column("deadline_at", Time),
    Column("retry_of", Id),
    Column("trace_context", JSONB),
    Column("created_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("started_at", Time),
    Column("finished_at", Time),
    Column("pruned_seq", Integer, nullable=False, server_default=text("0")),
    Column("pruned_at", Time),
    Column("default_queue", Boolean),
    Column("default_input", Boolean),
    Column("parent_id", Id),
    Column("child_no", Integer),
    Column("root_id", Id),
    Column("children_started", Integer, nullable=False, server_default=text("0")),
    Column("schedule", Text),
    Column("tick", Time),
    Column("limits", JSONB),
    Column("dead_token", BigInteger),
    *(
        Column(
            name,
            postgresql.dialect.ischema_names[each.sql_type],
            nullable=each.sql_default is None,
            server_default=None if each.sql_default is None else text(each.sql_default),
        )
        for name, each in STORED.items()
    ),
    CheckConstraint(
        "state IN ('queued', 'running', 'completed', 'failed', 'cancelled')", name="runs_state"
    ),
    Index("runs_key", "namespace", "key", unique=True, postgresql_where=text("key IS NOT NULL")),
    Index("runs_created", "namespace", "created_at", "run_id"),
    Index(
        "runs_children",
        "parent_id",
        "child_no",
        unique=True,
        postgresql_where=text("parent_id IS NOT NULL"),
    ),
    Index(
        "runs_failed_children",
        "parent_id",
        "child_no",
        postgresql_where=text("parent_id IS NOT NULL AND error IS NOT NULL"),
    ),
    Index("runs_retries", "retry_of", postgresql_where=text("retry_of IS NOT NULL")),
    Index("runs_pruned", "pruned_at", postgresql_where=text("pruned_at IS NOT NULL")),
    Index("runs_plan", "namespace", "plan", "created_at"),
    Index("runs_queue", "namespace", "queue", "created_at"),
    Index(
        "runs_dedupe",
        "namespace",
        "dedupe_key",
        "created_at",
        postgresql_where=text("dedupe_key IS NOT NULL"),
    ),
    Index(
        "runs_group",
        "namespace",
        "group",
        "created_at",
        postgresql_where=text('"group" IS NOT NULL'),
    ),
    Index(
        "runs_tags",
        "tags",
        postgresql_using="gin",
        postgresql_ops={"tags": "jsonb_path_ops"},
        postgresql_where=text("tags <> '{}'"),
    ),
    *(
        Index(
            name,
            "namespace",
            text(FAILED_OR_CANCELLED),
            *columns,
            postgresql_where=text("error IS NOT NULL"),
        )
        for name, columns in (
            ("runs_error", ["created_at"]),
            ("runs_error_plan", ["plan", "created_at"]),
            ("runs_error_queue", ["queue", "created_at"]),
        )
    ),
    # As the keyword postgresql_with, which SQLAlchemy 2.0 does not know for tables.
    info={"postgresql_with": {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.02"}},
)
"""No index on a column that changes while a run lives: its updates stay HOT.

`error` changes when a run fails or is cancelled: of all ends, only that one writes to the indexes.
"""

signals = Table(
    "signals",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("data", JSONB),
    Column("decision", JSONB),
)

decisions = Table(
    "decisions",
    metadata,
    Column("run_id", Id, primary_key=True),
    Column("occurrence", Id, primary_key=True),
    Column("data", JSONB, nullable=False),
    Column("decided_by", Text, nullable=False),
    Column("link", Id),
    Column("decided_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)

approval_links = Table(
    "approval_links",
    metadata,
    Column("id", Id, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("run_id", Id, nullable=False),
    Column("occurrence", Id, nullable=False),
    Column("decided_by", Text, nullable=False),
    Column("created_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("expires_at", Time, nullable=False),
    Column("revoked_at", Time),
    Column("maker", Id),
    Index("approval_links_run", "run_id"),
)

declared_plans = Table(
    "declared_plans",
    metadata,
    Column("name", Id, primary_key=True),
    Column("app", Id, primary_key=True),
    Column("declared", Boolean, nullable=False, server_default=text("true")),
    Column("version", Text, nullable=False),
    Column("queue", Id, nullable=False),
    Column("default_input", JSONB),
    Column("limits", JSONB),
    Column("refused", Text),
    Column("max_event_bytes", Integer, nullable=False),
    Column("declared_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)

plan_versions = Table(
    "plan_versions",
    metadata,
    Column("plan", Id, primary_key=True),
    Column("version", Id, primary_key=True),
    Column("steps", JSONB, nullable=False),
)

schedules = Table(
    "schedules",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("namespace", Id, nullable=False),
    Column("name", Id, nullable=False),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    Column("app", Text, nullable=False),
    Column("declared", Boolean, nullable=False),
    Column("run", JSONB, nullable=False),
    Column("cron", Text),
    Column("every", Integer),
    Column("tz", Text, nullable=False),
    Column("catch_up", Text, nullable=False),
    Column("overlap", Text, nullable=False),
    Column("jitter", Double, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("tick", Time),
    Column("due_at", Time),
    Column("look_at", Time),
    Column("last_tick", Time),
    Column("last_run_id", Id),
    Column("last_fired_at", Time),
    Column("last_late_s", Double),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("created_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Index("schedules_name", "namespace", "name", unique=True),
    Index("schedules_stopped", "name", postgresql_where=text("state = 'stopped'")),
    Index("schedules_due", "look_at", postgresql_where=text("look_at IS NOT NULL")),
)
"""`tick` names the next tick, `due_at` is when it is to start, `look_at` when it is looked at."""

limit_slots = Table(
    "limit_slots",
    metadata,
    Column("limit_id", Id, primary_key=True),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("run_id", Id, nullable=False),
    Column("taken_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Index("limit_slots_run", "run_id"),
)
"""Those that are taken: by runs that have a lease, or keep them until their end."""

limit_loans = Table(
    "limit_loans",
    metadata,
    Column("limit_id", Id, primary_key=True),
    Column("run_id", Id, primary_key=True),
    Column("n", Integer, nullable=False),
    Index("limit_loans_slot", "limit_id", "n"),
    Index("limit_loans_run", "run_id"),
)
"""By which children have a lease whose ancestors keep a slot of the limit; and which that is."""

limit_settings = Table(
    "limit_settings",
    metadata,
    Column("name", Id, primary_key=True),
    Column("at_once", Integer, nullable=False),
    Column("changed_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)

rate_settings = Table(
    "rate_settings",
    metadata,
    Column("name", Id, primary_key=True),
    Column("starts", Integer, nullable=False),
    Column("period_s", Double, nullable=False),
    Column("changed_at", Time, nullable=False, server_default=text("clock_timestamp()")),
)

limit_rates = Table(
    "limit_rates",
    metadata,
    Column("limit_id", Id, primary_key=True),
    Column("full_at", Time, nullable=False),
)
"""When the bucket of a rate is full again; without a row it is."""

ended_runs = Table(
    "ended_runs",
    metadata,
    Column("queue", Id, primary_key=True),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("worker", Id, primary_key=True),
    Column("hostname", Text, nullable=False),
    Column("queues", ARRAY(Text), nullable=False),
    Column("processes", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("seen_at", Time, nullable=False, server_default=text("clock_timestamp()")),
    Column("failing", ARRAY(Text), nullable=False, server_default="{}"),
)
