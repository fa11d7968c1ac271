"""What happens by each fault, and which tests of its own it has, for docs/reliability.md."""

LEASE = "the run goes on at the step in flight, in another worker; finished steps stay finished"
FENCED = "another worker takes the run over; whatever the first one still writes is refused"
OTHER_RELAY = (
    "the other relay leads its shards within milliseconds; nothing is published out of order"
)
REPEATED = "what was published and not marked is published again; streams drop it by its seq"
FOLLOW_ON = "viewers come again and go on where they were, each event once"
BACKFILL = "streams read the journal and go on; live events come with the next connection"
SENT_AGAIN = "runs whose message is lost are dispatched again"
ONE_OWNER = "the claim lets one in; the other ends at once"
SERVED_ON = "processes connect again, with pauses; steps whose commit is not known are looked up"
WAITS = "statements are tried again; no run fails by it"

KILLS = ("integration/test_kills.py",)
RACES = ("integration/test_races.py",)
WORKERS = ("integration/test_workers.py", "integration/test_signals.py")
RELAY = ("integration/test_relay.py", "integration/test_relay_faults.py")
SCHEDULES = ("integration/test_schedules.py", "stress/test_schedules.py")
STREAMS = ("integration/test_stream.py", "stress/test_streams.py")
CLIENTS = ("integration/test_http_client.py",)
REDIS = ("integration/test_relay_faults.py", "integration/test_redis_servers.py")
LOST = ("integration/test_lost_transactions.py",)
SESSIONS = ("integration/test_postgres_faults.py",)
LOCKS = ("integration/test_relay_locks.py",)
CLOCKS = ("integration/test_frozen_clock.py", "integration/test_wakeup_promises.py")
SESSIONS_SET = ("integration/test_sessions.py",)
FORGED = ("integration/test_forged_messages.py", "integration/test_hostile_input.py")

EXPECTATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "worker_killed": (LEASE, KILLS),
    "worker_stopped_warmly": (
        "the step in flight ends or is given back without an attempt",
        WORKERS,
    ),
    "worker_frozen_past_its_lease": (FENCED, RACES),
    "worker_frozen_for_a_moment": ("nothing: the lease is longer", RACES),
    "group_frozen_until_a_run_of_it_is_taken_over": (FENCED, RACES),
    "child_frozen_past_its_lease": (FENCED, ("integration/test_lease_keeper.py",)),
    "child_killed": (LEASE, KILLS),
    "worker_killed_with_its_keeper": (
        "another keeper or a relay notices; of several runs none has crashed",
        ("integration/test_fleet_watch.py",),
    ),
    "every_worker_killed": ("all runs go on with the workers that come", KILLS),
    "worker_dies_at_claim.committed": (LEASE, KILLS),
    "worker_dies_at_step.before": (LEASE, KILLS),
    "worker_dies_at_step.effect_done": ("the body runs again, with the same `ctx.key`", KILLS),
    "worker_dies_at_step.committed": ("the next step begins; this one never again", KILLS),
    "worker_dies_at_task.before_ack": ("the message comes again, to a run that has ended", KILLS),
    "relay_killed": (OTHER_RELAY, RELAY),
    "relay_stopped": (OTHER_RELAY, RELAY),
    "relay_frozen": ("the other leads its shards; late publications are dropped by seq", RELAY),
    "relay_dies_at_relay.after_claim": (REPEATED, RELAY),
    "relay_dies_at_relay.after_publish": (REPEATED, RELAY),
    "relay_dies_at_schedule.before": ("the other fires the tick 0.1 s later", SCHEDULES),
    "relay_dies_at_schedule.fired": ("the tick has its run, and no second one", SCHEDULES),
    "api_killed": (FOLLOW_ON, CLIENTS),
    "api_stopped": ("streams are closed and go on at the next process", CLIENTS),
    "bus_emptied": (BACKFILL, REDIS),
    "bus_restarted_empty": (BACKFILL, REDIS),
    "bus_stalled": (BACKFILL, REDIS),
    "bus_refuses_writes": ("relays try again, in order; streams read the journal", REDIS),
    "broker_emptied": (SENT_AGAIN, REDIS),
    "broker_restarted_empty": (SENT_AGAIN, REDIS),
    "broker_stalled": (SENT_AGAIN, REDIS),
    "bus_forbids_publishing": ("relays try again, in order; streams read the journal", REDIS),
    "messages_to_viewers_lost": ("a stream sees the gap and reads the journal", STREAMS),
    "subscribers_disconnected": (BACKFILL, STREAMS),
    "bus_clients_disconnected": (BACKFILL, STREAMS),
    "broker_clients_disconnected": ("workers connect again at once", WORKERS),
    "messages_delivered_twice": (ONE_OWNER, RACES),
    "message_that_is_not_ours": ("it is dropped; the worker takes the next", FORGED),
    "event_that_is_not_ours": ("streams of other runs do not believe it", FORGED),
    "connections_to_postgres_cut": (SERVED_ON, LOST),
    "connections_to_postgres_held": ("a watchdog replaces the connection", RELAY),
    "connections_to_bus_cut": (BACKFILL, REDIS),
    "connections_to_bus_held": (BACKFILL, REDIS),
    "connections_to_api_cut": (FOLLOW_ON, CLIENTS),
    "connections_to_api_held": (FOLLOW_ON, CLIENTS),
    "viewers_cut_at_any_byte": (FOLLOW_ON, CLIENTS),
    "answer_to_a_commit_lost": ("the writer reads whether its commit is there", LOST),
    "every_session_ended": (SERVED_ON, LOST),
    "relay_sessions_ended": ("relays connect again and drain", RELAY),
    "one_session_ended": (SERVED_ON, LOST),
    "postgres_crashed": ("what was acknowledged is there again; the rest is tried again", SESSIONS),
    "postgres_restarted": (SERVED_ON, SESSIONS),
    "postgres_read_only": (WAITS, SESSIONS),
    "disk_full": (WAITS, SESSIONS),
    "too_many_connections": ("who has none waits; relays keep theirs", SESSIONS),
    "rows_held_by_somebody": ("those runs wait; the others go on", LOCKS),
    "outbox_rows_held_by_somebody": (
        "they are published in order, and deleted when they are free",
        LOCKS,
    ),
    "outbox_held_by_somebody": ("writers wait; nothing is lost", LOCKS),
    "long_transaction": ("nothing: no statement needs the horizon", LOCKS),
    "relays_called_by_anybody": ("a relay looks once more than needed", FORGED),
    "worker_with_another_clock": ("nothing: times that count are those of Postgres", CLOCKS),
    "worker_behind_pgbouncer": ("nothing: a worker needs no session of its own", SESSIONS_SET),
    "hostile_caller": ("each call is refused with its member named; all others go on", FORGED),
    "disk_without_space": (
        "as `disk_full`; if Postgres ends by it, as `postgres_crashed`",
        SESSIONS,
    ),
    "another_history_declared": (
        "another epoch: streams get `HistoryChanged` or `reset`, and begin anew",
        ("integration/test_history.py", "integration/test_failover.py"),
    ),
    "settings_made_hostile": (
        "sessions set what they depend on",
        SESSIONS_SET,
    ),
}
"""By fault: what happens, and files below `tests`."""

DRILLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a standby takes over": (
        "another epoch from its first moment: streams get `HistoryChanged` or `reset`, waits end",
        ("integration/test_failover.py",),
    ),
    "a standby takes over that lacks the last commits": (
        "runs that it has go on as it has them; those that it lacks are gone, and keys are free",
        ("stress/test_lost_tail.py",),
    ),
    "the journal is read on a standby": (
        "no stream takes it for the truth: the epoch and the promotion are checked",
        ("integration/test_history.py", "integration/test_failover.py"),
    ),
    "workers of the first release on today's schema": (
        "they go on through the upgrade and beside new ones, under load",
        ("stress/test_upgrade.py", "stress/test_rolling_deploy.py"),
    ),
    "rows of a newer release": (
        "they are shown and left alone",
        ("integration/test_newer_versions.py",),
    ),
    "a NOTIFY that is lost, or a full queue of them": (
        "the watch looks for itself; writers commit",
        ("integration/test_doorbell.py", "integration/test_wakeup_promises.py"),
    ),
    "rows that beatless never writes": (
        "each costs its own run, and `verify` names it",
        ("integration/test_hostile_rows.py",),
    ),
    "two thousand viewers that come at once": (
        "places and reads are limited; nobody starves",
        ("integration/test_api_limits.py", "integration/test_api_connections.py"),
    ),
}
"""What the load does not do, and the tests that do: by what they do."""
